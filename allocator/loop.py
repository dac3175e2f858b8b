"""Run a search so that its history does not depend on how many workers there are or which die.

Barrier batches waste workers; asking whenever a worker is free makes the history depend on timing.
A sliding window does neither: proposal ``i`` is asked right after result ``i - window`` was told,
so what a search knows when it is asked is fixed, while workers finish in any order. Resuming is
running the same loop again with the measurements of the journal as its cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cached_property

from allocator.executors.base import Executor
from allocator.searches.base import Proposal, Search
from objectives.evaluation import Evaluation, evaluation_key

NOTHING_MORE = "the search has nothing more to propose"
_MOST_REPEATS = 200
"""A search that proposes only what it knows, this often in a row, has nothing new to say."""


@dataclass(frozen=True)
class Limits:
    """How far a search may run ahead of its results, and where it stops.

    All but ``seconds`` are functions of the history, so they stop a resumed run where they would
    have stopped it undisturbed, and raising one lets a run go on as if it had always been so.
    ``window`` shapes the history: it belongs to the run's configuration.

    Attributes:
        window: Proposals asked and not yet told; use at least twice the number of workers.
        tokens_per_sequence: Tokens of one sequence, to price a proposal before it is measured.
        trials: Most results told, repeated ones included.
        tokens: Most tokens read by the distinct measurements; never exceeded. One that fails half
            way is charged in full, a repeated one nothing.
        seconds: Of this session; what is under way then is dropped. Not reproducible.
        free: Keys of measurements that are not charged: what another run paid for.
    """

    window: int
    tokens_per_sequence: int
    trials: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    free: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("window", "tokens_per_sequence", "trials", "tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a result was told.

    Attributes:
        evaluation: The result.
        num_told: Results told so far, this one included.
        num_measured: Measurements made in this session; the others came from the cache.
        num_tokens: Tokens charged for what has been asked so far.
        seconds: Since the session's start.
    """

    evaluation: Evaluation
    num_told: int
    num_measured: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class History:
    """What a search was told, in order, and why it stopped.

    Attributes:
        evaluations: In the order they were asked, which is the order they were told.
        num_tokens: Tokens charged against the limit for them.
        stopped: The reason, as a phrase.
    """

    evaluations: tuple[Evaluation, ...]
    num_tokens: int
    stopped: str

    @property
    def num_failed(self) -> int:
        """Results without a loss."""
        return sum(not evaluation.ok for evaluation in self.evaluations)

    @cached_property
    def sha256(self) -> str:
        """Over position, key and rounded loss of each result.

        Of an error only the kind counts, the part before the colon: its text may hold addresses or
        free memory, which differ between machines.
        """
        digest = hashlib.sha256()
        for index, evaluation in enumerate(self.evaluations):
            loss = evaluation.loss_nats if evaluation.ok else None
            kind = (evaluation.error or "").split(":")[0]
            digest.update(json.dumps([index, evaluation.key, loss, kind]).encode() + b"\n")
        return digest.hexdigest()


def run_search(
    search: Search,
    executor: Executor,
    *,
    limits: Limits,
    cache: MutableMapping[str, Evaluation],
    record: Callable[[Evaluation], None],
    progress: Callable[[Progress], None],
) -> History:
    """Ask, measure and tell until a limit is reached or the search has finished.

    An interrupt or an error of ``record`` passes through; what was recorded by then is complete.

    Args:
        search: What to ask and tell; fresh, also when resuming.
        executor: Where to measure.
        limits: The window, and where to stop.
        cache: Evaluations by key. What is in it is not measured again; what is measured is added.
        record: Makes a new measurement durable; called in order of completion, before it is told.
        progress: Called after each result told.
    """
    window = _Window(search, limits)
    told: list[Evaluation] = []
    num_measured = num_tokens = 0
    while True:
        while (asked := window.ask()) is not None:
            if asked.num_tokens and asked.key not in cache:
                fidelity = asked.proposal.fidelity
                executor.submit(asked.key, asked.proposal.assignment, fidelity)
        if not window.open:
            break
        key = window.open[0].key
        while key not in cache and not window.is_over():
            arrived, evaluation = executor.next()
            assert arrived == evaluation.key, "an executor mixed up two measurements"
            if arrived not in cache:
                record(evaluation)
                cache[arrived] = evaluation
                num_measured += 1
        if key not in cache:
            window.run_out_of_time()
            executor.drop_queued()
            break
        num_tokens += window.open.popleft().num_tokens
        told.append(cache[key])
        search.tell([cache[key]])
        progress(Progress(cache[key], len(told), num_measured, num_tokens, window.seconds))
    return History(tuple(told), num_tokens, window.stopped)


@dataclass(frozen=True)
class _Asked:
    """A proposal under its key, and what it is charged: 0 when it was asked before, or is free."""

    key: str
    proposal: Proposal
    num_tokens: int


class _Window:
    """The proposals asked and not yet told, and the accounts that decide whether to ask again."""

    def __init__(self, search: Search, limits: Limits) -> None:
        self.open: deque[_Asked] = deque()
        self.stopped = ""
        self._search = search
        self._limits = limits
        self._started = time.monotonic()
        self._seen: set[str] = set()
        self._num_asked = 0
        self._num_tokens = 0
        self._num_repeats = 0

    @property
    def seconds(self) -> float:
        """Since the session's start."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether the session's time is over."""
        return self._limits.seconds is not None and self.seconds >= self._limits.seconds

    def run_out_of_time(self) -> None:
        """Stop for want of time."""
        self.stopped = f"the {self._limits.seconds:g} seconds are over"

    def ask(self) -> _Asked | None:
        """The next proposal; ``None`` when the window is full, the search waits, or it is over."""
        if self._num_asked == self._limits.trials:
            self.stopped = f"all {self._limits.trials} trials are done"
        elif self._num_repeats == _MOST_REPEATS:
            self.stopped = f"the last {_MOST_REPEATS} proposals were all known already"
        elif not self.stopped and self.is_over():
            self.run_out_of_time()
        if self.stopped or len(self.open) == self._limits.window:
            return None
        proposals = self._search.ask(1, [asked.proposal.assignment for asked in self.open])
        if not proposals:
            if not self.open:  # otherwise it may be waiting for what is under way
                self.stopped = NOTHING_MORE
            return None
        return self._admit(proposals[0])

    def _admit(self, proposal: Proposal) -> _Asked | None:
        """Charge a proposal, unless that would break the token limit."""
        key = evaluation_key(proposal.assignment, proposal.fidelity)
        price = proposal.fidelity.num_passes * self._limits.tokens_per_sequence
        if key in self._seen or key in self._limits.free:
            price = 0
        limit = self._limits.tokens
        if limit is not None and self._num_tokens + price > limit:
            self.stopped = f"one more measurement would exceed {limit} tokens"
            return None
        self._num_repeats = self._num_repeats + 1 if key in self._seen else 0
        self._seen.add(key)
        self._num_asked += 1
        self._num_tokens += price
        self.open.append(_Asked(key, proposal, price))
        return self.open[-1]

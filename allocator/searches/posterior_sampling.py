"""Posterior sampling: the additive table, corrected by every measurement, decoded exactly.

The problem: additive tables rank allocations well when compression is mild and badly at 2 and 3
bits, while searches that move a few units at a time need tens of thousands of evaluations. Here
every measurement corrects a Bayesian surrogate of the table, and each proposal is the exact
optimum (dynamic programming over bytes) of a posterior sample: Thompson sampling with a
combinatorial oracle. No proposal can break the budget.

Every candidate is compared with the first start on the same text, which has to be measured on that
text first. So the search begins on a few windows of the split and opens more as candidates come in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.corrected_table import CorrectedTable
from allocator.searches.repair import check_setting
from allocator.searches.surrogate import Spreads
from allocator.solvers.dynamic import Oracle
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment


@dataclass(frozen=True)
class SamplingOptions:
    """Tuning of :class:`PosteriorSampling`.

    Attributes:
        spreads: Prior standard deviations of the surrogate.
        first_sequences: The search begins on so many sequences of the split, or one window.
        per_window: The windows in use are doubled when so many candidates were measured for each.
        confirm_every: Every so many proposals the best assignment so far is measured on text it
            has not seen, while there is any.
        exploit_every: Every so many proposals the posterior mean is decoded instead of a sample.
        temperature: Scales the samples' deviation from the posterior mean. In a thousand dimensions
            an exact optimum of a full posterior sample mostly fits the sample's noise.
        first_changes: Share of the units that a proposal may change of the best assignment, at
            first: the trust radius.
        least_changes: The trust radius never falls below this share of the units.
        shrink: Factor of the trust radius after a proposal that was not the best.
        patience: The search ends when the posterior mean's optimum has promised so many times in a
            row less than half of the deviation with which the best assignment's loss is known.
    """

    spreads: Spreads = field(default_factory=Spreads)
    first_sequences: int = 8
    per_window: int = 6
    confirm_every: int = 6
    exploit_every: int = 3
    temperature: float = 0.5
    first_changes: float = 0.3
    least_changes: float = 0.1
    shrink: float = 0.95
    patience: int = 32

    def __post_init__(self) -> None:
        whole = ("first_sequences", "per_window", "confirm_every", "exploit_every", "patience")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.least_changes <= self.first_changes <= 1:
            raise ValueError(
                "expected 0 < least_changes <= first_changes <= 1, got "
                f"{self.least_changes} and {self.first_changes}"
            )
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be above 0, at most 1, got {self.shrink}")


_DEFAULTS = SamplingOptions()
_MOST_ATTEMPTS = 8
_BISECTIONS = 10


def _distance(ours: Assignment, theirs: Assignment) -> int:
    """Number of units that differ."""
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


class PosteriorSampling:
    """Thompson sampling on the loss table with the exact solver as oracle.

    Candidates are best measured on little text each: the surrogate averages the noise over all.

    Args:
        setting: Problem, starts, search split, seed.
        options: Tuning.
    """

    name: ClassVar[str] = "posterior_sampling"

    def __init__(self, setting: SearchSetting, options: SamplingOptions = _DEFAULTS) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = options
        self._rng = np.random.default_rng(setting.seed)
        self._oracle = Oracle(setting.problem.bytes)
        self._num_windows = -(-setting.num_sequences // setting.batch_sequences)
        first = max(1, options.first_sequences // setting.batch_sequences)
        self._num_open = min(first, self._num_windows)
        self._table = corrected_table(setting, options)
        self._queue = self._opening()
        self._asked: set[tuple[Assignment, Fidelity]] = set()
        self._num_asked = 0
        self._num_candidates = 0
        self._radius = max(2.0, options.first_changes * len(setting.problem.bytes))
        self._promise: tuple[float, float] | None = None
        self._num_hopeless = 0

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The opening first; then posterior samples, decoded exactly.

        Nothing more comes once only assignments that are already measured on all text come out,
        or once the expected improvement has been below the noise for long.
        """
        proposals = (self._propose(pending) for _ in range(count))
        return [proposal for proposal in proposals if proposal is not None]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Correct the table; failed evaluations teach nothing and are never the best."""
        for evaluation in evaluations:
            # with slopes or without, for whomever: it need not be measured again
            self._asked.add((evaluation.assignment, replace(evaluation.fidelity, slopes=False)))
            before = self.best
            for used in self._table.tell([evaluation]):
                self._adapt(before, used.assignment)
        if (
            self._num_open < self._num_windows
            and self._num_candidates >= self._options.per_window * self._num_open
        ):
            self._open_windows()

    @property
    def best(self) -> Assignment | None:
        """The measured assignment of least posterior loss."""
        return self._table.best()

    @property
    def knows_enough(self) -> bool:
        """Whether enough of the first start is measured for the surrogate to speak."""
        return self._table.surrogate is not None

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, if that is for want of promise."""
        if self._promise is None or not self._is_hopeless:
            return ""
        gain, noise = self._promise
        return f"an expected improvement of {gain:.2g} nats is below the noise of {noise:.2g}"

    def notes(self) -> dict[str, float]:
        """What the posterior mean's optimum promises over the best, and how well that is known."""
        if self._promise is None:
            return {}
        gain, noise = self._promise
        return {"expected_improvement_nats": gain, "best_deviation_nats": noise}

    def _opening(self) -> list[Proposal]:
        """The first start on the first windows, which others are compared with; then the rest."""
        first, *others = self._setting.starts
        reference = [Proposal(first, self._setting.fidelity(w)) for w in range(self._num_open)]
        rest = [
            Proposal(start, self._setting.fidelity(i % self._num_open))
            for i, start in enumerate(others)
        ]
        return [reference[0], *rest, *reference[1:]]

    def _propose(self, pending: Collection[Assignment]) -> Proposal | None:
        self._num_asked += 1
        while self._queue:
            proposal = self._queue.pop(0)
            if (proposal.assignment, proposal.fidelity) not in self._asked:
                return self._note(proposal)
        turn = self._num_asked
        if turn % self._options.confirm_every == 0 and (again := self._confirmation()) is not None:
            return self._note(again)
        window = self._setting.fidelity(turn % self._num_open)
        for attempt in range(0 if self._is_hopeless else _MOST_ATTEMPTS):
            greedy = turn % self._options.exploit_every == 0 and attempt == 0
            proposal = Proposal(self._decode(greedy=greedy), window)
            if proposal.assignment not in pending and (
                (proposal.assignment, window) not in self._asked
            ):
                return self._note(proposal)
        # Samples bring nothing new: read more text with the best ones, or stop.
        again = self._confirmation()
        if again is None and not self._is_hopeless and self._num_open < self._num_windows:
            self._open_windows()
            again = self._queue.pop(0)
        return None if again is None else self._note(again)

    def _note(self, proposal: Proposal) -> Proposal:
        self._asked.add((proposal.assignment, proposal.fidelity))
        return proposal

    def _open_windows(self) -> None:
        """Twice as many windows; the first start is measured on the new ones next."""
        opened = min(2 * self._num_open, self._num_windows)
        first = self._setting.starts[0]
        self._queue += [
            Proposal(first, self._setting.fidelity(w)) for w in range(self._num_open, opened)
        ]
        self._num_open = opened

    def _decode(self, *, greedy: bool) -> Assignment:
        """The exact optimum of the posterior mean, or of a sample."""
        problem, surrogate, centre = self._setting.problem, self._table.surrogate, self.best
        if surrogate is None or centre is None:
            losses = [
                row * np.exp(self._rng.normal(scale=0.3, size=len(row))) for row in problem.losses
            ]
            return self._oracle.solve(losses, problem.budget_bytes).choice
        losses = surrogate.table(
            None if greedy else self._rng,
            temperature=self._options.temperature,
            centre=centre,
        )
        choice = self._pull(self._oracle.solve(losses, problem.budget_bytes).choice, losses, centre)
        if greedy:
            self._judge(losses, centre, choice)
        return choice

    @property
    def _is_hopeless(self) -> bool:
        return self._num_hopeless >= self._options.patience

    def _judge(
        self, losses: Sequence[NDArray[np.float64]], centre: Assignment, choice: Assignment
    ) -> None:
        """Whether the posterior mean still promises more than is noise."""
        found = None if self._table.surrogate is None else self._table.surrogate.best()
        assert found is not None, "decoded without a best assignment"
        gain = sum(float(r[i] - r[j]) for r, i, j in zip(losses, centre, choice, strict=True))
        self._promise = gain, found[2]
        self._num_hopeless = self._num_hopeless + 1 if gain < found[2] / 2 else 0

    def _pull(
        self, choice: Assignment, losses: Sequence[NDArray[np.float64]], centre: Assignment
    ) -> Assignment:
        """Keep a proposal within the trust radius of the best assignment, still decoded exactly.

        Every option that the best assignment does not take is charged the same extra loss, just
        enough (by bisection) that no more than ``radius`` units change.
        """
        if _distance(choice, centre) <= self._radius:
            return choice
        budget = self._setting.problem.budget_bytes
        low, high = 0.0, sum(float(np.ptp(row)) for row in losses)
        for _ in range(_BISECTIONS):
            charge = (low * high) ** 0.5 if low > 0 else high * 1e-3
            charged = [
                row + charge * (np.arange(len(row)) != i)
                for row, i in zip(losses, centre, strict=True)
            ]
            pulled = self._oracle.solve(charged, budget).choice
            if _distance(pulled, centre) <= self._radius:
                high, choice = charge, pulled
            else:
                low = charge
        return choice if _distance(choice, centre) <= self._radius else centre

    def _confirmation(self) -> Proposal | None:
        """The best assignments so far on open windows they have not been measured on."""
        if self._table.surrogate is None:
            return None
        for assignment in self._table.surrogate.ranked()[:3]:
            for window in range(self._num_open):
                fidelity = self._setting.fidelity(window)
                if (assignment, fidelity) not in self._asked:
                    return Proposal(assignment, fidelity)
        return None

    def _adapt(self, before: Assignment | None, told: Assignment) -> None:
        """Widen the trust radius after an improvement, narrow it after a proposal that failed."""
        if told in self._setting.starts:
            return
        self._num_candidates += 1
        if before is None or told == before:
            return
        factor = 1.5 if self.best == told else self._options.shrink
        least = max(2.0, self._options.least_changes * len(told))
        self._radius = min(max(self._radius * factor, least), float(len(told)))


def corrected_table(setting: SearchSetting, options: SamplingOptions = _DEFAULTS) -> CorrectedTable:
    """The table that the search of a setting corrects."""
    windows = max(1, options.first_sequences // setting.batch_sequences)
    num_reference = min(windows * setting.batch_sequences, setting.num_sequences)
    return CorrectedTable(setting, options.spreads, num_reference=num_reference)

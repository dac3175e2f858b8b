"""The (1 + lambda) evolution of EvoPress, the strongest published search on the measured loss.

One parent. Its offspring are tested in stages, each on a fresh and longer minibatch that all
candidates of the stage share; few survive each stage, the parent joins in the last one, and the
best of that becomes the parent. Mutations step a few units up and others down.

Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025, Algorithm 1. Its budget is a mean level inside groups of equal size (``same_size_only``); by
default we follow the size-free variant of its reference implementation, in bytes: step some units
up, then random units down until the budget holds, and drop offspring that gave up much more than
they took. Defaults are for runs of a few hundred evaluations; published ones use 32 to 128
offspring and minibatches up to 64 times longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.repair import check_setting, lower_to_fit
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

_MOST_CHANGES = 10  # level changes of one mutation, as in the reference implementation
_LEAST_RETURN = 0.8  # bytes taken for each byte given up, likewise
_MOST_DRAWS = 1000  # mutations tried for one generation's next offspring
_MOST_STALE_GENERATIONS = 20  # generations in a row that held nothing to measure


@dataclass(frozen=True)
class EvolutionOptions:
    """Shape of a generation.

    Attributes:
        num_offspring: Mutants of the parent in each generation.
        survivors: How many go on after each stage; the last is 1.
        batches: Minibatch of each stage, in multiples of the setting's ``batch_sequences``; never
            more than the whole split.
        same_size_only: Trade levels only between units with the same bytes, as published.
    """

    num_offspring: int = 16
    survivors: tuple[int, ...] = (2, 1)
    batches: tuple[int, ...] = (1, 2)
    same_size_only: bool = False

    def __post_init__(self) -> None:
        if self.num_offspring < 1:
            raise ValueError(f"expected at least one offspring, got {self.num_offspring}")
        if len(self.survivors) != len(self.batches) or not self.survivors:
            raise ValueError(
                f"expected survivors and a batch for each stage, got {self.survivors} survivors "
                f"and batches {self.batches}"
            )
        if self.survivors[-1] != 1 or min(self.survivors) < 1 or min(self.batches) < 1:
            raise ValueError(
                f"expected positive survivors ending in 1 and positive batches, got "
                f"{self.survivors} and {self.batches}"
            )


_DEFAULTS = EvolutionOptions()


class Evolution:
    """EvoPress's evolution as ask/tell.

    The generations draw their randomness when the one before is complete, so the history is the
    same for any window. While a stage waits for its last results, ``ask`` returns nothing.

    Args:
        setting: What to search. Its starts are the first candidates for the parent.
        options: Shape of a generation.
    """

    name: ClassVar[str] = "evolution"

    def __init__(self, setting: SearchSetting, options: EvolutionOptions = _DEFAULTS) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = options
        self._rng = np.random.default_rng(setting.seed)
        self._peers = _units_of_equal_size(setting)
        self._parent = setting.starts[0]
        self._measured_parent = False
        self._known: dict[tuple[Assignment, Fidelity], float] = {}
        self._first = 0
        self._finished = False
        self._stage = -1  # the starts are measured before the first generation
        self._enter_stage(list(dict.fromkeys(setting.starts)), options.batches[-1])

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """Up to ``count`` candidates of the stage; none while it waits or when all is searched."""
        taken = [self._unasked.popleft() for _ in range(min(count, len(self._unasked)))]
        return [Proposal(assignment, self._fidelity) for assignment in taken]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from finished evaluations; the last of a stage opens the next stage."""
        for evaluation in evaluations:
            self._known[evaluation.assignment, evaluation.fidelity] = evaluation.loss_nats
            if evaluation.fidelity == self._fidelity:
                self._waiting.discard(evaluation.assignment)
        num_stale = 0
        while not self._waiting and not self._finished:
            num_stale += self._stage == len(self._options.batches) - 1
            self._finished = num_stale > _MOST_STALE_GENERATIONS
            self._close_stage()

    @property
    def best(self) -> Assignment | None:
        """The parent; while the starts are being measured, the best of them so far."""
        if self._measured_parent:
            return self._parent
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _enter_stage(self, candidates: list[Assignment], batches: int) -> None:
        """Open a stage on the next sequences of the split; what is known is not asked again."""
        num_sequences = self._setting.num_sequences
        count = min(batches * self._setting.batch_sequences, num_sequences)
        first = self._first if count < num_sequences else 0
        self._first = (self._first + count) % num_sequences
        self._fidelity = Fidelity("search", first, count)
        self._candidates = candidates
        unknown = [a for a in candidates if (a, self._fidelity) not in self._known]
        self._unasked = deque(unknown)
        self._waiting = set(unknown)

    def _ranked(self) -> list[Assignment]:
        """The stage's candidates with a finite loss, best first."""
        losses = {a: self._known.get((a, self._fidelity), np.inf) for a in self._candidates}
        return sorted((a for a in losses if np.isfinite(losses[a])), key=losses.__getitem__)

    def _close_stage(self) -> None:
        """Select, then open the next stage or generation."""
        last = len(self._options.batches) - 1
        ranked = self._ranked()
        if self._stage in (-1, last):
            if ranked:
                self._parent, self._measured_parent = ranked[0], True
            self._stage, candidates = 0, self._breed()
            self._finished |= not candidates
        else:
            candidates = ranked[: self._options.survivors[self._stage]]
            self._stage += 1
        if self._stage == last:  # the parent is scored anew, first so that it wins ties
            candidates = [self._parent, *candidates]
        self._enter_stage(candidates, self._options.batches[self._stage])

    def _breed(self) -> list[Assignment]:
        """Distinct mutants of the parent; fewer where there are hardly any."""
        offspring: dict[Assignment, None] = {}
        for _ in range(_MOST_DRAWS):
            if len(offspring) == self._options.num_offspring:
                break
            num_switches = int(self._rng.integers(1, 4, size=2).min())
            mutate = self._trade if self._options.same_size_only else self._exchange
            child = mutate(num_switches)
            if child is not None and child != self._parent:
                offspring[child] = None
        return list(offspring)

    def _exchange(self, num_switches: int) -> Assignment | None:
        """Step units up, then random units down until the budget holds."""
        problem = self._setting.problem
        raised = list(self._parent)
        for _ in range(num_switches):
            able = [u for u, cost in enumerate(problem.bytes) if raised[u] + 1 < len(cost)]
            if not able:
                return None
            raised[able[int(self._rng.integers(len(able)))]] += 1
        child = lower_to_fit(problem, tuple(raised), self._rng)
        if child is None:
            return None
        num_changes = num_switches + sum(raised) - sum(child)
        above = problem.total_bytes(raised)
        taken = above - problem.total_bytes(self._parent)
        given = above - problem.total_bytes(child)
        if num_changes > _MOST_CHANGES or taken < _LEAST_RETURN * given:
            return None
        return child

    def _trade(self, num_switches: int) -> Assignment | None:
        """Step units up and as many of the same size down."""
        problem = self._setting.problem
        child = list(self._parent)
        for _ in range(num_switches):
            able = [u for u, cost in enumerate(problem.bytes) if child[u] + 1 < len(cost)]
            if not able:
                return None
            up = able[int(self._rng.integers(len(able)))]
            peers = [unit for unit in self._peers[up] if child[unit] and unit != up]
            if not peers:
                return None
            child[up] += 1
            child[peers[int(self._rng.integers(len(peers)))]] -= 1
        # Steps of a menu may weigh differently, so equal counts need not keep the bytes.
        return tuple(child) if problem.total_bytes(child) <= problem.budget_bytes else None


def _units_of_equal_size(setting: SearchSetting) -> list[list[int]]:
    """For each unit the units whose options have the same bytes, itself included."""
    groups: dict[tuple[int, ...], list[int]] = {}
    keys = [tuple(int(price) for price in cost) for cost in setting.problem.bytes]
    for unit, key in enumerate(keys):
        groups.setdefault(key, []).append(unit)
    return [groups[key] for key in keys]

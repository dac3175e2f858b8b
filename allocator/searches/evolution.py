"""The (1 + lambda) evolution of EvoPress, the strongest published search on the measured loss.

One parent. Its offspring are tested in stages, each on a fresh and longer minibatch that all
candidates of the stage share; few survive each stage, the parent joins in the last one, and the
best of that becomes the parent. Mutations step a few units up and others down.

Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML
2025, Algorithm 1. Its budget is a mean level inside groups of equal size (``same_size_only``); by
default we follow the size-free variant of its reference implementation, in bytes: step some units
up, then random units down until the budget holds, and drop offspring that gave up much more than
they took. Dropping layers is the same with menus of two options: a pair of opposite steps swaps
what is dropped. Defaults are for runs of a few hundred evaluations; the published schedules are
``EvolutionOptions.published``.

Coarse-to-fine ``rounds`` follow Li et al., "Tyr-the-Pruner", NeurIPS 2025, section 2.4: four of
them, the step halved after each. There the options are compressed anew around each round's result;
here the menu holds the finest ones from the start and a round sees every so many of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from allocator.problem import Problem
from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.evolution_options import EvolutionOptions
from allocator.searches.ledger import Ledger
from allocator.searches.repair import check_setting, lower_to_fit
from allocator.searches.thinning import Kept, narrow, thinned_problem, widen
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

__all__ = ["Evolution", "EvolutionOptions"]

_MOST_CHANGES = 10  # level changes of one mutation, as in the reference implementation
_LEAST_RETURN = 0.8  # bytes taken for each byte given up, likewise
_MOST_DRAWS = 1000  # mutations tried for one generation's next offspring
_MOST_STALE_GENERATIONS = 20  # generations in a row that held nothing to measure


_DEFAULTS = EvolutionOptions()


class Evolution:
    """EvoPress's evolution as ask/tell.

    The generations draw their randomness when the one before is complete, so the history is the
    same for any window. While a stage waits for its last results, ``ask`` returns nothing.

    What it is told without having asked is a candidate too: the best of it is measured with the
    starts or, later, in the next last stage, beside the parent.

    Args:
        setting: What to search. Its starts are the first candidates for the parent.
        options: Shape of a generation and of the whole.
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
        self._asked: set[tuple[Assignment, Fidelity]] = set()
        self._others = Ledger(setting.num_sequences)  # told unasked, or before there is a parent
        self._has_news = False
        self._first = self._generation = self._round = 0
        self._stage: int | None = None  # -1 while the starts are measured
        self._finished = False
        self._unasked: deque[Assignment] = deque()

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """Up to ``count`` candidates of the stage; none while it waits or when all is searched."""
        if self._stage is None:
            self._open()
            self._advance()  # all that it would ask first may be known
        taken = [self._unasked.popleft() for _ in range(min(count, len(self._unasked)))]
        self._asked.update((assignment, self._fidelity) for assignment in taken)
        return [Proposal(assignment, self._fidelity) for assignment in taken]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from finished evaluations; the last of a stage opens the next stage."""
        for evaluation in evaluations:
            key = evaluation.assignment, evaluation.fidelity
            self._known[key] = evaluation.loss_nats
            if key not in self._asked or not self._measured_parent:
                self._others.add(evaluation)
            self._has_news |= key not in self._asked
            if self._stage is not None and evaluation.fidelity == self._fidelity:
                self._waiting.discard(evaluation.assignment)
        if self._stage is not None:
            self._advance()

    def _advance(self) -> None:
        """Close every stage whose candidates are all known."""
        num_stale = 0
        while not self._waiting and not self._finished:
            num_stale += self._stage == len(self._options.batches) - 1
            if num_stale > _MOST_STALE_GENERATIONS:
                num_stale = 0
                self._end_round()
            if not self._finished:
                self._close_stage()

    @property
    def best(self) -> Assignment | None:
        """The parent; while the starts are being measured, the best of what was told so far."""
        return self._parent if self._measured_parent else self._others.best()

    def _open(self) -> None:
        """Measure the starts, the best of what is known already, and random assignments."""
        self._stage = -1
        known = self._others.best()
        drawn = [self._draw() for _ in range(self._options.num_initial)]
        candidates = [*self._setting.starts, known, *drawn]
        self._has_news = False
        self._enter_stage(
            list(dict.fromkeys(a for a in candidates if a is not None)),
            self._options.initial_batches or self._options.batches[-1],
        )

    def _draw(self) -> Assignment | None:
        """The least uniform level that is over the budget, lowered at random until it fits."""
        problem = self._setting.problem
        tops = [len(cost) - 1 for cost in problem.bytes]
        for level in range(max(tops) + 1):
            uniform = tuple(min(level, top) for top in tops)
            if problem.total_bytes(uniform) > problem.budget_bytes:
                break
        return lower_to_fit(problem, uniform, self._rng)

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
        assert self._stage is not None
        last = len(self._options.batches) - 1
        ranked = self._ranked()
        if self._stage in (-1, last):
            if ranked:
                self._parent, self._measured_parent = ranked[0], True
            self._end_generation(counts=self._stage == last)
            self._stage, candidates = 0, self._breed()
        else:
            candidates = ranked[: self._options.survivors[self._stage]]
            self._stage += 1
        if self._stage == last:  # the parent is scored anew, first so that it wins ties
            candidates = list(dict.fromkeys([self._parent, *self._news(), *candidates]))
        if self._finished:
            candidates = []
        self._enter_stage(candidates, self._options.batches[self._stage])

    def _news(self) -> list[Assignment]:
        """The best of what was told without having been asked, if that has changed."""
        found = self._others.best() if self._has_news else None
        self._has_news = False
        return [] if found is None else [found]

    def _end_generation(self, *, counts: bool) -> None:
        """Go on to the next round, or stop, when it is time."""
        self._generation += counts
        self._finished |= self._generation == self._options.num_generations
        if self._generation >= (self._round + 1) * self._options.round_generations:
            self._round = min(self._round + 1, self._options.rounds - 1)

    def _end_round(self) -> None:
        """Nothing is left to measure at this step: take the next finer one, or stop."""
        self._finished |= self._round == self._options.rounds - 1
        self._round = min(self._round + 1, self._options.rounds - 1)

    def _breed(self) -> list[Assignment]:
        """Distinct mutants of the parent; fewer where there are hardly any.

        The search is finished when there are none, even at the finest step.
        """
        offspring: dict[Assignment, None] = {}
        while not offspring and not self._finished:
            kept = self._levels()
            problem = thinned_problem(self._setting.problem, kept)
            parent = narrow(self._parent, kept)
            for _ in range(_MOST_DRAWS):
                if len(offspring) == self._options.num_offspring:
                    break
                num_switches = int(self._rng.integers(1, 4, size=2).min())
                mutate = self._trade if self._options.same_size_only else self._exchange
                child = mutate(problem, parent, num_switches)
                if child is not None and child != parent:
                    offspring[widen(child, kept)] = None
            if not offspring:
                self._end_round()
        return list(offspring)

    def _levels(self) -> Kept:
        """The round's options of each unit: the parent's and every so many above and below."""
        stride = 2 ** (self._options.rounds - 1 - self._round)
        return tuple(
            tuple(range(level % stride, len(cost), stride))
            for level, cost in zip(self._parent, self._setting.problem.bytes, strict=True)
        )

    def _exchange(
        self, problem: Problem, parent: Assignment, num_switches: int
    ) -> Assignment | None:
        """Step units up, then random units down until the budget holds."""
        raised = list(parent)
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
        taken = above - problem.total_bytes(parent)
        given = above - problem.total_bytes(child)
        if num_changes > _MOST_CHANGES or taken < _LEAST_RETURN * given:
            return None
        return child

    def _trade(self, problem: Problem, parent: Assignment, num_switches: int) -> Assignment | None:
        """Step units up and as many of the same size down."""
        child = list(parent)
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

"""Optuna's samplers on few coordinates, every point of which decodes to an assignment.

The problem: samplers gain nothing in hundreds of raw coordinates, and most of what they draw there
breaks the budget. Here they draw points of a small space whose decoder keeps the budget, and Optuna
serves as a library of samplers: one study in memory, asked and told, never the store of record;
replaying the history rebuilds it. What a trial is told is its loss with the difficulty of its
sequences removed, as far as it is known by then. What others measured (an earlier run, the other
searches of a portfolio) becomes trials too, where the space finds the point that it stands for;
before the next proposal, so that its loss is adjusted by all that was told with it. Every few asks
what looks best is measured once more on text it has not met, so that an assignment which was merely
lucky does not stay the best.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.ledger import Ledger
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

if TYPE_CHECKING:
    import optuna

_MOST_REPEATS = 50  # proposals in a row that were all asked before: the sampler has converged


@dataclass(frozen=True)
class Axis:
    """One coordinate of the points that a sampler draws.

    Attributes:
        name: Unique in its space.
        low: Least value.
        high: Greatest value.
        step: Distance between the values it takes; ``None`` for everything between.
    """

    name: str
    low: float
    high: float
    step: float | None = None


class PointSpace(Protocol):
    """Points of few coordinates, each of which decodes to an assignment within the budget."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The coordinates; none where there is nothing to choose."""
        ...

    @property
    def seeds(self) -> tuple[tuple[float, ...], ...]:
        """Points to try before the sampler draws any, in this order."""
        ...

    def decode(self, point: NDArray[np.float64]) -> Assignment:
        """The assignment of a point.

        Args:
            point: (num_axes,) in the order of ``axes``.
        """
        ...

    def encode(self, assignment: Assignment) -> tuple[float, ...] | None:
        """A point that decodes to an assignment, or nearly.

        Returns:
            In the order of ``axes``; ``None`` where no point is near enough that the assignment's
            loss could be taken for the point's.
        """
        ...


class Sampled:
    """Ask/tell over one of Optuna's samplers; each search is this with a space and a sampler.

    Args:
        setting: What to search. A start that a seed of the space decodes to is the seed's trial;
            other starts have no point and are only compared.
        space: What the sampler draws from.
        make_sampler: Makes Optuna's sampler; called once.
        remeasure_every: Every so many asks the best so far is measured on further sequences;
            0 never does.
        num_objectives: How many numbers :meth:`_values` gives.
        most_trials: The search ends after so many trials of its own.
    """

    _has_generations: ClassVar[bool] = False
    """Whether the sampler breeds generations, instead of modelling all trials there are."""

    def __init__(
        self,
        setting: SearchSetting,
        space: PointSpace,
        make_sampler: Callable[[], optuna.samplers.BaseSampler],
        *,
        remeasure_every: int,
        num_objectives: int = 1,
        most_trials: int | None = None,
    ) -> None:
        self._setting = setting
        self._space = space
        self._remeasure_every = remeasure_every
        self._most_trials = most_trials
        self._ledger = Ledger(setting.num_sequences)
        self._study = _make_study(make_sampler, num_objectives)
        self._distributions = _distributions(space.axes)
        self._seeds: dict[Assignment, tuple[float, ...]] = {}
        for seed in space.seeds if space.axes else ():
            self._seeds.setdefault(space.decode(np.array(seed)), seed)
        self._trials: dict[Proposal, deque[optuna.trial.Trial]] = {}
        self._points: dict[Assignment, tuple[float, ...]] = {}  # of what has a trial
        self._foreign: dict[Assignment, None] = {}  # told since the last ask, in that order
        self._met = {*setting.starts, *self._seeds}
        self._asked: set[Proposal] = set()
        self._starts = list(dict.fromkeys(setting.starts))
        self._num_asks = 0
        self._num_trials = 0
        self._num_repeats = 0
        self._num_windows = -(-setting.num_sequences // setting.batch_sequences)

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals; fewer where there is no choice or all is decoded again."""
        self._learn_from_others()
        proposals: list[Proposal] = []
        while len(proposals) < count and self._has_more():
            proposal = self._propose_start() or self._propose_again() or self._propose_new()
            self._num_repeats = self._num_repeats + 1 if proposal in self._asked else 0
            self._asked.add(proposal)
            self._num_asks += 1
            proposals.append(proposal)
        return proposals

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from finished evaluations; a failed one is a failed trial."""
        from optuna.trial import TrialState

        for evaluation in evaluations:
            self._ledger.add(evaluation)
            proposal = Proposal(evaluation.assignment, evaluation.fidelity)
            waiting = self._trials.get(proposal)
            if not waiting:
                if evaluation.ok and evaluation.assignment not in self._met:
                    self._foreign[evaluation.assignment] = None
                continue
            trial = waiting.popleft()
            if evaluation.ok:
                self._study.tell(trial, self._values(evaluation.assignment))
            else:
                self._study.tell(trial, state=TrialState.FAIL)

    @property
    def best(self) -> Assignment | None:
        """The least loss after removing the sequences' difficulty."""
        return self._ledger.best()

    def _values(self, assignment: Assignment) -> list[float]:
        """What the sampler is to minimise."""
        return [self._ledger.adjusted(assignment)[0]]

    def _learn_from_others(self) -> None:
        """Make trials of what was told without being asked for, where it has a point."""
        foreign = [assignment for assignment in self._foreign if assignment not in self._met]
        self._foreign.clear()
        if not foreign or not self._space.axes:
            return
        for assignment in self._worth_learning(foreign):
            point = self._space.encode(assignment)
            if point is not None:
                self._points[assignment] = point
                self._add_trial(point, self._values(assignment))
        self._met.update(foreign)

    def _worth_learning(self, foreign: list[Assignment]) -> list[Assignment]:
        """What the sampler is to learn from, in this order."""
        return foreign

    def _add_trial(self, point: tuple[float, ...], values: list[float]) -> None:
        """A finished trial that the sampler did not draw."""
        import optuna

        if self._has_generations:
            asked = self._ask_study(point)
            self._join_generation(asked)
            self._study.tell(asked, values)
            return
        names = (axis.name for axis in self._space.axes)
        trial = optuna.trial.create_trial(
            params=dict(zip(names, point, strict=True)),
            distributions=self._distributions,
            values=values,
        )
        self._study.add_trial(trial)

    def _promising(self) -> Sequence[Assignment]:
        """What is worth measuring on more text, the first first."""
        best = self.best
        return [] if best is None else [best]

    def _has_more(self) -> bool:
        if self._starts:
            return True
        if not self._space.axes or self._num_repeats >= _MOST_REPEATS:
            return False
        return self._most_trials is None or self._num_trials < self._most_trials

    def _propose_start(self) -> Proposal | None:
        if not self._starts:
            return None
        proposal = Proposal(self._starts.pop(0), self._setting.fidelity(0))
        if (seed := self._seeds.pop(proposal.assignment, None)) is not None:
            self._wait_for(self._ask_study(seed), proposal)
        return proposal

    def _propose_again(self) -> Proposal | None:
        """What is promising on the first window it was not asked on, when its turn has come."""
        every = self._remeasure_every
        if not every or self._num_asks % every:
            return None
        promising = self._promising()
        for window in range(self._num_windows):
            for assignment in promising:
                proposal = Proposal(assignment, self._setting.fidelity(window))
                if proposal not in self._asked:
                    return proposal
        return None

    def _propose_new(self) -> Proposal:
        """A seed while there are any, then what is wished for or the sampler draws."""
        if self._seeds:
            trial = self._ask_study(self._seeds.pop(next(iter(self._seeds))))
        else:
            wished = self._wished()
            trial = self._ask_study(wished)
            if wished is not None:
                self._join_generation(trial)
        assignment = self._space.decode(np.array(self._point(trial)))
        proposal = Proposal(assignment, self._setting.fidelity(self._num_trials))
        self._wait_for(trial, proposal)
        return proposal

    def _wished(self) -> tuple[float, ...] | None:
        """A point to try next instead of what the sampler would draw."""
        return None

    def _ask_study(self, point: tuple[float, ...] | None = None) -> optuna.trial.Trial:
        """A trial at a point, or where the sampler wants it."""
        if point is not None:
            names = (axis.name for axis in self._space.axes)
            self._study.enqueue_trial(dict(zip(names, point, strict=True)))
        return self._study.ask(self._distributions)

    def _join_generation(self, trial: optuna.trial.Trial) -> None:
        """Count a trial at a given point to the generation that is being drawn.

        Optuna's samplers do so when they are asked for parameters, which at a given point they are
        not. Seeds stay outside: points that are alike narrow a population.
        """
        if self._has_generations:
            _ = trial.relative_params

    def _wait_for(self, trial: optuna.trial.Trial, proposal: Proposal) -> None:
        self._num_trials += 1
        self._met.add(proposal.assignment)
        self._points.setdefault(proposal.assignment, self._point(trial))
        self._trials.setdefault(proposal, deque()).append(trial)

    def _point(self, trial: optuna.trial.Trial) -> tuple[float, ...]:
        return tuple(trial.params[axis.name] for axis in self._space.axes)


def _distributions(axes: Sequence[Axis]) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import FloatDistribution

    return {axis.name: FloatDistribution(axis.low, axis.high, step=axis.step) for axis in axes}


def _make_study(
    make_sampler: Callable[[], optuna.samplers.BaseSampler], num_objectives: int
) -> optuna.Study:
    """A study in memory."""
    import optuna

    with quiet():
        return optuna.create_study(
            storage=optuna.storages.InMemoryStorage(),
            sampler=make_sampler(),
            pruner=optuna.pruners.NopPruner(),
            study_name="allocator",
            directions=["minimize"] * num_objectives,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's messages and its warnings that something is experimental."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

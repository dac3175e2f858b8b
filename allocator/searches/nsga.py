"""NSGA-II and NSGA-III: the whole front of loss against bytes (and latency) in one run.

The problem: whoever does not know the budget yet, or has several, runs a search per budget. Here
the budget is one more coordinate of the reduced space: a point is a dozen multipliers of the loss
table and a share of the budget, and decodes to the exact optimum of the multiplied table at that
many bytes. The DP plans at several budgets are measured first; the population is bred without them,
since they all have the same multipliers. What the search returns is still the best within the whole
budget; the rest is its ``front``.

Losses differ a hundredfold along the front, and so does their noise; the ledger, which knows one
noise, compares them after dividing by what the loss table predicts.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002; Deb & Jain, "An
evolutionary many-objective optimization algorithm using reference-point-based nondominated sorting
approach", 2014.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from allocator.searches.base import FrontPoint, Proposal, SearchSetting
from allocator.searches.ledger import Ledger
from allocator.searches.pareto import hypervolume, nondominated
from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.sampled import Axis, Sampled
from allocator.solvers.dynamic import DynamicProgram
from objectives.evaluation import Evaluation, round_significant
from search_spaces.space import Assignment

if TYPE_CHECKING:
    import optuna

_LEAST_SHARE = 0.01  # of the budget: menus that can leave everything out reach down to 0 bytes
_BEYOND = 0.1  # the hypervolume's reference lies so far beyond the range of bytes and latency


@dataclass(frozen=True)
class NSGAOptions(ReducedOptions):
    """How the reduced space is cut and bred.

    Attributes:
        population: Trials of a generation.
        num_seeds: DP plans at so many budgets, evenly spaced in the logarithm of bytes, are
            measured first; at least 2.
        transfer_every: Every so many trials the multipliers of a point of the front are tried at
            the whole budget; 0 never does.
    """

    log_range: float = 1.0
    population: int = 20
    num_seeds: int = 8
    transfer_every: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 2 or self.num_seeds < 2:
            raise ValueError(
                "expected a population and seeds of at least 2, got "
                f"{self.population} and {self.num_seeds}"
            )
        if self.transfer_every < 0:
            raise ValueError(f"transfer_every must not be negative, got {self.transfer_every}")


_DEFAULTS = NSGAOptions()


class NSGA2(Sampled):
    """NSGA-II over multipliers of the loss table and the share of the budget.

    Args:
        setting: What to search.
        options: How the reduced space is cut and bred.

    Raises:
        ValueError: The latencies are not one finite number per option.
    """

    name: ClassVar[str] = "nsga2"
    _has_generations: ClassVar[bool] = True
    minimises_latency: ClassVar[bool] = True
    """Where the setting has any."""

    def __init__(self, setting: SearchSetting, options: NSGAOptions = _DEFAULTS) -> None:
        space = FrontSpace.from_setting(setting, options)
        _check_latency(setting.problem, setting.latency)
        num_objectives = 3 if setting.latency else 2
        super().__init__(
            setting,
            space,
            lambda: self._sampler(setting.seed, options.population, num_objectives),
            remeasure_every=options.remeasure_every,
            num_objectives=num_objectives,
        )
        self._latency = setting.latency
        self._share = space.lowest < 0
        self._transfer_every = options.transfer_every
        self._costs: dict[Assignment, list[float]] = {}
        self._moved: set[tuple[float, ...]] = set()
        self._ledger = ScaledLedger(setting)

    @property
    def front(self) -> list[FrontPoint]:
        """What no measured assignment beats in every objective, the cheapest first."""
        measured = list(self._ledger)
        if not measured:
            return []
        values = np.array([self._values(assignment) for assignment in measured])
        # bytes first, so that the order is that of bytes
        rows = nondominated(np.roll(values, -1, axis=1))
        problem = self._setting.problem
        return [
            self._ledger.front_point(measured[row], problem.total_bytes(measured[row]))
            for row in rows
        ]

    def notes(self) -> dict[str, float]:
        """The size of the front and its hypervolume.

        The hypervolume is the area, in nats, between the front and a loss that no search chooses,
        over bytes as a share of the range from the cheapest assignment to the budget, and a tenth
        beyond; a latency is a share of its own range likewise. That loss is the cheapest DP plan's,
        which every run measures among its first; before that (or where it cannot be measured) it
        is that of the setting's last start that was. So the reference is one and the same as the
        front grows, and in runs on the same problem; it moves only as far as the ledger corrects
        the difficulty of the text that the plan met.
        """
        front, reference_loss = self.front, self._reference_loss()
        if reference_loss is None:
            return {"num_front": float(len(front)), "hypervolume_nats": 0.0}
        problem = self._setting.problem
        costs: list[tuple[float, float]] = [(problem.least_bytes, problem.budget_bytes)]
        if self._latency:
            least, most = (sum(float(f(row)) for row in self._latency) for f in (np.min, np.max))
            costs.append((least, most))
        points = np.array([self._values(point.assignment) for point in front])
        for column, (low, high) in enumerate(costs, start=1):
            points[:, column] = (points[:, column] - low) / max(high - low, 1e-12)
        reference = np.array([reference_loss, *[1 + _BEYOND] * len(costs)])
        return {"num_front": float(len(front)), "hypervolume_nats": hypervolume(points, reference)}

    def _reference_loss(self) -> float | None:
        """The loss beyond which a point adds nothing to the hypervolume."""
        cheapest = self._space.decode(np.array(self._space.seeds[-1]))
        measured = set(self._ledger)
        for assignment in (cheapest, *reversed(self._setting.starts)):
            if assignment in measured:
                return self._ledger.adjusted(assignment)[0]
        return None

    def _values(self, assignment: Assignment) -> list[float]:
        if assignment not in self._costs:
            costs = [float(self._setting.problem.total_bytes(assignment))]
            if self._latency:
                rows = zip(self._latency, assignment, strict=True)
                total = sum(float(row[option]) for row, option in rows)
                costs.append(round_significant(total))  # else equal times differ by the order
            self._costs[assignment] = costs
        return [*super()._values(assignment), *self._costs[assignment]]

    def _wished(self) -> tuple[float, ...] | None:
        """In its turn, what served at another budget at the whole one, the dearest first."""
        every = self._transfer_every
        if not every or not self._share or self._num_trials % every:
            return None
        for found in reversed(self.front):
            point = self._points.get(found.assignment)
            if point is not None and (moved := (*point[:-1], 0.0)) not in self._moved:
                self._moved.add(moved)
                return moved
        return None

    def _wait_for(self, trial: optuna.trial.Trial, proposal: Proposal) -> None:
        super()._wait_for(trial, proposal)
        if (point := self._point(trial))[-1] == 0.0:
            self._moved.add(point)

    def _promising(self) -> Sequence[Assignment]:
        """The best within the whole budget, then the front from there down."""
        return [*super()._promising(), *(point.assignment for point in reversed(self.front))]

    @staticmethod
    def _sampler(seed: int, population: int, num_objectives: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(seed=seed, **_breeding(population))


class NSGA3(NSGA2):
    """NSGA-III: the same with survivors spread along reference directions; for three objectives.

    Args:
        setting: What to search.
        options: How the reduced space is cut and bred.

    Raises:
        ValueError: The latencies are not one finite number per option.
    """

    name: ClassVar[str] = "nsga3"

    @staticmethod
    def _sampler(seed: int, population: int, num_objectives: int) -> optuna.samplers.BaseSampler:
        import optuna

        # As many directions as the population can fill.
        divisions = 1
        while math.comb(divisions + num_objectives, num_objectives - 1) <= population:
            divisions += 1
        return optuna.samplers.NSGAIIISampler(
            seed=seed,
            reference_points=None,
            dividing_parameter=divisions,
            **_breeding(population),
        )


def _breeding(population: int) -> dict[str, Any]:
    """How either sampler makes a generation of the one before; ``None`` is its own strategy."""
    import optuna

    return {
        "population_size": population,
        "mutation": optuna.samplers.nsgaii.PolynomialMutation(eta=5.0),
        "mutation_prob": None,
        "crossover": optuna.samplers.nsgaii.BLXAlphaCrossover(alpha=0.5),
        "crossover_prob": 0.9,
        "swapping_prob": 0.5,  # of a crossover that is not used
        "elite_population_selection_strategy": None,
        "child_generation_strategy": None,
        "after_trial_strategy": None,
    }


@dataclass(frozen=True)
class FrontSpace:
    """The reduced space and, as its last coordinate, the logarithm of the share of the budget.

    Attributes:
        reduced: The multipliers.
        lowest: Logarithm of the least share, which is that of the cheapest assignment; 0 where
            the budget leaves no room above it, and then there is no such coordinate.
        num_seeds: DP plans along the budgets.
    """

    reduced: ReducedSpace
    lowest: float
    num_seeds: int

    @classmethod
    def from_setting(cls, setting: SearchSetting, options: NSGAOptions) -> FrontSpace:
        """Budgets from the cheapest assignment's bytes to the setting's.

        Raises:
            ValueError: A setting that no search can work on.
        """
        reduced = ReducedSpace.from_setting(setting, options)
        share = setting.problem.least_bytes / max(setting.problem.budget_bytes, 1)
        return cls(reduced, math.log(max(share, _LEAST_SHARE)), options.num_seeds)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """One per factor, and the share."""
        share = (Axis("log budget share", self.lowest, 0.0),) if self.lowest < 0 else ()
        return (*self.reduced.axes, *share)

    @property
    def seeds(self) -> tuple[tuple[float, ...], ...]:
        """The DP plans from the whole budget down to the cheapest assignment."""
        (plan,) = self.reduced.seeds
        if self.lowest == 0:
            return (plan,)
        return tuple((*plan, float(s)) for s in np.linspace(0.0, self.lowest, self.num_seeds))

    def decode(self, point: NDArray[np.float64]) -> Assignment:
        """The optimum of the multiplied table at a share of the budget."""
        if self.lowest == 0:
            return self.reduced.decode(point)
        budget = round(self.reduced.budget_bytes * math.exp(point[-1]))
        return self.reduced.decode(point[:-1], max(budget, self.reduced.least_bytes))

    def encode(self, assignment: Assignment) -> tuple[float, ...] | None:
        """The point of multipliers that decodes to nearly an assignment at its own bytes."""
        if self.lowest == 0:
            return self.reduced.encode(assignment)
        rows = zip(self.reduced.bytes, assignment, strict=True)
        spent = sum(int(cost[option]) for cost, option in rows)
        if not 0 < spent <= self.reduced.budget_bytes:
            return None
        factors = self.reduced.encode(assignment, spent)
        share = max(math.log(spent / self.reduced.budget_bytes), self.lowest)
        return None if factors is None else (*factors, share)


class ScaledLedger(Ledger):
    """A ledger for losses of very different size, compared after dividing by the DP frontier's.

    Args:
        setting: Its additive problem says by how much the least loss rises below the budget; where
            it predicts a gain instead of a loss, nothing is divided.
    """

    def __init__(self, setting: SearchSetting) -> None:
        super().__init__(setting.num_sequences)
        self._problem = setting.problem
        frontier = DynamicProgram().frontier(setting.problem)
        usual = np.interp(setting.problem.budget_bytes, frontier.bytes, frontier.losses)
        self._scale_of: dict[Assignment, float] = {}
        self._bytes = frontier.bytes
        self._scales = frontier.losses / usual if usual > 0 else np.ones(len(frontier.bytes))

    def add(self, evaluation: Evaluation) -> None:
        """Take in one evaluation; failed ones leave no trace."""
        scale = self._scale(evaluation.assignment)
        nats = tuple(value / scale for value in evaluation.sequence_nats)
        super().add(replace(evaluation, sequence_nats=nats))

    def adjusted(self, assignment: Assignment) -> tuple[float, float]:
        """Loss and standard error of an assignment in nats, as if measured on every sequence."""
        loss, error = super().adjusted(assignment)
        scale = self._scale(assignment)
        return loss * scale, error * scale

    def best(self) -> Assignment | None:
        """The least adjusted loss plus one standard error; the earliest told wins ties."""
        return min(self, key=lambda assignment: sum(self.adjusted(assignment)), default=None)

    def _scale(self, assignment: Assignment) -> float:
        """The frontier's loss at the assignment's bytes, over that at the budget; at least 1."""
        if assignment not in self._scale_of:
            size = self._problem.total_bytes(assignment)
            scale = max(float(np.interp(size, self._bytes, self._scales)), 1.0)
            self._scale_of[assignment] = scale
        return self._scale_of[assignment]


def _check_latency(problem: Problem, latency: Sequence[NDArray[np.float64]]) -> None:
    if not latency:
        return
    menus, offered = [len(cost) for cost in problem.bytes], [np.shape(row) for row in latency]
    if offered != [(size,) for size in menus] or not all(np.isfinite(r).all() for r in latency):
        raise ValueError(
            f"expected one finite latency per option of {len(menus)} units, got {len(latency)} "
            "rows; pass them for the menus that the search sees"
        )

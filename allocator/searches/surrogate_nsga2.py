"""AMQ's loop: NSGA-II on an interpolation of everything measured, and measure what it finds.

The problem: an evolution needs tens of thousands of evaluations because most of its candidates are
bad. Here it runs on predictions, which cost nothing, and only what it found is measured. Measured
assignments form an archive; a cubic radial basis function with a linear tail predicts the loss from
the options' indices; NSGA-II, started from the archive's front, minimises predicted loss and bytes.

Lee et al., "AMQ: Enabling AutoML for Mixed-precision Weight-Only Quantization of Large Language
Models", EMNLP 2025. It maps the whole front from 2 to 4 bits, and reads a budget off it. A run of
ours has one budget, and a few hundred measurements rather than ten thousand. So by default every
candidate is moved to just below the budget, the archive starts with neighbours of the starts rather
than with random assignments, mutations are small steps, and the best predicted are measured.
``SurrogateNSGA2Options.published()`` is the published loop, whole front included; in it candidates
that fill the front's gaps are measured, found one by one where AMQ evolves the subset. Its
proposals exceed the budget, its ``best`` does not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from allocator.searches.base import FrontPoint, SearchSetting
from allocator.searches.paired import PairedSearch
from allocator.searches.pareto import nondominated
from allocator.searches.population import Levels, Population, selection_order
from search_spaces.space import Assignment

_MOST_DRAWS = 100
_FIRST_SHARE = 8  # one in so many units is stepped in the first neighbours


@dataclass(frozen=True)
class SurrogateNSGA2Options:
    """Tuning of :class:`SurrogateNSGA2`.

    Attributes:
        num_initial: Assignments measured before anything is predicted, the starts not counted.
        num_candidates: Measured between two fits of the surrogate.
        population: Of NSGA-II.
        generations: Of NSGA-II, on predictions.
        crossover: Chance that an offspring mixes two parents, every unit from either.
        mutation: Chance that an offspring is mutated.
        mutated_units: Units of it that are stepped to a neighbouring option; ``None`` draws the
            options of all units anew, as published.
        smoothing: Of the interpolation, in its kernel's unit; 0 passes through every measurement.
        whole_front: Search all budgets, as published.
        pin_multiple: Pin a unit to its largest option if the table's loss of its smallest one
            exceeds so many times the median over units; ``None`` pins nothing.
        remeasure_every: Every so many proposals the best so far is measured on more text; 0 never.
    """

    num_initial: int = 40
    num_candidates: int = 4
    population: int = 48
    generations: int = 12
    crossover: float = 0.9
    mutation: float = 0.9
    mutated_units: int | None = 2
    smoothing: float = 0.0
    whole_front: bool = False
    pin_multiple: float | None = None
    remeasure_every: int = 4

    def __post_init__(self) -> None:
        units = 1 if self.mutated_units is None else self.mutated_units
        counts = (self.num_candidates, self.population, self.generations, units)
        if min(counts) < 1 or min(self.num_initial, self.remeasure_every, self.smoothing) < 0:
            raise ValueError("expected at least one candidate, individual, generation and unit")
        if not (0 <= self.crossover <= 1 and 0 <= self.mutation <= 1):
            raise ValueError(f"expected chances, got {self.crossover} and {self.mutation}")
        if self.pin_multiple is not None and not self.pin_multiple > 0:
            raise ValueError(f"expected a positive multiple, got {self.pin_multiple}")

    @classmethod
    def published(cls) -> SurrogateNSGA2Options:
        """AMQ's: 250 assignments to start with, then 200 times 50."""
        return cls(
            num_initial=250,
            num_candidates=50,
            population=200,
            generations=20,
            crossover=0.9,
            mutation=0.1,
            mutated_units=None,
            whole_front=True,
            pin_multiple=2.0,
            remeasure_every=0,
        )


_DEFAULTS = SurrogateNSGA2Options()


class SurrogateNSGA2(PairedSearch):
    """AMQ's loop as ask/tell.

    Args:
        setting: What to search.
        options: Tuning.

    Raises:
        ValueError: What is pinned leaves no assignment within the budget.
    """

    name: ClassVar[str] = "surrogate_nsga2"

    def __init__(self, setting: SearchSetting, options: SurrogateNSGA2Options = _DEFAULTS) -> None:
        super().__init__(setting, remeasure_every=options.remeasure_every)
        self._options = options
        tops = np.array([len(cost) - 1 for cost in setting.problem.bytes], np.int64)
        floors = np.where(_pinned(setting.problem, options.pin_multiple), tops, 0)
        if setting.problem.total_bytes(floors.tolist()) > setting.problem.budget_bytes:
            raise ValueError(
                "surrogate_nsga2: the pinned units leave no assignment within the budget of "
                f"{setting.problem.budget_bytes} bytes; raise pin_multiple"
            )
        self._population = Population(setting.problem, floors)
        self._queue: deque[Assignment] = deque()

    @property
    def best(self) -> Assignment | None:
        """The least loss within the budget, after removing the windows' difficulty."""
        problem = self._setting.problem
        found = self._ledger.best()
        if found is None or problem.total_bytes(found) <= problem.budget_bytes:
            return found
        fitting = [
            assignment
            for assignment in self._ledger
            if problem.total_bytes(assignment) <= problem.budget_bytes
        ]
        return min(fitting, key=lambda a: sum(self._ledger.adjusted(a)), default=None)

    @property
    def front(self) -> list[FrontPoint]:
        """What was measured and is beaten by nothing in both loss and bytes, smallest first."""
        archive = list(self._ledger)
        points = [self._point(assignment) for assignment in archive]
        rows = nondominated(np.array([(size, loss) for loss, size in points])) if points else []
        return [self._ledger.front_point(archive[i], points[i][1]) for i in rows]

    def _point(self, assignment: Assignment) -> tuple[float, int]:
        loss, _ = self._ledger.adjusted(assignment)
        return loss, self._setting.problem.total_bytes(assignment)

    def _draw(self) -> Assignment | None:
        """The design first, then what the evolution on predictions found."""
        if self._num_drawn < self._options.num_initial or len(self._ledger) < 2:
            return self._initial()
        if not self._queue:
            self._queue.extend(self._search())
        return self._queue.popleft() if self._queue else self._initial()

    def _initial(self) -> Assignment | None:
        """A new assignment: of random levels in random shares, or a neighbour of the best one."""
        population = self._population
        for _ in range(_MOST_DRAWS):
            if self._options.whole_front:
                levels = self._random_levels()
            else:
                centre = np.array([self.best or self._setting.starts[0]])
                units = max(2, centre.shape[1] // _FIRST_SHARE)
                stepped = population.step(centre, units, self._rng)
                levels = population.move_to_budget(stepped, self._rng)
            found = tuple(levels[0].tolist())
            if found not in self._asked:
                return found
        return None

    def _random_levels(self) -> Levels:
        """Every unit's level from one random distribution over levels, as AMQ's design draws."""
        floors, tops = self._population.floors, self._population.tops
        weights = self._rng.random(int(tops.max()) + 1)
        drawn = self._rng.choice(len(weights), (1, len(tops)), p=weights / weights.sum())
        return np.asarray(np.clip(drawn, floors, tops), np.int64)

    def _search(self) -> list[Assignment]:
        """NSGA-II on predictions, from the archive's front; what is new of it and worth most."""
        archive = list(self._ledger)
        points = np.array([self._point(assignment) for assignment in archive])
        order = selection_order(points) if self._options.whole_front else np.argsort(points[:, 0])
        predict = _Predictor(np.array(archive), points[:, 0], self._options.smoothing)
        count = self._options.population
        members = np.array([archive[i] for i in order[:count]], np.int64)
        for _ in range(self._options.generations):
            members = np.unique(np.vstack([members, self._offspring(members, count)]), axis=0)
            members = members[selection_order(self._scores(predict, members))[:count]]
        known = {*archive, *self._asked}
        rows = [i for i, member in enumerate(members.tolist()) if tuple(member) not in known]
        if not rows:
            return []
        scores = self._scores(predict, members[rows])
        if self._options.whole_front:
            taken = np.array([point.bytes for point in self.front], float)
            chosen = _gaps(scores[:, 1], taken, self._options.num_candidates)
        else:
            chosen = np.argsort(scores[:, 0], kind="stable")[: self._options.num_candidates]
        return [tuple(members[rows[i]].tolist()) for i in chosen]

    def _scores(self, predict: _Predictor, members: Levels) -> NDArray[np.float64]:
        """(num_members, 2) predicted loss and bytes."""
        return np.column_stack([predict(members), self._population.bytes(members)])

    def _offspring(self, ranked: Levels, count: int) -> Levels:
        """Binary tournaments, uniform crossover, mutation; parents are in order of fitness."""
        rng, options, population = self._rng, self._options, self._population
        first, second = ranked[rng.integers(len(ranked), size=(2, count, 2)).min(axis=2)]
        mixed = (rng.random(count) < options.crossover)[:, None]
        children = np.where(mixed & (rng.random(first.shape) < 0.5), second, first)
        if options.mutated_units is None:
            mutants = rng.integers(population.floors, population.tops + 1, children.shape)
        else:
            mutants = population.step(children, options.mutated_units, rng)
        mutated = (rng.random(count) < options.mutation)[:, None]
        children = np.where(mutated, mutants, children)
        children = np.clip(children, population.floors, population.tops)
        return children if options.whole_front else population.move_to_budget(children, rng)


class _Predictor:
    """Loss from option indices: a cubic radial basis function with a linear tail.

    Units that never varied carry nothing and are left out. While there are too few measurements to
    fix the linear tail the kernel is linear and the tail a constant.
    """

    def __init__(self, levels: Levels, losses: NDArray[np.float64], smoothing: float) -> None:
        from scipy.interpolate import RBFInterpolator  # slow to load

        self._varied = np.flatnonzero(np.ptp(levels, axis=0))
        used = levels[:, self._varied].astype(float)
        tail = np.column_stack([np.ones(len(used)), used])
        determined = len(used) > tail.shape[1] and np.linalg.matrix_rank(tail) == tail.shape[1]
        self._fit = RBFInterpolator(
            used,
            losses,
            kernel="cubic" if determined else "linear",
            degree=1 if determined else 0,
            smoothing=smoothing,
        )

    def __call__(self, levels: Levels) -> NDArray[np.float64]:
        return np.asarray(self._fit(levels[:, self._varied].astype(float)), np.float64)


def _pinned(problem: Problem, multiple: float | None) -> NDArray[np.bool_]:
    """Units whose smallest option the table calls so much worse than that of the median unit."""
    worst = np.array([float(losses[0]) for losses in problem.losses])
    if multiple is None:
        return np.zeros(len(worst), bool)
    return np.asarray(worst > multiple * np.median(worst))


def _gaps(sizes: NDArray[np.float64], taken: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of candidates whose bytes lie farthest from what is taken or chosen, one by one."""
    nearest = np.abs(sizes[:, None] - taken[None, :]).min(axis=1, initial=np.inf)
    chosen: list[int] = []
    for _ in range(min(count, len(sizes))):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.abs(sizes - sizes[chosen[-1]]))
        nearest[chosen[-1]] = -1.0
    return np.array(chosen, np.int64)

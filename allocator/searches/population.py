"""Many assignments at once, as an inner evolution needs them: bytes, the budget, and who survives.

The steps are those of :mod:`allocator.searches.repair`, taken by every assignment of a population
in one array operation. Survival is NSGA-II's: Deb et al., "A fast and elitist multiobjective
genetic algorithm", IEEE Transactions on Evolutionary Computation 6 (2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem

Levels = NDArray[np.int64]
"""(num_assignments, num_units) option indices."""

Vector = NDArray[np.float64]


class Population:
    """Operations on arrays of assignments of one problem.

    Args:
        problem: Bytes and budget.
        floors: (num_units,) least option index of each unit; together they fit the budget.

    Attributes:
        floors: The same.
        tops: (num_units,) greatest option index of each unit.
    """

    def __init__(self, problem: Problem, floors: Levels) -> None:
        self.floors = floors
        self.tops = np.array([len(cost) - 1 for cost in problem.bytes], np.int64)
        self._units = np.arange(len(self.tops))
        self._budget = problem.budget_bytes
        self._prices = np.zeros((len(self.tops), int(self.tops.max()) + 1), np.int64)
        for unit, cost in enumerate(problem.bytes):
            self._prices[unit, : len(cost)] = cost

    def bytes(self, levels: Levels) -> NDArray[np.int64]:
        """(num_assignments,) exact bytes."""
        return np.asarray(self._prices[self._units, levels].sum(axis=1), np.int64)

    def move_to_budget(self, levels: Levels, rng: np.random.Generator) -> Levels:
        """Step random units down until all fit, then up until no step fits any more."""
        levels = levels.copy()
        slack = self._budget - self.bytes(levels)
        while (rows := np.flatnonzero(slack < 0)).size:
            units = _pick(levels[rows] > self.floors, rng)
            old = levels[rows, units]
            slack[rows] += self._prices[units, old] - self._prices[units, old - 1]
            levels[rows, units] -= 1
        while True:
            above = np.minimum(levels + 1, self.tops)
            steps = self._prices[self._units, above] - self._prices[self._units, levels]
            able = (levels < self.tops) & (steps <= slack[:, None])
            rows = np.flatnonzero(able.any(axis=1))
            if not rows.size:
                return levels
            units = _pick(able[rows], rng)
            slack[rows] -= steps[rows, units]
            levels[rows, units] += 1

    def step(self, levels: Levels, num_units: int, rng: np.random.Generator) -> Levels:
        """A copy in which so many units of each assignment are one option up or down."""
        free = np.flatnonzero(self.floors < self.tops)
        draws = rng.random((len(levels), len(free)))
        units = free[np.argsort(draws, axis=1)[:, :num_units]]
        stepped = levels.copy()
        rows = np.arange(len(levels))[:, None]
        stepped[rows, units] += rng.choice((-1, 1), units.shape)
        return np.asarray(np.clip(stepped, self.floors, self.tops), np.int64)


def fronts(points: Vector) -> NDArray[np.int64]:
    """The rank of each point's front: 0 where none dominates it, 1 once those are gone, and so on.

    Args:
        points: (num_points, num_objectives) to minimise; equal points share a front.
    """
    no_worse = np.asarray((points[:, None, :] <= points[None, :, :]).all(axis=-1))
    dominates = no_worse & ~no_worse.T
    ranks = np.full(len(points), -1, np.int64)
    left = np.ones(len(points), bool)
    rank = 0
    while left.any():
        first = left & ~dominates[left].any(axis=0)
        ranks[first] = rank
        left &= ~first
        rank += 1
    return ranks


def crowding(points: Vector, ranks: NDArray[np.int64]) -> Vector:
    """How far each point's neighbours in its front lie apart; infinite at a front's ends."""
    distances = np.zeros(len(points))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        members = np.flatnonzero(ranks == rank)
        for column in points[members].T:
            order = members[np.argsort(column, kind="stable")]
            values = np.sort(column)
            span = float(values[-1] - values[0])
            distances[order[[0, -1]]] = np.inf
            if span > 0:
                distances[order[1:-1]] += (values[2:] - values[:-2]) / span
    return distances


def selection_order(points: Vector) -> NDArray[np.int64]:
    """Indices of the points, those that survive first: by front, then the lonelier first."""
    ranks = fronts(points)
    return np.asarray(np.lexsort((-crowding(points, ranks), ranks)), np.int64)


def _pick(able: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each row the index of one that is able, each with equal chance; at least one is."""
    return np.asarray((able * (rng.random(able.shape) + 1)).argmax(axis=1), np.int64)

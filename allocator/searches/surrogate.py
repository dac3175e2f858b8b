"""A Bayesian linear surrogate of the measured loss, built on an additive loss table.

The problem: the table's cells are wrong by factors, and a few hundred noisy measurements of whole
assignments must correct a thousand of them. The loss of an assignment is modelled as a sum over
units of ``prior cell x (1 + corrections)``, where the corrections are shared at several levels (all
cells, an option, a projection class at an option, a block at an option, a unit, one cell), each
with its own prior spread. What cannot be learned about one cell is then learned about its
relatives, and the rest stays at the prior. Options are known by name: menus of units of other
shapes have them in other places. Pairs of units have pooled corrections too, which count linearised
at a given assignment, so that an exact solver can still decode the table. Everything is Gaussian:
posteriors are exact, and a posterior sample of the whole table is one small linear solve
(Matheron's rule).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.searches.interactions import Interactions
from search_spaces.space import Assignment

Vector = NDArray[np.float64]
_LEAST_NOISE = 1e-3
_LEAST_VARIANCE = 1e-10  # of the reference's loss, squared


@dataclass(frozen=True)
class Spreads:
    """Prior standard deviations.

    Those of cells are relative to a cell's prior loss; ``offset`` and ``misfit`` are relative to
    the loss of the reference assignment.

    Attributes:
        overall: Of a factor common to all cells.
        option: Of a factor for an option.
        kind: Of a factor for a projection class at an option.
        depth: Of a factor for a block at an option.
        unit: Of a factor for a unit.
        cell: Of a factor for one option of one unit.
        pair: Of the weight of a pooled product of two units' deviations.
        offset: Of a constant: what no cell explains.
        misfit: Of the part of one assignment's loss that neither cells nor pairs explain.
        noise: Factor of the measurements' stated deviations.
    """

    overall: float = 0.2
    option: float = 0.3
    kind: float = 0.3
    depth: float = 0.3
    unit: float = 0.3
    cell: float = 0.3
    pair: float = 0.1
    offset: float = 0.2
    misfit: float = 0.05
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"spreads: {name} must be finite and at least 0, got {value}")
        if self.noise < _LEAST_NOISE:
            raise ValueError(
                f"spreads: noise must be at least {_LEAST_NOISE:g}, since measurements are not "
                f"exact, got {self.noise}"
            )

    def scaled(self, *, corrections: float, pairs: float, misfits: float, noise: float) -> Spreads:
        """With the cells' corrections, pairs, misfit and noise multiplied."""
        return replace(
            self,
            option=self.option * corrections,
            kind=self.kind * corrections,
            depth=self.depth * corrections,
            unit=self.unit * corrections,
            cell=self.cell * corrections,
            pair=self.pair * pairs,
            misfit=self.misfit * misfits,
            noise=max(self.noise * noise, _LEAST_NOISE),
        )


_LEVELS = ("overall", "option", "kind", "depth", "unit", "cell")
_FIRST_ROOM = 64  # measurements
_FRESH_EVERY = 64
_GRID = {
    "corrections": (0.5, 1.0, 2.0),
    "pairs": (0.0, 1.0, 3.0),
    "misfits": (0.2, 0.5, 1.0, 2.0),
    "noise": (0.5, 1.0, 2.0),
}
_ROUNDS = 2  # over the grid's dimensions, one at a time
_UNTUNED = {"corrections": 1.0, "pairs": 0.0, "misfits": 1.0, "noise": 1.0}
_PAIRS_EVIDENCE = 3.0  # nats; interactions that are weaker than that cost more than they teach


@dataclass(frozen=True)
class Observation:
    """A measured loss of an assignment, comparable across observations, and its variance."""

    assignment: Assignment
    loss: float
    variance: float


class Relatives(NamedTuple):
    """What cells have in common.

    Attributes:
        kinds: For each unit its projection class.
        depths: For each unit its block.
        labels: For each unit the names of its options; empty for their places.
    """

    kinds: Sequence[str]
    depths: Sequence[int]
    labels: Sequence[Sequence[str]] = ()


class Surrogate:
    """Posterior over the cells' losses given measured assignments.

    Args:
        cells: For each unit a (num_options,) array of prior losses, in the unit of measured losses.
        relatives: What cells have in common.
        reference: The assignment that pairs' deviations are counted from.
        reference_loss: Its measured loss, that ``offset`` and ``misfit`` are relative to.
        spreads: Prior standard deviations.
    """

    def __init__(
        self,
        cells: Sequence[Vector],
        relatives: Relatives,
        *,
        reference: Assignment,
        reference_loss: float,
        spreads: Spreads,
    ) -> None:
        kinds, depths, labels = relatives
        self._interactions = Interactions(cells, kinds, depths, reference)
        self._starts = np.concatenate([[0], np.cumsum([len(row) for row in cells])])
        self._prior = np.concatenate(cells)
        unit_of = np.repeat(np.arange(len(cells)), [len(row) for row in cells])
        names = labels or [[str(o) for o in range(len(row))] for row in cells]
        options = [(u, name) for u, row in enumerate(names) for name in row]
        groups = (
            np.zeros_like(unit_of),
            _number([(name,) for _, name in options]),
            _number([(kinds[u], name) for u, name in options]),
            _number([(depths[u], name) for u, name in options]),
            unit_of,
            np.arange(len(unit_of)),
        )
        self._groups = [(index, int(index.max()) + 1) for index in groups]
        self._begins = np.concatenate([[0], np.cumsum([size for _, size in self._groups])])
        self._base = spreads
        self._reference_loss = reference_loss
        self._variances: Vector
        self._misfit: float
        self._noise_factor: float
        self._observations: list[Observation] = []
        self._rows: dict[Assignment, int] = {}
        self._distinct: list[int] = []
        num_features = int(self._begins[-1]) + self._interactions.num_features + 1
        self._room: Vector = np.empty((_FIRST_ROOM, num_features))  # grows in doubling steps
        self._kernel: Vector = np.empty((0, 0))
        self._inverse: Vector = np.empty((0, 0))
        self._posterior: tuple[Vector, Vector] | None = None
        self._spread(spreads.scaled(**_UNTUNED))

    @property
    def num_observations(self) -> int:
        """Measurements taken in."""
        return len(self._observations)

    def add(self, observation: Observation) -> None:
        """Take in one measurement."""
        row = self._feature_row(observation.assignment)
        count = len(self._observations)
        if count == len(self._room):
            self._room = np.vstack([self._room, np.empty_like(self._room)])
        self._room[count] = row
        self._distinct.append(self._rows.setdefault(observation.assignment, len(self._rows)))
        self._observations.append(observation)
        kernel = self._features @ (self._variances * row)
        self._kernel = _bordered(self._kernel, kernel[:-1], float(kernel[-1]))
        if len(self._observations) % _FRESH_EVERY:
            self._extend_inverse()
        else:
            self._invert()  # rounding errors do not pile up
        self._posterior = None

    @property
    def _features(self) -> Vector:
        """(num_observations, num_features) one row per measurement."""
        return self._room[: len(self._observations)]

    def tune(self) -> None:
        """Choose how far to trust the prior, and misfit, by the evidence of what was measured.

        The log marginal likelihood of the observations is maximised over a small grid, one
        dimension after the other: with few observations the prior wins, with many the data do.
        Pairs count nothing before the evidence clearly asks for them.
        """
        chosen = dict(_UNTUNED)
        for name in [*_GRID] * _ROUNDS:
            evidence = []
            for value in _GRID[name]:
                self._spread(self._base.scaled(**{**chosen, name: value}))
                handicap = _PAIRS_EVIDENCE if name == "pairs" and value > 0 else 0.0
                evidence.append(self._log_evidence() - handicap)
            chosen[name] = _GRID[name][int(np.argmax(evidence))]
        self._spread(self._base.scaled(**chosen))

    def table(
        self,
        rng: np.random.Generator | None = None,
        *,
        temperature: float = 1.0,
        centre: Assignment | None = None,
    ) -> list[Vector]:
        """Cells' losses: the posterior mean, or a posterior sample when given a generator.

        Args:
            rng: Draws the sample.
            temperature: Scales the sample's deviation from the posterior mean.
            centre: Pairs count as they do for one change of this assignment, exactly; ``None``
                for the reference, where they count nothing.
        """
        weights = self._correction(np.zeros(len(self._variances)), None)
        if rng is not None:
            prior = rng.normal(size=len(weights)) * np.sqrt(self._variances)
            drawn = prior + self._correction(prior, rng)
            weights += temperature * (drawn - weights)
        factors = np.ones(len(self._prior))
        for (index, _), begin in zip(self._groups, self._begins, strict=False):
            factors += weights[begin + index]
        cells = np.split(self._prior * np.clip(factors, 0.05, 20.0), self._starts[1:-1])
        if centre is None:
            return cells
        slopes = self._interactions.slopes(weights[self._begins[-1] : -1], centre)
        return [row + slope for row, slope in zip(cells, slopes, strict=True)]

    def best(self) -> tuple[Assignment, float, float] | None:
        """The measured assignment of least posterior mean, with that mean and its deviation."""
        if not self._observations:
            return None
        means, deviations = self._posterior_at_observed()
        index = int(np.argmin(means + 0.5 * deviations))
        return list(self._rows)[index], float(means[index]), float(deviations[index])

    def ranked(self) -> list[Assignment]:
        """Measured assignments by posterior mean, least first."""
        means, _ = self._posterior_at_observed()
        known = list(self._rows)
        return [known[i] for i in np.argsort(means, kind="stable")]

    def _spread(self, spreads: Spreads) -> None:
        """Use these prior deviations from now on."""
        relative = (
            spreads.overall,
            spreads.option,
            spreads.kind,
            spreads.depth,
            spreads.unit,
            spreads.cell,
        )
        sizes = [size for _, size in self._groups]
        scales = [np.full(size, spread) for size, spread in zip(sizes, relative, strict=True)]
        pairs = np.full(self._interactions.num_features, spreads.pair)
        offset = np.array([spreads.offset * self._reference_loss])
        self._variances = np.concatenate([*scales, pairs, offset]) ** 2
        self._misfit = (spreads.misfit * self._reference_loss) ** 2
        self._noise_factor = spreads.noise**2
        self._kernel = (self._features * self._variances) @ self._features.T
        self._invert()
        self._posterior = None

    def _log_evidence(self) -> float:
        """Log marginal likelihood of the observations, up to a constant."""
        residual = self._residual()
        _, log_determinant = np.linalg.slogdet(self._inverse)
        return float(0.5 * (log_determinant - residual @ self._inverse @ residual))

    def _posterior_at_observed(self) -> tuple[Vector, Vector]:
        """Posterior mean and deviation of each distinct assignment's true loss."""
        if self._posterior is None:
            first = np.unique(self._distinct, return_index=True)[1]
            same = np.array(self._distinct)[None, :] == np.arange(len(first))[:, None]
            covariance = self._kernel[first] + self._misfit * same
            explained = covariance @ self._inverse
            means = self._prior_loss(self._features[first]) + explained @ self._residual()
            own = self._kernel[first, first] + self._misfit
            reduction = (explained * covariance).sum(1)
            self._posterior = means, np.sqrt(np.maximum(own - reduction, 0.0))
        return self._posterior

    def _correction(self, weights: Vector, rng: np.random.Generator | None) -> Vector:
        """What the data add to a prior draw of the weights (Matheron's rule)."""
        if not self._observations:
            return np.zeros_like(weights)
        residual = self._residual()
        if rng is not None:
            noise = np.sqrt([self._noise_of(o) for o in self._observations])
            misfit = rng.normal(size=len(self._rows)) * np.sqrt(self._misfit)
            drawn = self._features @ weights + misfit[self._distinct]
            residual = residual - drawn - rng.normal(size=len(noise)) * noise
        correction: Vector = self._variances * (self._features.T @ (self._inverse @ residual))
        return correction

    def _residual(self) -> Vector:
        """What the prior mean leaves unexplained of each measurement."""
        losses = np.array([o.loss for o in self._observations])
        return losses - self._prior_loss(self._features)

    def _invert(self) -> None:
        """The inverse covariance of the measurements, from scratch."""
        distinct = np.array(self._distinct)
        covariance = self._kernel + self._misfit * (distinct[:, None] == distinct[None, :])
        covariance += np.diag([self._noise_of(o) for o in self._observations])
        self._inverse = np.asarray(np.linalg.inv(covariance), np.float64)

    def _extend_inverse(self) -> None:
        """The inverse with one more measurement, by the inverse of a bordered matrix."""
        *others, latest = self._distinct
        same = np.array(others) == latest
        border = self._kernel[-1, :-1] + self._misfit * same
        noise = self._noise_of(self._observations[-1])
        corner = self._kernel[-1, -1] + self._misfit + noise
        solved = self._inverse @ border
        left = float(corner - border @ solved)
        if left < noise:  # that can only be rounding, which would grow from here on
            self._invert()
            return
        grown = self._inverse + np.outer(solved, solved) / left
        self._inverse = _bordered(grown, -solved / left, 1 / left)

    def _noise_of(self, observation: Observation) -> float:
        """Variance of a measurement; inverses would drown in rounding if it were next to none."""
        least = _LEAST_VARIANCE * self._reference_loss**2
        return max(observation.variance * self._noise_factor, least)

    def _prior_loss(self, features: Vector) -> Vector:
        """The prior mean: the table's own sum, which is the feature of the overall factor."""
        total: Vector = features[:, 0]
        return total

    def _feature_row(self, assignment: Assignment) -> Vector:
        """Prior losses of the chosen cells by group; pairs; the last feature is the offset."""
        chosen = self._starts[:-1] + np.array(assignment)
        losses = self._prior[chosen]
        parts = [
            np.bincount(index[chosen], weights=losses, minlength=size)
            for index, size in self._groups
        ]
        return np.concatenate([*parts, self._interactions.features(assignment), [1.0]])


def _bordered(matrix: Vector, border: Vector, corner: float) -> Vector:
    """A symmetric matrix with one more row and column."""
    grown = np.empty((len(matrix) + 1, len(matrix) + 1))
    grown[:-1, :-1] = matrix
    grown[-1, :-1] = grown[:-1, -1] = border
    grown[-1, -1] = corner
    return grown


def _number(keys: Sequence[tuple[str | int, ...]]) -> NDArray[np.int64]:
    """Consecutive numbers for equal keys, in the order of first appearance."""
    seen: dict[tuple[str | int, ...], int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)

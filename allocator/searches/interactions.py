"""What pairs of units do to each other: features of an assignment beyond the sum of its cells.

The problem: a block whose matrices are all coarse loses more, or less, than each of them alone, and
so do neighbouring blocks. All pairs are too many to learn from a few hundred noisy measurements. So
each pair's product of deviations is pooled twice: over all blocks by the two projection classes,
and over all classes by the block. Pairs lie within a block (different classes) or between a block
and the next.

Deviations are those of the prior losses from a reference assignment's, in units of the root of the
unit's smallest step, so that a product is a loss again and matrices of all sizes weigh alike. At
the reference every feature is zero: there the additive table speaks alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search_spaces.space import Assignment

Vector = NDArray[np.float64]


class Interactions:
    """Pooled products of deviations, and their slope at an assignment.

    Args:
        cells: For each unit a (num_options,) array of prior losses.
        kinds: For each unit its projection class.
        depths: For each unit its block; negative for none, which interacts with nothing.
        reference: Where deviations are zero.
    """

    def __init__(
        self,
        cells: Sequence[Vector],
        kinds: Sequence[str],
        depths: Sequence[int],
        reference: Assignment,
    ) -> None:
        self._deviations = [_deviations(row, i) for row, i in zip(cells, reference, strict=True)]
        blocks = sorted({depth for depth in depths if depth >= 0})
        placed = [(unit, depth) for unit, depth in enumerate(depths) if depth >= 0]
        classes = sorted({kinds[unit] for unit, _ in placed})
        self._shape = len(blocks), len(classes)
        self._units = np.array([unit for unit, _ in placed], np.int64)
        self._blocks = np.array([blocks.index(depth) for _, depth in placed], np.int64)
        self._classes = np.array([classes.index(kinds[unit]) for unit, _ in placed], np.int64)
        self._adjacent = np.diff(blocks) == 1
        self._upper = np.triu_indices(len(classes), 1)

    @property
    def num_features(self) -> int:
        """Pairs of classes within a block, blocks, ordered pairs of classes, pairs of blocks."""
        num_blocks, num_classes = self._shape
        return len(self._upper[0]) + num_blocks + num_classes**2 + len(self._adjacent)

    def features(self, assignment: Assignment) -> Vector:
        """(num_features,) pooled products, in the unit of the cells."""
        sums = self._sums(assignment)
        before, after = sums[:-1] * self._adjacent[:, None], sums[1:]
        within = 0.5 * (sums.sum(1) ** 2 - (sums**2).sum(1))
        between = before.sum(1) * after.sum(1)
        pairs = (sums.T @ sums)[self._upper]
        return np.concatenate([pairs, within, (before.T @ after).ravel(), between])

    def slopes(self, weights: Vector, centre: Assignment) -> list[Vector]:
        """What each option of each unit adds if all other units stay as in ``centre``.

        Args:
            weights: (num_features,) of the features.
            centre: Option index of each unit.

        Returns:
            For each unit a (num_options,) array, up to a constant of the unit.
        """
        num_blocks, num_classes = self._shape
        ends = np.cumsum([len(self._upper[0]), num_blocks, num_classes**2])
        pairs, within, ordered, between = np.split(weights, ends)
        symmetric = np.zeros((num_classes, num_classes))
        symmetric[self._upper] = pairs
        symmetric += symmetric.T
        ordered = ordered.reshape(num_classes, num_classes)
        sums = self._sums(centre)
        slope = sums @ symmetric + within[:, None] * (sums.sum(1, keepdims=True) - sums)
        before, after = sums[:-1] * self._adjacent[:, None], sums[1:] * self._adjacent[:, None]
        slope[:-1] += after @ ordered.T + (between * after.sum(1))[:, None]
        slope[1:] += before @ ordered + (between * before.sum(1))[:, None]
        found = [np.zeros_like(row) for row in self._deviations]
        for unit, value in zip(self._units, slope[self._blocks, self._classes], strict=True):
            found[unit] = self._deviations[unit] * value
        return found

    def _sums(self, assignment: Assignment) -> Vector:
        """(num_blocks, num_classes) deviations."""
        sums = np.zeros(self._shape)
        chosen = np.array([self._deviations[u][assignment[u]] for u in self._units])
        np.add.at(sums, (self._blocks, self._classes), chosen)
        return sums


def _deviations(row: Vector, reference: int) -> Vector:
    """From the reference's option, divided by the root of the smallest step next to it."""
    away = row - row[reference]
    steps = np.abs(away[away != 0])
    found: Vector = away / np.sqrt(steps.min()) if len(steps) else away
    return found

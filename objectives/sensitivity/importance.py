"""Importances: what the published one-shot heuristics know of a unit, as scorers.

The problem: OWL, AlphaPruning, ATP, MoDeGPT, ER, LAMP and their kin give no losses. They give each
block or matrix one number and map the numbers to ratios at a wanted mean. Both are offered here.
``ratios`` is the published mapping, made exact in its weighted mean, from which
``allocator.ratio_plans.published_plan`` makes the published plan. ``losses`` makes an additive
table for the exact solver, importance times relative weight error, which is our reading and no
paper's: it ranks options and has no unit that could be compared with a measured loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from objectives.mappers import Ratios, box_project
from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.sensitivity.relative_error import RelativeError
from search_spaces.operators.members import logical
from search_spaces.space import Member, SearchSpace

Importances = NDArray[np.float64]
"""(num_units,) or (num_blocks,), not negative; larger: worth keeping more."""


class ImportanceScorer(Scorer):
    """One number per unit, a mapping to ratios, and a table made of the numbers.

    A subclass says ``measure`` and ``map_ratios``; caches, checks and exact means are seen to here.
    """

    unit: ClassVar[str] = "weighted_relative_mse"
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def measure(self, context: ScoringContext) -> Importances:
        """(num_units,) importance of each unit, not negative; larger is worth keeping more."""

    @abstractmethod
    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """(num_units,) share of its weights that each unit loses, as published."""

    def importances(self, context: ScoringContext) -> Importances:
        """(num_units,) importance of each unit, not negative; larger is worth keeping more.

        Raises:
            ValueError: A unit is a cache, or the method cannot serve this space or this model.
        """
        self.refuse_caches(context.space)
        found = np.asarray(self.measure(context), dtype=float)
        assert found.shape == (len(context.space.units),), self.name
        for unit, value in zip(context.space.units, found, strict=True):
            if not np.isfinite(value):
                raise ValueError(
                    f"the {self.name} importance of {unit.name} is {value}; "
                    "its weights or statistics are not finite"
                )
        assert (found >= 0).all(), self.name
        return found

    def ratios(self, importances: ArrayLike, space: SearchSpace, removed: float) -> Ratios:
        """The published ratios, shifted and clipped to 0 to 1 so that their weighted mean is met.

        Args:
            importances: (num_units,) of :meth:`importances`.
            space: Units of those importances; their weights weigh the mean.
            removed: Wanted mean, 0 to 1.

        Returns:
            (num_units,) share of its weights that each unit loses.

        Raises:
            ValueError: A unit is a cache, the mean is outside 0 to 1, or the importances are not
                one per unit.
        """
        self.refuse_caches(space)
        values = np.asarray(importances, dtype=float)
        if values.shape != (len(space.units),):
            raise ValueError(f"expected {len(space.units)} importances, got shape {values.shape}")
        if not 0 <= removed <= 1:
            raise ValueError(f"expected a removed share of 0 to 1, got {removed}")
        mapped = self.map_ratios(values, space, removed)
        return box_project(mapped, unit_sizes(space), removed, most=1.0)

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """Cell after cell, from importances that are measured once."""
        importances = self.importances(context)
        return (self.loss(context, u, o, float(importances[u])) for u, o in cells)

    def loss(self, context: ScoringContext, unit: int, option: int, importance: float) -> float:
        """Importance times relative weight error: our reading, to rank by."""
        return importance * RelativeError().cell(context, unit, option)

    def refuse_caches(self, space: SearchSpace) -> None:
        """Refuse a space with caches, of whose weights there is nothing to say."""
        for unit in space.units:
            if unit.is_cache:
                raise ValueError(
                    f"scorer {self.name}: {unit.name} is a cache, which has no weights; "
                    "search the weights alone or take another scorer"
                )


class BlockImportanceScorer(ImportanceScorer):
    """One number per block, copied to its units; units outside blocks get the mean.

    The mapping sees the blocks that hold searched units, in the order of depth. Units outside
    blocks lose the wanted mean.
    """

    @abstractmethod
    def measure_blocks(self, context: ScoringContext) -> Importances:
        """(num_blocks,) importance of each block, in the order of depth."""

    @abstractmethod
    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """(num_blocks,) share of its weights that each block loses.

        Args:
            importances: (num_blocks,) in the order of depth.
            sizes: (num_blocks,) searched weights of each block.
            removed: Wanted mean.
        """

    def measure(self, context: ScoringContext) -> Importances:
        """The blocks' importances copied to their units.

        Raises:
            ValueError: No unit sits in a block.
        """
        blocks = units_by_block(context.space)
        if not blocks:
            raise ValueError(
                f"scorer {self.name}: none of the {len(context.space.units)} units sits in a "
                "block; it speaks of blocks only"
            )
        return _copied(self.measure_blocks(context), blocks, len(context.space.units))

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """The blocks' ratios copied to their units."""
        blocks, weights = units_by_block(space), unit_sizes(space)
        own = np.array([importances[units[0]] for units in blocks])
        sizes = np.array([weights[units].sum() for units in blocks])
        ratios = self.map_blocks(own, sizes, removed)
        return _copied(ratios, blocks, len(space.units), outside=removed)


def units_by_block(space: SearchSpace) -> list[list[int]]:
    """Indices of the units of each block, blocks in the order of depth."""
    depths = sorted({unit.depth for unit in space.units if unit.depth is not None})
    return [[i for i, u in enumerate(space.units) if u.depth == depth] for depth in depths]


def unit_sizes(space: SearchSpace) -> Ratios:
    """(num_units,) weights of each unit."""
    return np.array([unit.num_weights for unit in space.units], dtype=float)


def dense_matrices(context: ScoringContext, unit: int) -> Iterator[tuple[Member, Tensor]]:
    """Each matrix of a unit, a stack's one by one: its parameter, (rows, columns) float32."""
    members = context.space.units[unit].members
    for member, dense in zip(members, context.bank.dense(unit), strict=True):
        for matrix in logical(dense, member):
            yield member, matrix.detach().float()


def proportional_ratios(shares: ArrayLike, sizes: ArrayLike, removed: float) -> Ratios:
    """Keep in proportion to the shares, at most everything; the excess goes to the others.

    Args:
        shares: (num_units,) positive; what to keep of each weight, up to one factor for all.
        sizes: (num_units,) weights.
        removed: Weighted mean of the result.
    """
    wanted, weights = np.asarray(shares, dtype=float), np.asarray(sizes, dtype=float)
    kept, free = np.ones(len(wanted)), np.ones(len(wanted), bool)
    needed = (1 - removed) * weights.sum()
    while free.any():
        left = needed - weights[~free].sum()
        kept[free] = wanted[free] * left / (weights[free] @ wanted[free])
        over = free & (kept > 1)
        if not over.any():
            break
        kept[over] = 1.0
        free &= ~over
    return np.asarray(1 - kept)


def _copied(
    values: Ratios, blocks: Sequence[Sequence[int]], num_units: int, outside: float | None = None
) -> Ratios:
    """A number per block as a number per unit; the plain mean, if not told, outside blocks."""
    assert len(values) == len(blocks)
    copied = np.full(num_units, values.mean() if outside is None else outside, dtype=float)
    for value, units in zip(values, blocks, strict=True):
        copied[units] = value
    return copied

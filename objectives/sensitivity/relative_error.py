"""Relative weight error: how much of a matrix's energy compression loses. Needs no data.

Of a cache it is the relative error of the states that attention reads, which does need data.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from objectives.sensitivity.base import CellScorer, ScoringContext


class RelativeError(CellScorer):
    """``sum (W - W')^2 / sum W^2``, summed over a unit's parameters."""

    name: ClassVar[str] = "relative_error"
    unit: ClassVar[str] = "relative_mse"
    needs: ClassVar[frozenset[str]] = frozenset()

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Relative squared error of one option."""
        if (cached := context.cache_loss(unit, option)) is not None:
            return cached.relative_error
        total = 0.0
        for _, weight, error, _ in context.errors(unit, option):
            energy = float(weight.square().sum(dtype=torch.float64))
            lost = float(error.square().sum(dtype=torch.float64))
            total += lost / energy if energy != 0 else 0.0  # NaN stays NaN
        return total

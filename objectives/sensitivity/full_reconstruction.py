"""Reconstruction with correlated inputs: the exact squared error of a matrix's outputs.

With ``H`` the second moment of the inputs over calibration tokens, the mean squared output error is
``tr(E H E')`` for the weight error ``E``, the objective of GPTQ and SparseGPT; it is divided by the
mean squared output ``tr(W H W')``. The diagonal of ``H`` alone, which ``reconstruction`` reads,
misses errors that cancel, or add up, because features move together. Keys and values are outputs of
projections themselves: of a cache it is their relative squared error.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from objectives.sensitivity.base import CellScorer, ScoringContext


class FullReconstruction(CellScorer):
    """``tr(E H E') / tr(W H W')`` summed over the members."""

    name: ClassVar[str] = "full_reconstruction"
    unit: ClassVar[str] = "relative_output_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Relative squared output error of one option.

        Raises:
            ValueError: The inputs of a parameter could not be observed.
        """
        if (cached := context.cache_loss(unit, option)) is not None:
            return cached.relative_error
        total = 0.0
        for member, weight, error, stats in context.errors(unit, option):
            if stats.hessian is None:
                raise ValueError(
                    f"scorer full_reconstruction: the inputs of {member.name} cannot be observed; "
                    "exclude it or use the fisher scorer"
                )
            hessian = stats.hessian.to(error.device)
            energy = _trace(weight, hessian)
            # NaN stays NaN
            total += _trace(error, hessian) / energy if energy != 0 else 0.0
        return total


def _trace(matrices: Tensor, hessian: Tensor) -> float:
    """``tr(M H M')``; rounding may put what the inputs never excite below zero."""
    return max(float(((matrices @ hessian) * matrices).sum(dtype=torch.float64)), 0.0)

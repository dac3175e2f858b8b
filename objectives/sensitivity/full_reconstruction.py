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

from objectives.sensitivity.reconstruction import Reconstruction
from search_spaces.operators import Statistics


class FullReconstruction(Reconstruction):
    """``tr(E H E') / tr(W H W')`` summed over the members."""

    name: ClassVar[str] = "full_reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @staticmethod
    def _moment(statistics: Statistics) -> Tensor | None:
        return statistics.hessian

    @staticmethod
    def _energy(matrices: Tensor, moment: Tensor) -> float:
        """``tr(M H M')``; rounding may put what the inputs never excite below zero."""
        return max(float(((matrices @ moment) * matrices).sum(dtype=torch.float64)), 0.0)

"""Erdos-Renyi densities: small matrices and kernels keep a larger share.

SET (Mocanu et al., 2018) keeps weights in proportion to ``(n_in + n_out) / (n_in n_out)``, and
RigL's ERK (2020) adds the sides of a kernel to the sum and the product. What would exceed dense is
dense, and the rest is scaled again. Matrices outside blocks have densities like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from objectives.mappers import Ratios
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import (
    Importances,
    ImportanceScorer,
    proportional_ratios,
    unit_sizes,
)
from search_spaces.space import SearchSpace, Unit


@dataclass(frozen=True)
class ErdosRenyi(ImportanceScorer):
    """Density by shape alone. Each expert of a stack is a matrix of its own."""

    name: ClassVar[str] = "erdos_renyi"

    def measure(self, context: ScoringContext) -> Importances:
        """Density of each unit, up to one factor for all."""
        return np.array([_unit_density(unit) for unit in context.space.units])

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """Scaled to the mean and capped at dense: a larger density, keep more."""
        return proportional_ratios(importances, unit_sizes(space), removed)


def density(shape: tuple[int, ...]) -> float:
    """ER of a matrix (rows, columns), ERK of a kernel (outputs, inputs, height, width)."""
    return sum(shape) / prod(shape)


def _unit_density(unit: Unit) -> float:
    """Mean over the weights of all matrices."""
    kept = sum(density(m.matrix_shape) * m.num_weights for m in unit.members)
    return kept / unit.num_weights

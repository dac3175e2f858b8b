"""Spectrum energy: matrices that need many ranks for their energy are worth keeping.

SoKA (2025) chooses ranks from the singular values by a threshold of cumulative energy and by an
elbow. Its threshold, its definition of the elbow and how the two combine could not be determined
from what is public: here the threshold is a field, the elbow is the point of the curve of
cumulative energy over rank that lies farthest from the chord between its ends, and ``both`` takes
the smaller rank. SoKA's spectra are of Kronecker sums; here they are of the matrices. Its ranks
follow from the threshold, so to meet a wanted mean all kept shares are scaled by one factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from objectives.mappers import Ratios
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import (
    Importances,
    ImportanceScorer,
    dense_matrices,
    proportional_ratios,
    unit_sizes,
)
from objectives.sensitivity.spectral_tail import squared_singular_values
from search_spaces.space import SearchSpace

_RULES = ("energy", "elbow", "both")


@dataclass(frozen=True)
class SpectrumEnergy(ImportanceScorer):
    """Numbers of two factors of the needed rank, as a share of the matrix's.

    Attributes:
        rule: ``energy``, ``elbow`` or ``both``, the smaller of the two ranks.
        energy: Share of the squared singular values that the rank must hold.
    """

    rule: str = "energy"
    energy: float = 0.9

    name: ClassVar[str] = "spectrum_energy"

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise ValueError(
                f"spectrum_energy: rule must be {', '.join(_RULES)}, got {self.rule!r}"
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"spectrum_energy: energy must be above 0 to 1, got {self.energy}")

    def measure(self, context: ScoringContext) -> Importances:
        """``rank (rows + columns)`` of all matrices of a unit over their weights; may exceed 1."""
        return np.array([self._share(context, u) for u in range(len(context.space.units))])

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """Scaled to the mean and capped at dense: more ranks, keep more."""
        return proportional_ratios(importances, unit_sizes(space), removed)

    def _share(self, context: ScoringContext, unit: int) -> float:
        kept = 0
        for _, matrix in dense_matrices(context, unit):
            kept += self._rank(squared_singular_values(matrix)[::-1]) * sum(matrix.shape)
        return kept / context.space.units[unit].num_weights

    def _rank(self, eigenvalues: NDArray[np.float64]) -> int:
        """By the rule; at least 1."""
        if self.rule == "energy":
            return energy_rank(eigenvalues, self.energy)
        if self.rule == "elbow":
            return elbow_rank(eigenvalues)
        return min(energy_rank(eigenvalues, self.energy), elbow_rank(eigenvalues))


def energy_rank(eigenvalues: NDArray[np.float64], share: float) -> int:
    """Least rank that holds a share of the summed eigenvalues, at least 1.

    Args:
        eigenvalues: (count,) descending.
        share: Above 0, at most 1.
    """
    cumulative = np.cumsum(eigenvalues)
    return min(int(np.searchsorted(cumulative, share * cumulative[-1])) + 1, len(eigenvalues))


def elbow_rank(eigenvalues: NDArray[np.float64]) -> int:
    """Rank at which cumulative energy lies farthest above the chord of its curve, at least 1.

    The curve climbs away from the chord while eigenvalues exceed their mean, so this is how many
    do. A flat spectrum has no elbow and gives 1.

    Args:
        eigenvalues: (count,) descending.
    """
    return max(int((eigenvalues > eigenvalues.mean()).sum()), 1)

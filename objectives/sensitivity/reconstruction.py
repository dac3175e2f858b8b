"""Activation-weighted reconstruction: the error of a matrix's outputs on calibration inputs.

With inputs of second moment ``m`` per feature (their correlations ignored), the expected squared
output error is ``sum_ij m_j (W - W')_ij^2``; it is divided by the expected squared output, so that
matrices of different scale add up. Keys and values are outputs of projections themselves: of a
cache it is their relative squared error.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from objectives.sensitivity.base import CellScorer, ScoringContext, weighted_square
from search_spaces.operators import Statistics


class Reconstruction(CellScorer):
    """Relative squared output error by the diagonal second moment (as Wanda and imatrix weigh)."""

    name: ClassVar[str] = "reconstruction"
    unit: ClassVar[str] = "relative_output_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Relative squared output error of one option.

        Raises:
            ValueError: The inputs of a parameter could not be observed.
        """
        if (cached := context.cache_loss(unit, option)) is not None:
            return cached.relative_error
        total = 0.0
        for member, weight, error, stats in context.errors(unit, option):
            moment = self._moment(stats)
            if moment is None:
                raise ValueError(
                    f"scorer {self.name}: the inputs of {member.name} cannot be observed; "
                    "exclude it or use the fisher scorer"
                )
            moment = moment.to(error.device)
            energy = self._energy(weight, moment)
            # NaN stays NaN
            total += self._energy(error, moment) / energy if energy != 0 else 0.0
        return total

    @staticmethod
    def _moment(statistics: Statistics) -> Tensor | None:
        """What is known of the inputs' second moment."""
        return statistics.second_moment

    @staticmethod
    def _energy(matrices: Tensor, moment: Tensor) -> float:
        """Squared outputs, up to a factor, of (matrices, rows, columns) weights or errors."""
        return weighted_square(matrices, moment)

"""Outlier ratio: blocks with many outlying weights are worth keeping.

OWL (Yin et al., ICML 2024, "Outlier Weighed Layerwise Sparsity") counts the Wanda scores
``|W_ij| ||X_j||`` of a block that exceed M times their mean over the block, and keeps more of the
blocks where the share of these outliers is large. The scores are not held: a block's matrices are
read twice, for the mean and for the count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from objectives.mappers import Ratios, spread_map
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import (
    BlockImportanceScorer,
    Importances,
    dense_matrices,
    units_by_block,
)


@dataclass(frozen=True)
class OutlierRatio(BlockImportanceScorer):
    """OWL's layerwise outlier distribution and its mapping.

    Attributes:
        multiple: M, how many times the mean an outlier exceeds; 3, 5 and 7 are published.
        spread: Lambda, half the range of the keep ratios; 0.02 to 0.2 are published.
    """

    multiple: float = 5.0
    spread: float = 0.08

    name: ClassVar[str] = "outlier_ratio"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def measure_blocks(self, context: ScoringContext) -> Importances:
        """Share of outliers, at least that of one weight, so that no block is worth nothing.

        Raises:
            ValueError: The inputs of a parameter could not be observed.
        """
        return np.array([self._share(context, units) for units in units_by_block(context.space)])

    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """Keep ratios spread over twice lambda: more outliers, keep more."""
        del sizes
        return spread_map(importances, removed, self.spread, sign=+1)

    def _share(self, context: ScoringContext, units: list[int]) -> float:
        total, num_weights = 0.0, 0
        for scores in self._scores(context, units):
            total += float(scores.sum(dtype=torch.float64))
            num_weights += scores.numel()
        least = self.multiple * total / num_weights
        num_outliers = sum(int((s > least).sum()) for s in self._scores(context, units))
        return max(num_outliers, 1) / num_weights

    def _scores(self, context: ScoringContext, units: list[int]) -> Iterator[Tensor]:
        """Wanda's scores of a block up to a factor, matrix by matrix."""
        for unit in units:
            for member, matrix in dense_matrices(context, unit):
                moment = context.statistics[member.name].second_moment
                if moment is None:
                    raise ValueError(
                        f"scorer {self.name}: the inputs of {member.name} cannot be observed; "
                        "exclude it or use another scorer"
                    )
                yield matrix.abs() * moment.to(matrix).sqrt()

"""Arithmetic progression: later blocks lose more, by an equal step from each to the next.

ATP (ICML 2025, "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
Perspective") prunes block i of L by ``S - beta (L - 1) / 2 + i beta``, with one number beta for the
model. It reads neither weights nor data, and is hard to beat.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from objectives.mappers import Ratios
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import BlockImportanceScorer, Importances, units_by_block

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArithmeticProgression(BlockImportanceScorer):
    """Depth alone.

    Attributes:
        beta: Step from block to block. The paper sweeps it from 0.002, in steps of 0.002, to
            ``min(2 S, 2 (1 - S)) / (L - 1)``; that end, 0.019 for 32 blocks at 70 %, replaces a
            larger beta, with a warning. One value inside the range is taken here instead of the
            sweep.
    """

    beta: float = 0.01

    name: ClassVar[str] = "arithmetic_progression"

    def measure_blocks(self, context: ScoringContext) -> Importances:
        """L for the first block, 1 for the last."""
        return np.arange(len(units_by_block(context.space)), 0, -1, dtype=float)

    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """Rising with depth: earlier blocks, keep more."""
        del sizes
        last = len(importances) - 1
        end = 2 * min(removed, 1 - removed) / max(last, 1)
        if self.beta > end:
            logger.warning(
                "arithmetic_progression: beta %g is lowered to %g, the end of the published range "
                "at %d blocks and a mean of %g",
                self.beta,
                end,
                last + 1,
                removed,
            )
        place = importances.max() - importances
        return np.asarray(removed + min(self.beta, end) * (place - last / 2))

"""Blend: a weighted geometric mean of the Fisher loss and the relative weight error.

The problem: Fisher knows which matrix the loss feels but was measured around the dense model, and
at 2 and 3 bits it overstates the differences between matrices; the relative error knows nothing of
the loss. Either one's optimum is often worse than uniform. Shrinking Fisher's logarithm towards the
relative error's keeps most of the first and calms it with the second: on the models we measured
its optimum is better than both (README, results). The weights were chosen on SmolLM2-135M. Caches
are on the same scale: nats measured alone in Fisher's place, the relative error of the states that
attention reads in the weights'.
"""

from __future__ import annotations

from typing import ClassVar

from objectives.sensitivity.base import CellScorer, ScoringContext
from objectives.sensitivity.fisher import Fisher
from objectives.sensitivity.relative_error import RelativeError

FISHER_WEIGHT = 0.7


class Blend(CellScorer):
    """``fisher^0.7 x relative_error^0.3``, a ranking without a unit."""

    name: ClassVar[str] = "blend"
    unit: ClassVar[str] = "blend"
    needs: ClassVar[frozenset[str]] = Fisher.needs

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Weighted geometric mean of both estimates of one option."""
        fisher = Fisher().cell(context, unit, option)
        relative = RelativeError().cell(context, unit, option)
        return float(fisher**FISHER_WEIGHT * relative ** (1 - FISHER_WEIGHT))

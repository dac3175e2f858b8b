"""Blend: the geometric mean of the Fisher loss and the relative weight error.

The problem: Fisher knows which matrix the loss feels but was measured around the dense model, and
at 2 and 3 bits it overstates the differences between matrices; the relative error knows nothing of
the loss and ranks the widths of one matrix well. Their optimum is often worse than uniform, either
way. The geometric mean keeps half of each one's logarithm: on the models we measured its optimum
is better than both (README, results).
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.fisher import Fisher
from objectives.sensitivity.relative_error import RelativeError


class Blend:
    """``sqrt(fisher x relative_error)``, a ranking without a unit."""

    name: ClassVar[str] = "blend"
    unit: ClassVar[str] = "blend"
    needs: ClassVar[frozenset[str]] = Fisher.needs

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Geometric mean of both estimates of one option."""
        fisher = Fisher().cell(context, unit, option)
        return sqrt(fisher * RelativeError().cell(context, unit, option))

"""Round-to-nearest: integers on a uniform grid, one scale per group of a row.

The problem: store a matrix at ``bits`` bits without calibration data. The grids are those of GPTQ
and torchao, so plans made with them re-quantize to the same numbers there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Statistics
from search_spaces.operators.integer_grid import GridCodes, IntegerOperator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RoundToNearest(IntegerOperator):
    """Uniform integer rounding in groups along each row.

    Attributes:
        bits: Width of a code, 1 to 8 (1 only when asymmetric).
        group_size: Consecutive weights of a row that share a scale; 0 means the whole row. The
            last group of a row may be short.
        symmetric: Without zero points (grid centred on zero) or with.
    """

    name: ClassVar[str] = "round_to_nearest"

    @property
    def label(self) -> str:
        """For example ``int3-g64``, with an ``a`` after the bits when asymmetric."""
        return f"int{self.grid_label}"

    def quantize(self, weight: Tensor, stats: Statistics) -> GridCodes:
        """Every weight at its nearest point of the grid."""
        del stats
        return self.round_to_nearest(weight)

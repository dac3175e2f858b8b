"""Integers on a uniform grid: how every operator with group scales stores its codes.

The problem: round-to-nearest, GPTQ and rounding with clipped ranges differ in how they choose
numbers, not in what they store. Each group of ``group_size`` consecutive weights of a row gets a
float16 scale and, when asymmetric, an integer zero point packed at the same width as the codes.
The grids are those of GPTQ and torchao (scale from the float range, zero always representable).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from search_spaces.operators.base import Matrix, PackedOperator, Statistics
from search_spaces.storage import StoredTensor, num_groups, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_SCALE = 2.0**-24  # the least positive float16: a scale may never round to zero
_LARGEST_SCALE = 65504.0


class GridCodes(NamedTuple):
    """What a matrix becomes on the grid, all float32.

    Attributes:
        codes: (rows, groups, width) integers in ``[0, 2**bits)``; a short last group is padded.
        scales: (rows, groups, 1) as float16 holds them.
        zeros: (rows, groups, 1) integer zero points, constant when symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dense(self, columns: int) -> Tensor:
        """(rows, columns) float32: what the codes stand for."""
        return ((self.codes - self.zeros) * self.scales).flatten(1)[:, :columns]


@dataclass(frozen=True)
class IntegerOperator(PackedOperator):
    """Uniform integer codes in groups along each row; a subclass says which.

    Attributes:
        bits: Width of a code, 1 to 8 (1 only when asymmetric).
        group_size: Consecutive weights of a row that share a scale; 0 means the whole row. The
            last group of a row may be short.
        symmetric: Without zero points (grid centred on zero) or with.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True

    name: ClassVar[str]

    def __post_init__(self) -> None:
        least = 2 if self.symmetric else 1
        if not least <= self.bits <= 8:
            raise ValueError(f"{self.name}: bits must be {least} to 8, got {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"{self.name}: group_size must be >= 0, got {self.group_size}")

    @property
    def grid_label(self) -> str:
        """For example ``3-g64``, with an ``a`` after the bits when asymmetric."""
        group = "row" if self.group_size == 0 else f"g{self.group_size}"
        return f"{self.bits}{'' if self.symmetric else 'a'}-{group}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes, float16 scales and, when asymmetric, packed zero points.

        ``ceil(m n b / 8) + 2 m G [+ ceil(m G b / 8)]`` bytes with ``G = ceil(n / group_size)``.
        """
        rows, columns = shape
        groups = num_groups(columns, self.group_size)
        stored = [
            StoredTensor("codes", "U8", (packed_bytes(rows * columns, self.bits),)),
            StoredTensor("scales", "F16", (rows, groups)),
        ]
        if not self.symmetric:
            stored.append(StoredTensor("zeros", "U8", (packed_bytes(rows * groups, self.bits),)))
        return tuple(stored)

    @abstractmethod
    def quantize(self, weight: Tensor, stats: Statistics) -> GridCodes:
        """(rows, columns) -> its codes, scales and zero points."""

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """What the codes stand for, in the weight's own dtype."""
        return self.quantize(weight, stats).dense(weight.shape[1]).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Codes and zero points bit-packed, scales in float16."""
        import torch

        from search_spaces.operators.packing import pack_bits

        codes, scales, zeros = self.quantize(weight, stats)
        columns = weight.shape[1]
        packed = {
            "codes": pack_bits(codes.flatten(1)[:, :columns].flatten(), self.bits),
            "scales": scales.to(torch.float16).squeeze(-1),
        }
        if not self.symmetric:
            packed["zeros"] = pack_bits(zeros.flatten(), self.bits)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        groups = num_groups(columns, self.group_size)
        codes = unpack_bits(packed["codes"], self.bits, rows * columns).reshape(rows, columns)
        scales = packed["scales"].to(codes).reshape(rows, groups, 1)
        if self.symmetric:
            zeros = scales.new_full((1, 1, 1), 2 ** (self.bits - 1))
        else:
            zeros = unpack_bits(packed["zeros"], self.bits, rows * groups).reshape(rows, groups, 1)
        return GridCodes(grouped(codes, self.group_size), scales, zeros).dense(columns)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of groups whose weights reach from ``low`` to ``high``.

        Args:
            low: Least weight of each group, at most zero.
            high: Greatest weight of each group, at least zero; the same shape.

        Returns:
            Scales as float16 holds them, and integer zero points, both float32 of that shape.
        """
        import torch

        levels = 2**self.bits - 1
        if self.symmetric:
            scales = storable(torch.maximum(-low, high).mul_(2 / levels))
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        scales = storable((high - low).div_(levels))
        return scales, (-low / scales).round_().clamp_(0, levels)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes of the grid points nearest to the weights; all shapes broadcast."""
        return (weight / scales).round_().add_(zeros).clamp_(0, 2**self.bits - 1)

    def round_to_nearest(self, weight: Tensor) -> GridCodes:
        """(rows, columns) -> every weight at its nearest point, scales from the whole range."""
        groups = grouped(weight.float(), self.group_size)
        scales, zeros = self.fit(*reach(groups, -1))
        return GridCodes(self.nearest(groups, scales, zeros), scales, zeros)


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> (rows, groups, width), a short last group padded with zeros.

    The padding never widens a range, since every range here includes zero.
    """
    from torch.nn.functional import pad

    rows, columns = matrix.shape
    groups = num_groups(columns, group_size)
    width = group_size or columns
    return pad(matrix, (0, groups * width - columns)).reshape(rows, groups, width)


def reach(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value along a dimension (kept at size one), the range including zero."""
    # Two passes: aminmax takes several times as long.
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)


def storable(scales: Tensor) -> Tensor:
    """The scales after a round trip through float16, as the decoder will see them."""
    import torch

    clamped = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    return clamped.to(torch.float16).float()

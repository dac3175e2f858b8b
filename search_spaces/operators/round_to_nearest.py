"""Round-to-nearest: integers on a uniform grid, one scale per group of a row.

The problem: store a matrix at ``bits`` bits without calibration data. Each group of ``group_size``
consecutive weights of a row gets a float16 scale and, when asymmetric, an integer zero point packed
at the same width as the codes. The grids are those of GPTQ and torchao (scale from the float range,
zero always representable), so plans made with them re-quantize to the same numbers there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Statistics
from search_spaces.storage import StoredTensor, num_groups, packed_bytes, payload_bytes

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_SCALE = 2.0**-24  # the least positive float16: a scale may never round to zero
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class RoundToNearest:
    """Uniform integer rounding in groups along each row.

    Attributes:
        bits: Width of a code, 1 to 8 (1 only when asymmetric).
        group_size: Consecutive weights of a row that share a scale; 0 means the whole row. The
            last group of a row may be short.
        symmetric: Without zero points (grid centred on zero) or with.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True

    name: ClassVar[str] = "round_to_nearest"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        least = 2 if self.symmetric else 1
        if not least <= self.bits <= 8:
            raise ValueError(f"round_to_nearest: bits must be {least} to 8, got {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"round_to_nearest: group_size must be >= 0, got {self.group_size}")

    @property
    def label(self) -> str:
        """For example ``int3-g64``, with an ``a`` after the bits when asymmetric."""
        group = "row" if self.group_size == 0 else f"g{self.group_size}"
        return f"int{self.bits}{'' if self.symmetric else 'a'}-{group}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes, float16 scales and, when asymmetric, packed zero points."""
        rows, columns = shape
        scales = rows * num_groups(columns, self.group_size)
        stored = [
            StoredTensor("codes", "U8", (packed_bytes(rows * columns, self.bits),)),
            StoredTensor("scales", "F16", (rows, num_groups(columns, self.group_size))),
        ]
        if not self.symmetric:
            stored.append(StoredTensor("zeros", "U8", (packed_bytes(scales, self.bits),)))
        return tuple(stored)

    def bytes(self, shape: Matrix) -> int:
        """``ceil(m n b / 8) + 2 m G [+ ceil(m G b / 8)]`` with ``G = ceil(n / group_size)``."""
        return payload_bytes(self.layout(shape))

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Nearest point of the grid, in the weight's own dtype."""
        del stats
        codes, scales, zeros = self._quantize(weight)
        return self._dequantize(codes, scales, zeros, weight.shape[1]).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Codes and zero points bit-packed, scales in float16."""
        del stats
        import torch

        from search_spaces.operators.packing import pack_bits

        codes, scales, zeros = self._quantize(weight)
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
        from torch.nn.functional import pad

        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        groups = num_groups(columns, self.group_size)
        width = self.group_size or columns
        codes = unpack_bits(packed["codes"], self.bits, rows * columns).reshape(rows, columns)
        codes = pad(codes, (0, groups * width - columns)).reshape(rows, groups, width)
        scales = packed["scales"].float().reshape(rows, groups, 1)
        if self.symmetric:
            zeros = scales.new_full((1, 1, 1), 2 ** (self.bits - 1))
        else:
            zeros = unpack_bits(packed["zeros"], self.bits, rows * groups).reshape(rows, groups, 1)
        return self._dequantize(codes, scales, zeros, columns)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (rows, groups, width), scales and zero points (rows, groups, 1), all float32."""
        from torch.nn.functional import pad

        rows, columns = weight.shape
        groups = num_groups(columns, self.group_size)
        width = self.group_size or columns
        # Padding with zeros never widens a range, since every range here includes zero.
        grouped = pad(weight.float(), (0, groups * width - columns)).reshape(rows, groups, width)
        levels = 2**self.bits - 1
        if self.symmetric:
            scales = grouped.abs().amax(-1, keepdim=True).mul_(2 / levels)
            scales = _storable(scales)
            zeros = scales.new_full((1, 1, 1), 2 ** (self.bits - 1))
        else:
            low = grouped.amin(-1, keepdim=True).clamp_(max=0)
            high = grouped.amax(-1, keepdim=True).clamp_(min=0)
            scales = _storable((high - low).div_(levels))
            zeros = (-low / scales).round_().clamp_(0, levels)
        codes = (grouped / scales).round_().add_(zeros).clamp_(0, levels)
        return codes, scales, zeros

    @staticmethod
    def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, columns: int) -> Tensor:
        return ((codes - zeros) * scales).flatten(1)[:, :columns]


def _storable(scales: Tensor) -> Tensor:
    """The scales after a round trip through float16, as the decoder will see them."""
    import torch

    clamped = scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    return clamped.to(torch.float16).float()

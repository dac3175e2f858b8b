"""Powers of two: every weight a sign and a shift.

The problem: multiplying by a weight can be a shift. DenseShift (Li et al., 2023) stores a weight as
``sign * 2**-e`` without a code for zero, which at low widths would take a whole sign's worth of
levels. With b bits there are 2**(b-1) magnitudes, each half of the one before, times one float16
scale per group; the scale is searched for the least squared error, since rounding to powers of two
errs by up to a third and where the powers fall matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics
from search_spaces.storage import StoredTensor, num_groups, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

_MOST_BITS = 6  # 32 magnitudes reach down to 2**-31 of the largest
_NUM_SCALES = 24
_LARGEST_SCALE = 65504.0
_TINY = 1e-37


@dataclass(frozen=True)
class PowerOfTwo(PackedOperator):
    """``sign * 2**-e * scale``; a zero weight becomes the least magnitude of its group.

    Attributes:
        bits: Width of a code, 1 to 6: the sign and ``bits - 1`` bits of exponent. With one bit
            every weight of a group has the same magnitude.
        group_size: Consecutive weights of a row that share a scale; 0 means the whole row. The
            last group of a row may be short.
    """

    bits: int
    group_size: int = 0

    name: ClassVar[str] = "power_of_two"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST_BITS:
            raise ValueError(f"power_of_two: bits must be 1 to {_MOST_BITS}, got {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"power_of_two: group_size must be >= 0, got {self.group_size}")

    @property
    def label(self) -> str:
        """For example ``shift3-row`` or ``shift3-g64``."""
        return f"shift{self.bits}-{'row' if self.group_size == 0 else f'g{self.group_size}'}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes and a float16 scale per group: ``ceil(m n b / 8) + 2 m G`` bytes."""
        rows, columns = shape
        return (
            StoredTensor("codes", "U8", (packed_bytes(rows * columns, self.bits),)),
            StoredTensor("scales", "F16", (rows, num_groups(columns, self.group_size))),
        )

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Nearest signed power of two, in the weight's own dtype."""
        del stats
        codes, scales = self._quantize(weight)
        return self._dequantize(codes, scales, weight.shape[1]).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Codes bit-packed, the sign above the exponent; scales in float16."""
        del stats
        import torch

        from search_spaces.operators.packing import pack_bits

        codes, scales = self._quantize(weight)
        real = codes.flatten(1)[:, : weight.shape[1]]
        return {
            "codes": pack_bits(real.flatten(), self.bits),
            "scales": scales.to(torch.float16).squeeze(-1),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        from search_spaces.operators.integer_grid import grouped
        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        codes = unpack_bits(packed["codes"], self.bits, rows * columns).reshape(rows, columns)
        codes = grouped(codes, self.group_size)
        return self._dequantize(codes, packed["scales"].to(codes).unsqueeze(-1), columns)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (rows, groups, width) and scales (rows, groups, 1) as float16 holds them."""
        import torch

        from search_spaces.operators.integer_grid import grouped

        groups = grouped(weight.float(), self.group_size)
        real = grouped(torch.ones_like(weight[:1], dtype=torch.float32), self.group_size)
        magnitudes = groups.abs()
        # A power is nearest from 3/4 to 3/2 of itself: the integer part is then the exponent.
        logs = (magnitudes / 0.75).log2_()
        mean = magnitudes.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        # One bit wants the mean; many want the octave up to 4/3 of the largest, cutting nothing.
        largest = magnitudes.amax(-1, keepdim=True) * (4 / 3)
        span = (largest.clamp_min(_TINY) / mean.clamp_min(_TINY)).log2_()
        best, least = torch.zeros_like(mean), torch.full_like(mean, torch.inf)
        for step in range(_NUM_SCALES + 1):
            if step < _NUM_SCALES:
                scales = mean * (span * (step / (_NUM_SCALES - 1))).exp2_()
            else:  # least squares for the powers of the best
                powers = self._exponents(logs, best).neg_().exp2_().mul_(real)
                scales = (magnitudes * powers).sum(-1, True) / powers.square().sum(-1, True)
            scales = scales.clamp(max=_LARGEST_SCALE).to(torch.float16).float()
            levels = self._exponents(logs, scales).neg_().exp2_().mul_(scales)
            error = levels.sub_(magnitudes).square_().mul_(real).sum(-1, keepdim=True)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        return self._exponents(logs, best) + (groups < 0) * 2.0 ** (self.bits - 1), best

    def _exponents(self, logs: Tensor, scales: Tensor) -> Tensor:
        """How often the scale is halved to be nearest, as float32 integers."""
        shifts = scales.clamp_min(_TINY).log2() - logs
        return shifts.ceil_().clamp_(0, (1 << (self.bits - 1)) - 1)

    def _dequantize(self, codes: Tensor, scales: Tensor, columns: int) -> Tensor:
        half = 1 << (self.bits - 1)
        negative = codes >= half
        magnitudes = (negative * half - codes).exp2() * scales
        return magnitudes.where(~negative, -magnitudes).flatten(1)[:, :columns]

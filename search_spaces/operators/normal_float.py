"""NormalFloat: codes at the quantiles of a normal distribution, with scales that are quantized too.

The problem: trained weights are about normal, so evenly spaced levels waste codes on the tails; and
one float scale for every 64 weights costs half a bit each. QLoRA (Dettmers et al. 2023, section 3)
places the levels at quantiles and quantizes the scales again; LQ-LoRA (Guo et al. 2024, section
3.2) makes five numbers of it that can be chosen per matrix, from a menu of 432.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics
from search_spaces.storage import StoredTensor, ceil_div, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

# The quantile of the largest level. QLoRA's, from its 4 bits: 1 - (1/30 + 1/32) / 2; LQ-LoRA
# keeps it at every width.
_LAST_QUANTILE = 0.9677083
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class NormalFloat(PackedOperator):
    """Quantile codes in blocks of the flattened matrix, their scales quantized in turn.

    A block's scale is its largest magnitude. Scales are stored as what they exceed the least of
    them by, in unsigned integers with a float scale for every ``scale_block`` of them.

    Attributes:
        bits: Width of a code, 2 to 8 (LQ-LoRA's ``b0``).
        block: Consecutive weights, row after row, that share a scale (``B0``).
        scale_bits: Width of a scale's code, 2 to 8 (``b1``).
        scale_dtype: Type of the scales' scales (``b2``): bfloat16, float16 or float32.
        scale_block: Consecutive scales that share one (``B1``).
    """

    bits: int = 4
    block: int = 64
    scale_bits: int = 8
    scale_dtype: str = "float32"
    scale_block: int = 256

    name: ClassVar[str] = "normal_float"

    def __post_init__(self) -> None:
        for field in ("bits", "scale_bits"):
            if not 2 <= getattr(self, field) <= 8:
                raise ValueError(
                    f"normal_float: {field} must be 2 to 8, got {getattr(self, field)}"
                )
        for field in ("block", "scale_block"):
            if getattr(self, field) < 1:
                raise ValueError(f"normal_float: {field} must be >= 1, got {getattr(self, field)}")
        if self.scale_dtype not in _STORED:
            raise ValueError(
                "normal_float: scale_dtype must be bfloat16, float16 or float32, "
                f"got {self.scale_dtype!r}"
            )

    @property
    def label(self) -> str:
        """For example ``nf4-64-s8-256-fp32``: of codes, then of scales, bits and block."""
        scales = f"s{self.scale_bits}-{self.scale_block}-{_SHORT[self.scale_dtype]}"
        return f"nf{self.bits}-{self.block}-{scales}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes, packed scale codes, the scales' scales and their common offset.

        ``m n / 8 (b0 + b1 / B0 + b2 / (B0 B1)) + 4`` bytes, each tensor rounded up.
        """
        num_weights = shape[0] * shape[1]
        num_scales = ceil_div(num_weights, self.block)
        return (
            StoredTensor("codes", "U8", (packed_bytes(num_weights, self.bits),)),
            StoredTensor("scale_codes", "U8", (packed_bytes(num_scales, self.scale_bits),)),
            StoredTensor(
                "scale_scales",
                _STORED[self.scale_dtype],
                (ceil_div(num_scales, self.scale_block),),
            ),
            StoredTensor("scale_offset", "F32", (1,)),
        )

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Nearest level of each block, in the weight's own dtype."""
        del stats
        codes, scale_codes, seconds, offset = self._quantize(weight)
        scales = self._scales(scale_codes, seconds, offset)
        rows, columns = weight.shape
        return self._dequantize(codes, scales, (rows, columns)).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Both levels of codes bit-packed, the scales' scales in their type."""
        del stats
        import torch

        from search_spaces.operators.packing import pack_bits

        codes, scale_codes, seconds, offset = self._quantize(weight)
        return {
            "codes": pack_bits(codes.flatten()[: weight.numel()], self.bits),
            "scale_codes": pack_bits(
                scale_codes.flatten()[: ceil_div(weight.numel(), self.block)], self.scale_bits
            ),
            "scale_scales": seconds.flatten().to(getattr(torch, self.scale_dtype)),
            "scale_offset": offset.reshape(1),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        from search_spaces.operators.packing import unpack_bits

        num_weights = shape[0] * shape[1]
        num_scales = ceil_div(num_weights, self.block)
        codes = unpack_bits(packed["codes"], self.bits, num_weights)
        scale_codes = unpack_bits(packed["scale_codes"], self.scale_bits, num_scales)
        seconds, offset = (packed[k].to(codes) for k in ("scale_scales", "scale_offset"))
        scales = self._scales(_blocks(scale_codes, self.scale_block), seconds[:, None], offset)
        return self._dequantize(_blocks(codes.int(), self.block), scales, shape)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes (blocks, block) and (superblocks, scale_block), second scales, their offset."""
        import torch

        blocks = _blocks(weight.float().flatten(), self.block)
        first = blocks.abs().amax(1)
        # The least scale, as in LQ-LoRA's code: around QLoRA's mean, one code of few bits is lost
        # to symmetry and a decoded scale can turn negative.
        offset = first.min()
        excess = _blocks(first - offset, self.scale_block)
        dtype = getattr(torch, self.scale_dtype)
        seconds = excess.amax(1, keepdim=True).clamp_(max=torch.finfo(dtype).max)
        seconds = seconds.to(dtype).float()
        levels = 2**self.scale_bits - 1
        # 0 / 0 where all scales of a superblock are the least one.
        shares = (excess / seconds).mul_(levels).nan_to_num_(nan=0.0, posinf=levels)
        scale_codes = shares.round_().clamp_(0, levels)
        scales = self._scales(scale_codes, seconds, offset)[: len(blocks)]
        values = torch.tensor(normal_float_levels(self.bits), device=blocks.device)
        edges = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize((blocks / scales[:, None]).nan_to_num_(nan=0.0), edges)
        return codes, scale_codes, seconds, offset

    def _scales(self, scale_codes: Tensor, seconds: Tensor, offset: Tensor) -> Tensor:
        """(at least num_blocks,) scales as the decoder sees them; padding at the end."""
        step = seconds / (2**self.scale_bits - 1)
        scales: Tensor = scale_codes * step + offset
        return scales.flatten()

    def _dequantize(self, codes: Tensor, scales: Tensor, shape: Matrix) -> Tensor:
        import torch

        rows, columns = shape
        values = torch.tensor(normal_float_levels(self.bits), device=codes.device)
        dense: Tensor = values[codes].mul_(scales[: len(codes), None])
        return dense.flatten()[: rows * columns].reshape(rows, columns)


@cache
def normal_float_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels in ascending order, from -1 to 1 with an exact zero.

    Evenly spaced quantiles of the normal distribution on either side of zero, one more above than
    below, divided by the largest.
    """
    half = 2 ** (bits - 1)
    quantile, tail = NormalDist().inv_cdf, _LAST_QUANTILE - 0.5
    largest = quantile(_LAST_QUANTILE)
    above = [quantile(0.5 + tail * i / half) / largest for i in range(1, half + 1)]
    below = [-quantile(0.5 + tail * i / (half - 1)) / largest for i in range(half - 1, 0, -1)]
    return (*below, 0.0, *above)


def lq_lora_menu() -> tuple[NormalFloat, ...]:
    """The 432 configurations that LQ-LoRA chooses from, 2.03 to 8.63 bits per weight."""
    return tuple(
        NormalFloat(bits, block, scale_bits, scale_dtype, scale_block)
        for bits, scale_bits, scale_dtype, block, scale_block in product(
            (2, 3, 4, 8), (2, 3, 4, 8), _STORED, (16, 32, 64), (16, 64, 256)
        )
    )


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(num_values,) -> (ceil(num_values / size), size), padded with zeros."""
    from torch.nn.functional import pad

    return pad(flat, (0, -len(flat) % size)).reshape(-1, size)

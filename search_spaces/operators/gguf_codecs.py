"""ggml's simple blocks: 4 to 8 bits in blocks of 32, MXFP4, and the ternary blocks of 256.

The problem: a plan for llama.cpp must be scored with the numbers that llama.cpp will read. These
are the published block layouts of ggml; encoding gives the bytes of its reference quantizer, whose
Python form is the ``gguf`` package, and decoding the same float32 numbers.

Blocks come as (num_blocks, width) float32 and go as (num_blocks, bytes) uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_HALF = 65504.0
_TERNARY_PARTS = ((32, 5), (16, 5), (4, 4))  # bytes of a part, digits in each of its bytes
_FP4_STEPS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # between 0 1 2 3 4 6 8 12: twice the E2M1 values
_FP4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def encode(kind: str, blocks: Tensor) -> Tensor:
    """(num_blocks, width) float32 weights -> (num_blocks, bytes) uint8 blocks of this type."""
    return _ENCODERS[kind](blocks)


def decode(kind: str, packed: Tensor) -> Tensor:
    """Invert :func:`encode`: (num_blocks, width) float32."""
    return _DECODERS[kind](packed)


def half_bytes(scales: Tensor) -> Tensor:
    """(num_blocks, 1) float32 -> (num_blocks, 2) bytes of the nearest finite float16."""
    return scales.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16).view(torch.uint8)


def halves(packed: Tensor) -> Tensor:
    """(num_blocks, 2) bytes -> (num_blocks, 1) float32."""
    return packed.contiguous().view(torch.float16).float()


def inverse(values: Tensor) -> Tensor:
    """One over each value; 0 where that is not finite, as ggml has it for 0."""
    return torch.nan_to_num(1 / values, nan=0.0, posinf=0.0, neginf=0.0)


def ratio(numerator: float, values: Tensor) -> Tensor:
    """Numerator over each value, rounded once: ``/`` would multiply by the reciprocal."""
    return torch.full_like(values, numerator) / values


def join_planes(codes: Tensor, bits: int, width: int) -> Tensor:
    """Pack codes into bytes the way ggml interleaves them.

    Args:
        codes: (num_blocks, num_codes) integers below ``2**bits``, any dtype.
        bits: Width of a code: 1, 2 or 4.
        width: Consecutive codes that go into consecutive bytes; the next ``width`` codes go into
            the same bytes, ``bits`` higher.

    Returns:
        (num_blocks, num_codes * bits / 8) uint8.
    """
    planes = codes.to(torch.uint8).reshape(len(codes), -1, 8 // bits, width)
    shifted: Tensor = planes << _shifts(bits, planes)
    return shifted.sum(2, dtype=torch.uint8).flatten(1)


def split_planes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Invert :func:`join_planes`: (num_blocks, num_codes) uint8."""
    planes: Tensor = packed.reshape(len(packed), -1, 1, width) >> _shifts(bits, packed)
    codes: Tensor = planes & (2**bits - 1)
    return codes.flatten(1)


def _shifts(bits: int, like: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)
    return shifts[:, None]


def _over(values: Tensor, divisor: int) -> Tensor:
    """True division everywhere: GPUs would multiply by the reciprocal of a plain number."""
    return values / values.new_full((1, 1), divisor)


def _encode_signed(blocks: Tensor, bits: int) -> Tensor:
    """Q4_0 and Q5_0: the weight of largest magnitude becomes the lowest code exactly."""
    half = 2 ** (bits - 1)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -half
    codes = (blocks * inverse(scale)).add_(half + 0.5).trunc_().clamp_(0, 2 * half - 1)
    return torch.cat([half_bytes(scale), *_code_bytes(codes, bits)], 1)


def _decode_signed(packed: Tensor, bits: int) -> Tensor:
    half: int = 2 ** (bits - 1)
    return halves(packed[:, :2]) * (_codes(packed[:, 2:], bits) - half)


def _encode_offset(blocks: Tensor, bits: int) -> Tensor:
    """Q4_1 and Q5_1: from the least weight to the greatest."""
    levels = 2**bits - 1
    low = blocks.amin(1, keepdim=True)
    scale = _over(blocks.amax(1, keepdim=True) - low, levels)
    codes = ((blocks - low) * inverse(scale)).add_(0.5).trunc_().clamp_(0, levels)
    return torch.cat([half_bytes(scale), half_bytes(low), *_code_bytes(codes, bits)], 1)


def _decode_offset(packed: Tensor, bits: int) -> Tensor:
    return halves(packed[:, :2]) * _codes(packed[:, 4:], bits) + halves(packed[:, 2:4])


def _code_bytes(codes: Tensor, bits: int) -> list[Tensor]:
    """The fifth bits, if any, then the low nibbles."""
    whole = codes.to(torch.uint8)
    high = [join_planes(whole >> 4, 1, 1)] if bits == 5 else []
    return [*high, join_planes(whole & 15, 4, 16)]


def _codes(packed: Tensor, bits: int) -> Tensor:
    """Invert :func:`_code_bytes`, as float32."""
    if bits == 4:
        return split_planes(packed, 4, 16).float()
    return (split_planes(packed[:, 4:], 4, 16) | split_planes(packed[:, :4], 1, 1) << 4).float()


def _round_away(values: Tensor) -> Tensor:
    """Nearest integers, halves away from zero as C's ``roundf``."""
    size = values.abs()
    whole = size.floor()
    return values.sign() * (whole + (2 * (size - whole)).floor())


def _encode_q8_0(blocks: Tensor) -> Tensor:
    scale = _over(blocks.abs().amax(1, keepdim=True), 127)
    codes = _round_away(blocks * inverse(scale)).clamp_(-127, 127).to(torch.int8)
    return torch.cat([half_bytes(scale), codes.view(torch.uint8)], 1)


def _decode_q8_0(packed: Tensor) -> Tensor:
    return packed[:, 2:].contiguous().view(torch.int8).float() * halves(packed[:, :2])


def _encode_mxfp4(blocks: Tensor) -> Tensor:
    """A power of two per block and 4-bit floats, as OCP's microscaling formats define them."""
    largest = blocks.abs().amax(1, keepdim=True)
    # Through float64, so that every device agrees with a correctly rounded float32 logarithm.
    exponent = largest.double().log2().float().floor().add_(125).clamp_(0, 254)
    exponent = exponent.to(torch.uint8)
    steps = torch.tensor(_FP4_STEPS, device=blocks.device)
    sizes = torch.bucketize((blocks.abs() / _power(exponent)).contiguous(), steps)
    codes = sizes + 8 * ((sizes > 0) & (blocks < 0))
    return torch.cat([exponent, join_planes(codes, 4, 16)], 1)


def _decode_mxfp4(packed: Tensor) -> Tensor:
    values = torch.tensor((*_FP4_VALUES, *(-value for value in _FP4_VALUES)), device=packed.device)
    values[8] = 0.0  # ggml has no negative zero
    return _power(packed[:, :1]) * values[split_planes(packed[:, 1:], 4, 16).long()]


def _power(exponent: Tensor) -> Tensor:
    """Half of the E8M0 number with these bits, from 2**-128 on: the 4-bit values are doubled."""
    return torch.exp2(exponent.double() - 128).float()


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Digits 0, 1, 2 for -1, 0, 1 and the scale, the largest magnitude."""
    scale = blocks.abs().amax(1, keepdim=True)
    return _round_away(blocks * inverse(scale)).clamp_(-1, 1).add_(1), scale


def _encode_tq1_0(blocks: Tensor) -> Tensor:
    """Five digits of base three to a byte, read back by multiplying instead of dividing."""
    digits, scale = _ternary(blocks)
    parts, start = [], 0
    for width, count in _TERNARY_PARTS:
        part = digits[:, start : start + width * count].reshape(-1, count, width).int()
        number = (part * _powers_of_three(count, part).flip(0) * 3 ** (5 - count)).sum(1)
        parts.append(((number * 256 + 242) // 243).to(torch.uint8))
        start += width * count
    return torch.cat([*parts, half_bytes(scale)], 1)


def _decode_tq1_0(packed: Tensor) -> Tensor:
    digits, start = [], 0
    for width, count in _TERNARY_PARTS:
        part = packed[:, None, start : start + width]
        shifted = part.int() * _powers_of_three(count, part) & 255
        digits.append((shifted * 3 >> 8).flatten(1))
        start += width
    return halves(packed[:, start:]) * (torch.cat(digits, 1).float() - 1)


def _powers_of_three(count: int, like: Tensor) -> Tensor:
    """(count, 1): 1, 3, 9, ..."""
    powers = [3**power for power in range(count)]
    return torch.tensor(powers, dtype=torch.int32, device=like.device)[:, None]


def _encode_tq2_0(blocks: Tensor) -> Tensor:
    digits, scale = _ternary(blocks)
    return torch.cat([join_planes(digits, 2, 32), half_bytes(scale)], 1)


def _decode_tq2_0(packed: Tensor) -> Tensor:
    return halves(packed[:, 64:]) * (split_planes(packed[:, :64], 2, 32).float() - 1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": lambda blocks: _encode_signed(blocks, 4),
    "q4_1": lambda blocks: _encode_offset(blocks, 4),
    "q5_0": lambda blocks: _encode_signed(blocks, 5),
    "q5_1": lambda blocks: _encode_offset(blocks, 5),
    "q8_0": _encode_q8_0,
    "tq1_0": _encode_tq1_0,
    "tq2_0": _encode_tq2_0,
    "mxfp4": _encode_mxfp4,
}
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": lambda packed: _decode_signed(packed, 4),
    "q4_1": lambda packed: _decode_offset(packed, 4),
    "q5_0": lambda packed: _decode_signed(packed, 5),
    "q5_1": lambda packed: _decode_offset(packed, 5),
    "q8_0": _decode_q8_0,
    "tq1_0": _decode_tq1_0,
    "tq2_0": _decode_tq2_0,
    "mxfp4": _decode_mxfp4,
}

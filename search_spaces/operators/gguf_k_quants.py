"""ggml's K-quants: 2 to 6 bits in super-blocks of 256 weights with quantized scales.

The problem: llama.cpp's usual formats have no encoder in Python. A super-block holds sub-blocks of
16 or 32 weights; each has a scale (and, at 2, 4 and 5 bits, a minimum) of 4, 6 or 8 bits, which a
float16 of the super-block multiplies. Layouts and the choice of scales are those of ggml's
reference quantizer, without an importance matrix or, given the second moment of the inputs, with.

Codes under a sub-block scale of zero are arbitrary; here they stand for zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from search_spaces.operators.gguf_codecs import (
    half_bytes,
    halves,
    inverse,
    join_planes,
    ratio,
    split_planes,
)
from search_spaces.operators.gguf_scale_search import (
    OffsetGrids,
    descend_signed,
    search_offset,
    search_positive,
    search_signed,
)

BLOCK = 256


@dataclass(frozen=True)
class _Offset:
    """A type with minima: sub-blocks of ``width``, scales and minima up to ``top``."""

    width: int
    top: int
    grids: OffsetGrids


_OFFSET = {
    "q2_k": _Offset(16, 15, OffsetGrids(3, -0.5, 0.1, 15, absolute=True)),
    "q4_k": _Offset(32, 63, OffsetGrids(15, -1.0, 0.1, 20)),
    "q5_k": _Offset(32, 63, OffsetGrids(31, -0.5, 0.1, 15)),
}
_SIGNED_LEVELS = {"q3_k": (4, 32), "q6_k": (32, 128)}  # of the codes, of the scales


def encode(kind: str, blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize super-blocks.

    Args:
        kind: ``q2_k`` to ``q6_k``.
        blocks: (num_blocks, 256) float32 weights.
        importance: The same shape: second moment of each weight's input, or none.

    Returns:
        (num_blocks, bytes) uint8.
    """
    if kind in _OFFSET:
        return _encode_offset(kind, blocks, importance)
    return _encode_signed(kind, blocks, importance)


def decode(kind: str, packed: Tensor) -> Tensor:
    """Invert :func:`encode`: (num_blocks, 256) float32."""
    return _DECODERS[kind](packed)


def _encode_offset(kind: str, blocks: Tensor, importance: Tensor | None) -> Tensor:
    """The types with minima, 2, 4 and 5 bits: ``d * scale * code - dmin * minimum``."""
    form = _OFFSET[kind]
    shape = (len(blocks), BLOCK // form.width)
    x = _elements_first(blocks, form.width)
    if importance is None:
        found = search_offset(x, _own_weights(x, kind), form.grids)
        scales, minima = (values.reshape(shape) for values in found)
        scale_codes, d = _to_top(scales, form.top)
        minimum_codes, dmin = _to_top(minima, form.top)
    else:
        weights = _weights(blocks, importance, 1 if kind == "q2_k" else 2)
        weights = _elements_first(weights, form.width)
        grids = replace(form.grids, first=-0.9, step=0.05, num_steps=36, absolute=False)
        found = search_offset(x, weights, grids)
        sums = weights.sum(0).reshape(shape).T
        scale_codes, d = _fitted(found[0].reshape(shape), sums, form.top)
        minimum_codes, dmin = _fitted(found[1].reshape(shape), sums, form.top)
    d_bytes, dmin_bytes = half_bytes(d), half_bytes(dmin)
    scale = (halves(d_bytes) * scale_codes)[:, :, None]
    minimum = (halves(dmin_bytes) * minimum_codes)[:, :, None]
    codes = (blocks.reshape(*shape, form.width) + minimum).div_(scale).round_()
    codes = torch.where(scale == 0, 0, codes.clamp_(0, form.grids.levels)).to(torch.uint8)
    return _OFFSET_LAYOUTS[kind](
        codes.flatten(1), scale_codes, minimum_codes, torch.cat([d_bytes, dmin_bytes], 1)
    )


def _encode_signed(kind: str, blocks: Tensor, importance: Tensor | None) -> Tensor:
    """The types without minima, 3 and 6 bits: ``d * scale * code`` with signed scales."""
    limit, scale_limit = _SIGNED_LEVELS[kind]
    x = _elements_first(blocks, 16)
    if kind == "q3_k" and importance is not None:
        weights = _elements_first(_weights(blocks, importance, 2), 16)
        scales = search_signed(x, weights, limit)[1].reshape(-1, 16)
        sums = weights.sum(0).reshape(-1, 16).T
        codes_first, d = search_signed(scales.T.contiguous(), sums.contiguous(), scale_limit)
        scale_codes, d = codes_first.T, d[:, None]
    else:
        if kind == "q3_k":
            scales = descend_signed(x, limit)
        else:
            weights = x * x if importance is None else _elements_first(importance, 16)
            scales = search_signed(x, weights, limit)[1]
        scale_codes, d = _to_limit(scales.reshape(-1, 16), scale_limit)
    d_bytes = half_bytes(d)
    scale = (halves(d_bytes) * scale_codes)[:, :, None]
    codes = (blocks.reshape(-1, 16, 16) / scale).round_().clamp_(-limit, limit - 1)
    codes = torch.where(scale == 0, 0, codes).add_(limit).to(torch.uint8)
    return _SIGNED_LAYOUTS[kind](codes.flatten(1), scale_codes, d_bytes)


def _elements_first(blocks: Tensor, width: int) -> Tensor:
    """(num_blocks, 256) -> (width, num_sub_blocks), contiguous."""
    return blocks.reshape(-1, width).T.contiguous()


def _own_weights(x: Tensor, kind: str) -> Tensor:
    """Weights of the errors where nothing is known of the inputs: large weights matter more."""
    if kind == "q2_k":
        return x.abs()
    return x.square().mean(0).sqrt() + x.abs()


def _weights(blocks: Tensor, importance: Tensor, factor: int) -> Tensor:
    """Weights of the errors from the second moment of the inputs and the weights themselves."""
    variance = factor * blocks.square().mean(1, keepdim=True)
    return importance * (variance + blocks.square()).sqrt()


def _to_top(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes (num_blocks, sub-blocks) from 0 to ``top``, which the largest gets, and their unit."""
    largest = scales.amax(1, keepdim=True)
    factor = ratio(top, largest).nan_to_num_(0, 0, 0)
    codes = (scales * factor).round_().clamp_(0, top)
    return codes, largest / top


def _to_limit(scales: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes from ``-limit``, which the largest in magnitude gets, to ``limit - 1``; their unit."""
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    factor = ratio(-limit, extreme).nan_to_num_(0, 0, 0)
    return (scales * factor).round_().clamp_(-limit, limit - 1), inverse(factor)


def _fitted(scales: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes and unit by weighted least squares; scales (num_blocks, sub-blocks), weights turned."""
    codes, unit = search_positive(scales.T.contiguous(), weights.contiguous(), top)
    return codes.T, unit[:, None]


def _layout_q2(codes: Tensor, scales: Tensor, minima: Tensor, halves_: Tensor) -> Tensor:
    pairs = scales.to(torch.uint8) | minima.to(torch.uint8) << 4
    return torch.cat([pairs, join_planes(codes, 2, 32), halves_], 1)


def _layout_q4(codes: Tensor, scales: Tensor, minima: Tensor, halves_: Tensor) -> Tensor:
    return torch.cat([halves_, _six_bits(scales, minima), join_planes(codes, 4, 32)], 1)


def _layout_q5(codes: Tensor, scales: Tensor, minima: Tensor, halves_: Tensor) -> Tensor:
    high, low = join_planes(codes >> 4, 1, 32), join_planes(codes & 15, 4, 32)
    return torch.cat([halves_, _six_bits(scales, minima), high, low], 1)


def _layout_q3(codes: Tensor, scales: Tensor, half: Tensor) -> Tensor:
    six = (scales + 32).to(torch.uint8)
    packed = [join_planes(six & 15, 4, 8), join_planes(six >> 4, 2, 4)]
    high, low = join_planes(codes >> 2, 1, 32), join_planes(codes & 3, 2, 32)
    return torch.cat([high, low, *packed, half], 1)


def _layout_q6(codes: Tensor, scales: Tensor, half: Tensor) -> Tensor:
    low, high = join_planes(codes & 15, 4, 64), join_planes(codes >> 4, 2, 32)
    return torch.cat([low, high, scales.to(torch.int8).view(torch.uint8), half], 1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes, the last four of each cut in two."""
    first, last = torch.split(scales.to(torch.uint8), 4, 1)
    first_min, last_min = torch.split(minima.to(torch.uint8), 4, 1)
    low = (last & 15) | (last_min & 15) << 4
    return torch.cat([first | last >> 4 << 6, first_min | last_min >> 4 << 6, low], 1)


def _split_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Invert :func:`_six_bits`: scales and minima, (num_blocks, 8) float32."""
    first, first_min, low = torch.split(packed, 4, 1)
    scales = torch.cat([first & 63, (low & 15) | first >> 6 << 4], 1)
    minima = torch.cat([first_min & 63, low >> 4 | first_min >> 6 << 4], 1)
    return scales.float(), minima.float()


def _decode_q2(packed: Tensor) -> Tensor:
    pairs, quants, d, dmin = torch.split(packed, [16, 64, 2, 2], 1)
    return _offset(split_planes(quants, 2, 32), (pairs & 15).float(), (pairs >> 4).float(), d, dmin)


def _decode_q4(packed: Tensor) -> Tensor:
    d, dmin, scales, quants = torch.split(packed, [2, 2, 12, 128], 1)
    return _offset(split_planes(quants, 4, 32), *_split_six_bits(scales), d, dmin)


def _decode_q5(packed: Tensor) -> Tensor:
    d, dmin, scales, high, low = torch.split(packed, [2, 2, 12, 32, 128], 1)
    codes = split_planes(low, 4, 32) | split_planes(high, 1, 32) << 4
    return _offset(codes, *_split_six_bits(scales), d, dmin)


def _decode_q3(packed: Tensor) -> Tensor:
    high, low, six_low, six_high, d = torch.split(packed, [32, 64, 8, 4, 2], 1)
    six = split_planes(six_low, 4, 8) | split_planes(six_high, 2, 4) << 4
    codes = split_planes(low, 2, 32) | split_planes(high, 1, 32) << 2
    return _signed(codes.float() - 4, six.float() - 32, d)


def _decode_q6(packed: Tensor) -> Tensor:
    low, high, scales, d = torch.split(packed, [128, 64, 16, 2], 1)
    codes = split_planes(low, 4, 64) | split_planes(high, 2, 32) << 4
    return _signed(codes.float() - 32, scales.contiguous().view(torch.int8).float(), d)


def _offset(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    scale, minimum = halves(d) * scales, halves(dmin) * minima
    grouped = codes.float().reshape(*scales.shape, -1)
    return (scale[:, :, None] * grouped - minimum[:, :, None]).flatten(1)


def _signed(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    return ((halves(d) * scales)[:, :, None] * codes.reshape(-1, 16, 16)).flatten(1)


_OFFSET_LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "q2_k": _layout_q2,
    "q4_k": _layout_q4,
    "q5_k": _layout_q5,
}
_SIGNED_LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "q3_k": _layout_q3,
    "q6_k": _layout_q6,
}
_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q2_k": _decode_q2,
    "q3_k": _decode_q3,
    "q4_k": _decode_q4,
    "q5_k": _decode_q5,
    "q6_k": _decode_q6,
}

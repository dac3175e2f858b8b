"""The scales of ggml's K-quants: small least-squares searches, all sub-blocks at once.

The problem: a sub-block of 16 or 32 weights gets one scale (and perhaps one minimum) such that the
weighted error after rounding is small. ggml tries a number of grids, fits the scale to the codes
that each gives and keeps the best; these functions follow its reference quantizer (``ggml-quants``:
make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants), in its order
of operations as far as the order of a sum goes.

Elements come first here: (width, num_sub_blocks) float32, so that sums over a sub-block run across
rows of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from search_spaces.operators.gguf_codecs import ratio

_EPSILON = 1e-15  # sub-blocks below this count as zeros
_LEAST_RANGE = 1e-30
_DESCENTS = 5


@dataclass(frozen=True)
class OffsetGrids:
    """Which grids to try for codes from 0 to ``levels``.

    Attributes:
        levels: The largest code.
        first: Added to ``levels`` in the first try.
        step: Added on top in each further try.
        num_steps: Further tries.
        absolute: Compare absolute errors instead of squared ones.
    """

    levels: int
    first: float
    step: float
    num_steps: int
    absolute: bool = False


def search_offset(x: Tensor, weights: Tensor, grids: OffsetGrids) -> tuple[Tensor, Tensor]:
    """Scale and minimum of every sub-block for ``scale * code - minimum``.

    Args:
        x: (width, num_sub_blocks) values.
        weights: The same shape, of the errors.
        grids: What to try.

    Returns:
        Scales and minima, (num_sub_blocks,) each; minima are subtracted and never negative.
    """
    high, low = x.amax(0), x.amin(0).clamp_(max=0)
    flat = high - low < _LEAST_RANGE
    sum_w, sum_x = weights.sum(0), (weights * x).sum(0)

    def error(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        gap = (codes * scale).add_(low).sub_(x)
        return (gap.abs_() if grids.absolute else gap.square_()).mul_(weights).sum(0)

    steps = torch.arange(grids.num_steps + 1, dtype=torch.float32) * grids.step + grids.first
    factor = ratio(grids.levels, high - low)
    scale = 1 / factor
    best = error(_round(x - low, factor, grids.levels), scale, low)
    for tried in (steps + grids.levels).tolist():
        codes = _round(x - low, ratio(tried, high - low), grids.levels)
        weighted = weights * codes
        sum_l, sum_xl = weighted.sum(0), (weighted * x).sum(0)
        sum_l2 = weighted.mul_(codes).sum(0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = torch.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = new_low.clamp_(max=0)
        found = error(codes, new_scale, new_low)
        better = (determinant > 0) & (found < best)
        best = torch.where(better, found, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    return scale.masked_fill_(flat, 0), -low


def search_signed(x: Tensor, weights: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes from ``-limit`` to ``limit - 1`` and the scale of every sub-block.

    Args:
        x: (width, num_sub_blocks) values.
        weights: The same shape, of the squared errors.
        limit: The weight of largest magnitude gets about ``-limit``.

    Returns:
        Codes as float32, (width, num_sub_blocks), and scales, (num_sub_blocks,).
    """
    extreme, dead = _extreme(x)
    shifts = torch.tensor([0, *range(-9, 0), *range(1, 10)], dtype=torch.float32) * 0.1
    codes, weighted_x = torch.zeros_like(x), weights * x
    scale = torch.zeros_like(extreme)
    best = scale
    for number, tried in enumerate((shifts + limit).tolist()):
        new = (x * ratio(-tried, extreme)).round_().clamp_(-limit, limit - 1)
        sum_xl, sum_l2 = (weighted_x * new).sum(0), (weights * new).mul_(new).sum(0)
        better = sum_l2 > 0
        if number:
            better &= sum_xl * sum_xl > best * sum_l2
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
        codes = torch.where(better, new, codes)
    return codes.masked_fill_(dead, 0), scale.masked_fill_(dead, 0)


def descend_signed(x: Tensor, limit: int) -> Tensor:
    """Scales (num_sub_blocks,) for codes from ``-limit`` to ``limit - 1``, weighted by ``x**2``."""
    extreme, dead = _extreme(x)
    codes = (x * ratio(-limit, extreme)).round_().clamp_(-limit, limit - 1)
    _, scale = _descend(x, x * x, codes, -limit, limit - 1)
    return scale.masked_fill_(dead, 0)


def search_positive(x: Tensor, weights: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Codes from 0 to ``limit`` for values that are never negative, and their scale.

    Args:
        x: (width, num_blocks) values, such as the scales of a block's sub-blocks.
        weights: The same shape, of the squared errors.
        limit: The largest code.

    Returns:
        Codes as float32, (width, num_blocks), and scales, (num_blocks,).
    """
    largest = x.amax(0)
    dead = largest < _EPSILON
    largest = largest.masked_fill(dead, 1)
    best_factor = ratio(limit, largest)
    best = torch.full_like(largest, torch.inf)
    shifts = torch.tensor([0, *range(-4, 0), *range(1, 5)], dtype=torch.float32) * 0.1
    for tried in (shifts + limit).tolist():
        factor = ratio(tried, largest)
        gap = x - (x * factor).round_().clamp_(max=limit) * (1 / factor)
        found = (weights * gap * gap).sum(0)
        best_factor = torch.where(found < best, factor, best_factor)
        best = torch.minimum(found, best)
    codes = (x * best_factor).round_().clamp_(max=limit)
    codes, scale = _descend(x, weights, codes, 0, limit)
    return codes.masked_fill_(dead, 0), scale.masked_fill_(dead, 0)


def _descend(
    x: Tensor, weights: Tensor, codes: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Change one code of each sub-block at a time while the fit gets better."""
    rows, weighted = list(codes), weights * x
    sum_xl, sum_l2 = (weighted * codes).sum(0), (weights * codes * codes).sum(0)
    for _ in range(_DESCENTS):
        for index, old in enumerate(rows):
            rest_xl = sum_xl - weighted[index] * old
            rest_l2 = sum_l2 - weights[index] * old * old
            new = (x[index] * rest_l2 / rest_xl).round_().clamp_(low, high)
            new_xl = rest_xl + weighted[index] * new
            new_l2 = rest_l2 + weights[index] * new * new
            better = (rest_xl > 0) & (rest_l2 > 0) & (new != old)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            rows[index] = torch.where(better, new, old)
            sum_xl = torch.where(better, new_xl, sum_xl)
            sum_l2 = torch.where(better, new_l2, sum_l2)
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, 0)
    return torch.stack(rows), scale


def _round(x: Tensor, factor: Tensor, levels: int) -> Tensor:
    """Codes of values, so many codes to a unit; none where that is not finite."""
    return (x * factor.nan_to_num(0, 0, 0)).round_().clamp_(0, levels)


def _extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first value of largest magnitude in every sub-block, 1 where all count as zeros."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    dead = extreme.abs() < _EPSILON
    return extreme.masked_fill(dead, 1), dead

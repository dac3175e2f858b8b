"""From a score per block to a sparsity per block that meets the budget.

The problem: published heuristics give every block a number, and map numbers to ratios in three ways
that leak budget (plain means over blocks of different size, clipping after scaling). The mappers
here say what the papers say; :func:`box_project` then meets the weighted mean exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ratios = NDArray[np.float64]


def minmax(values: ArrayLike) -> Ratios:
    """Scaled to 0 to 1; zeros where all are equal."""
    array = np.asarray(values, dtype=float)
    spread = float(array.max() - array.min())
    return np.zeros_like(array) if spread == 0 else (array - array.min()) / spread


def smooth(scores: ArrayLike, window: int = 7, order: int = 3) -> Ratios:
    """Savitzky-Golay along depth, as LayerIF smooths its influence scores.

    Args:
        scores: (blocks,) in the order of depth, at least ``window`` of them.
        window: Odd number of blocks that a polynomial is fitted to.
        order: Of the polynomial.

    Raises:
        ValueError: Fewer blocks than the window.
    """
    from scipy.signal import savgol_filter  # slow to load

    array = np.asarray(scores, dtype=float)
    if len(array) < window:
        raise ValueError(f"smoothing needs {window} blocks or more, got {len(array)}")
    return np.asarray(savgol_filter(array, window, order), dtype=float)


def spread_map(statistic: ArrayLike, sparsity: float, spread: float, *, sign: int) -> Ratios:
    """OWL's and DSA's mapper: keep ratios spread over ``2 spread``; the plain mean is met.

    Args:
        statistic: (blocks,) number of each block.
        sparsity: Plain mean of the result.
        spread: Half the range of keep ratios (lambda).
        sign: +1 if a larger statistic keeps more (OWL), -1 if less (DSA).
    """
    keep = minmax(sign * np.asarray(statistic, dtype=float)) * 2 * spread
    return np.asarray(1 - (keep - keep.mean() + 1 - sparsity))


def range_map(score: ArrayLike, sizes: ArrayLike, sparsity: float, epsilon: float) -> Ratios:
    """AlphaPruning's and LayerIF's mapper: a larger score prunes more; the weighted mean is met.

    Args:
        score: (blocks,) number of each block, smoothed where the method says so.
        sizes: (blocks,) weights of each block.
        sparsity: Weighted mean of the result.
        epsilon: Half the range of the ratios before scaling. The result may exceed 1.
    """
    weights = np.asarray(sizes, dtype=float)
    ratios = (1 - epsilon) + 2 * epsilon * minmax(score)
    scaled: Ratios = ratios * sparsity * weights.sum() / (weights @ ratios)
    return scaled


def entropic_map(
    score: ArrayLike, sizes: ArrayLike, sparsity: float, *, epsilon: float, cap: float = 0.8
) -> Ratios:
    """MoDeGPT's mapper: ``exp(-score / epsilon)``, capped and refilled; the weighted mean is met.

    Args:
        score: (blocks,) influence of each block; a larger one prunes less.
        sizes: (blocks,) weights of each block.
        sparsity: Weighted mean of the result.
        epsilon: Temperature; small ones concentrate the pruning.
        cap: Most that a block may lose.

    Raises:
        ValueError: The cap is below the mean.
    """
    values, weights = np.asarray(score, dtype=float), np.asarray(sizes, dtype=float)
    needed = sparsity * weights.sum()
    if cap * weights.sum() < needed:
        raise ValueError(f"a cap of {cap} cannot reach a mean of {sparsity}")
    ratios, free = np.zeros(len(values)), np.ones(len(values), bool)
    while True:
        exponent = np.where(free, -values / epsilon, -np.inf)
        shares = np.exp(exponent - exponent.max())
        left = needed - cap * weights[~free].sum()
        ratios[free] = left * shares[free] / (weights[free] @ shares[free])
        over = free & (ratios > cap + 1e-12)
        if not over.any():
            return ratios
        ratios[over] = cap
        free &= ~over


def box_project(
    ratios: ArrayLike, sizes: ArrayLike, mean: float, *, least: float = 0.0, most: float = 0.95
) -> Ratios:
    """Shift all ratios by one number, clip them to the box, so that the weighted mean is met.

    Args:
        ratios: (blocks,) of any mapper.
        sizes: (blocks,) weights of each block.
        mean: Weighted mean of the result; never below it, by a rounding error above.
        least: Of a block.
        most: Of a block.

    Raises:
        ValueError: The mean lies outside the box.
    """
    array, weights = np.asarray(ratios, dtype=float), np.asarray(sizes, dtype=float)
    if not least <= mean <= most:
        raise ValueError(f"a mean of {mean} lies outside {least} to {most}")
    low, high = least - float(array.max()), most - float(array.min())
    for _ in range(100):
        middle = (low + high) / 2
        if weights @ np.clip(array + middle, least, most) < mean * weights.sum():
            low = middle
        else:
            high = middle
    return np.clip(array + high, least, most)

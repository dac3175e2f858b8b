"""Spectral tail: blocks whose spectra have heavy tails are well trained and worth keeping.

AlphaPruning (Lu et al., NeurIPS 2024) fits a power law to the largest eigenvalues of ``W'W`` and
prunes the blocks with large exponents most. The cut above which eigenvalues belong to the tail is
the one that minimises the Kolmogorov-Smirnov distance to the fitted law, among eigenvalues between
0.95 and 1.5 times the peak of the histogram of their logarithms; the exponent is Hill's estimate.
The released code compares the lower end as a logarithm with a raw eigenvalue, so that it often has
no effect; here it is what it was meant to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives.mappers import Ratios, range_map
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import (
    BlockImportanceScorer,
    Importances,
    dense_matrices,
    units_by_block,
)

_NUM_BINS = 100
_WINDOW = (0.95, 1.5)  # of the histogram's peak
_ROUNDING = 1e-12  # of the largest eigenvalue


@dataclass(frozen=True)
class SpectralTail(BlockImportanceScorer):
    """AlphaPruning's exponents, averaged over a block's matrices, and its mapping.

    Attributes:
        epsilon: Half the range of the ratios before scaling. 0.1 to 0.3 are published; the widest
            is taken, whatever the operators.
    """

    epsilon: float = 0.3

    name: ClassVar[str] = "spectral_tail"

    def measure_blocks(self, context: ScoringContext) -> Importances:
        """One over the mean exponent of each block: a heavy tail has a small exponent.

        Raises:
            ValueError: The spectrum of a matrix has no tail that could be fitted.
        """
        means = []
        for units in units_by_block(context.space):
            exponents = []
            for unit in units:
                for member, matrix in dense_matrices(context, unit):
                    exponent = tail_exponent(squared_singular_values(matrix))
                    if not np.isfinite(exponent):
                        raise ValueError(
                            f"scorer {self.name}: the spectrum of {member.name} has no tail, "
                            "too few of its singular values differ; exclude it"
                        )
                    exponents.append(exponent)
            means.append(np.mean(exponents))
        return 1 / np.array(means)

    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """Ratios linear in the exponent: a heavier tail, keep more."""
        return range_map(1 / importances, sizes, removed, self.epsilon)


def squared_singular_values(matrix: Tensor) -> NDArray[np.float64]:
    """(min(rows, columns),) eigenvalues of the smaller of ``W'W`` and ``WW'``, ascending.

    In double precision this is several times faster than singular values in single precision, and
    closer.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.T.double()
    found = torch.linalg.eigvalsh(wide @ wide.T).clamp_(min=0)
    return np.asarray(found.cpu().numpy(), dtype=float)


def tail_exponent(eigenvalues: NDArray[np.float64]) -> float:
    """Exponent of the power law that the largest eigenvalues follow; NaN if none can be fitted.

    Hill's estimate ``1 + n / sum(log(e / cut))`` over the n eigenvalues from the cut on, at the cut
    with the least distance between the law and the empirical distribution.

    Args:
        eigenvalues: (count,) ascending; those of the size of rounding errors are left out.
    """
    positive = eigenvalues[eigenvalues > _ROUNDING * eigenvalues[-1]]
    if len(positive) < 2:
        return float("nan")
    peak = _peak(positive)
    inside = (positive >= _WINDOW[0] * peak) & (positive <= _WINDOW[1] * peak)
    best, exponent = float("inf"), float("nan")
    for start in np.flatnonzero(inside[:-1]):
        logs = np.log(positive[start:] / positive[start])
        if logs[-1] == 0:
            continue
        fitted = 1 + len(logs) / logs.sum()
        law = 1 - np.exp((1 - fitted) * logs)
        distance = np.abs(law - np.arange(len(logs)) / len(logs)).max()
        if distance < best:
            best, exponent = distance, fitted
    return float(exponent)


def _peak(positive: NDArray[np.float64]) -> float:
    """Lower edge of the fullest bin of the logarithms' histogram."""
    counts, edges = np.histogram(np.log10(positive), _NUM_BINS)
    return float(10 ** edges[counts.argmax()])

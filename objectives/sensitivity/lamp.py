"""LAMP: one cut for all matrices through magnitudes that are scored by what remains above them.

LAMP (Lee et al., ICLR 2021) scores the weight of rank u among a matrix's sorted magnitudes by
``w_u^2 / sum_{v >= u} w_v^2``, and removes the lowest scores of the model. Dropping that weight
multiplies the matrix's surviving energy by one minus its score, and scores rise with rank: so the
cut minimises, at a number of weights removed, the sum over matrices of ``-log(1 - relative
error)``. That sum is LAMP's own additive loss, and is the table here.

Scores are kept at up to 4096 ranks of each matrix, and the cut is found between them, so that a
large model's fit in memory. Ratios at a wanted mean need more than one number per unit: a scorer
remembers the scores of the last model whose importances it measured.
"""

from __future__ import annotations

from abc import abstractmethod
from math import log1p
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from objectives.mappers import Ratios
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import (
    Importances,
    ImportanceScorer,
    dense_matrices,
    unit_sizes,
)
from search_spaces.space import SearchSpace

_NUM_RANKS = 4096
_BISECTIONS = 100
_LEAST = 1e-300  # score of a weight that is zero; the cut is looked for among logarithms
_MOST_LOST = 1 - 1e-12  # an error of the whole energy, or more, is worth 28


class GlobalCut(ImportanceScorer):
    """Remove the weights with the lowest scores, wherever they are.

    A subclass says the scores of a matrix's sorted weights; they must not fall with rank.
    """

    def __init__(self) -> None:
        self._curves: list[list[_Curve]] = []

    @abstractmethod
    def scores(self, squares: NDArray[np.float32], ranks: NDArray[np.int64]) -> Ratios:
        """Scores of some weights of a matrix.

        Args:
            squares: (count,) of all its weights, ascending.
            ranks: Of the weights asked for, from 0, ascending.
        """

    def measure(self, context: ScoringContext) -> Importances:
        """The share of its weights that each unit keeps where half of all are removed."""
        self._curves = [
            [self._curve(np.sort(m.square().flatten().cpu().numpy())) for _, m in matrices]
            for matrices in (dense_matrices(context, u) for u in range(len(context.space.units)))
        ]
        return 1 - self._cut(unit_sizes(context.space), 0.5)

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """The cut at the mean: higher scores, keep more.

        Raises:
            ValueError: This scorer has not measured the importances of so many units.
        """
        if len(self._curves) != len(importances):
            raise ValueError(
                f"scorer {self.name}: its ratios come from the scores of single weights; "
                "call importances of the same scorer first"
            )
        return self._cut(unit_sizes(space), removed)

    def _curve(self, squares: NDArray[np.float32]) -> _Curve:
        last = len(squares) - 1
        ranks = np.unique(np.linspace(0, last, _NUM_RANKS).round().astype(np.int64))
        logs = np.log(np.maximum(self.scores(squares, ranks), _LEAST))
        return _Curve(logs, (ranks + 0.5) / len(squares), len(squares))

    def _cut(self, sizes: Ratios, removed: float) -> Ratios:
        """Each unit's share of scores below the cut that removes the wanted mean."""

        def shares(cut: float) -> Ratios:
            lost = [sum(curve.num_below(cut) for curve in unit) for unit in self._curves]
            return np.array(lost) / sizes

        low = min(curve.logs[0] for unit in self._curves for curve in unit)
        high = max(curve.logs[-1] for unit in self._curves for curve in unit)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if sizes @ shares(middle) < removed * sizes.sum():
                low = middle
            else:
                high = middle
        return shares(low)


class Lamp(GlobalCut):
    """LAMP's cut, and the additive loss that it minimises."""

    name: ClassVar[str] = "lamp"
    unit: ClassVar[str] = "lost_log_energy"

    def scores(self, squares: NDArray[np.float32], ranks: NDArray[np.int64]) -> Ratios:
        """``w_u^2 / sum_{v >= u} w_v^2``; zero where all that remains is zero."""
        above = np.cumsum(squares[::-1], dtype=np.float64)[::-1][ranks]
        return np.asarray(squares[ranks] / np.where(above > 0, above, 1.0))

    def loss(self, context: ScoringContext, unit: int, option: int, importance: float) -> float:
        """``-log(1 - relative error)`` summed over matrices."""
        del importance
        total = 0.0
        for _, weights, errors, _ in context.errors(unit, option):
            for weight, error in zip(weights, errors, strict=True):
                energy = float(weight.square().sum(dtype=torch.float64))
                lost = float(error.square().sum(dtype=torch.float64))
                # NaN stays NaN
                total -= log1p(-min(lost / energy, _MOST_LOST)) if energy != 0 else 0.0
        return total


class Magnitude(GlobalCut):
    """The same cut through the magnitudes themselves: the baseline of LAMP's paper.

    It minimises the summed squared error, its table. The scales of matrices differ for reasons of
    no importance, which is what LAMP's scores mend.
    """

    name: ClassVar[str] = "magnitude"
    unit: ClassVar[str] = "squared_error"

    def scores(self, squares: NDArray[np.float32], ranks: NDArray[np.int64]) -> Ratios:
        """Squared weights."""
        return np.asarray(squares[ranks], dtype=float)

    def loss(self, context: ScoringContext, unit: int, option: int, importance: float) -> float:
        """Summed squared weight error."""
        del importance
        return sum(
            float(error.square().sum(dtype=torch.float64))
            for _, _, error, _ in context.errors(unit, option)
        )


class _Curve:
    """How many weights of one matrix score below a cut."""

    def __init__(self, logs: Ratios, shares: Ratios, num_weights: int) -> None:
        self.logs = logs
        self._shares = shares
        self._num_weights = num_weights

    def num_below(self, cut: float) -> float:
        """Weights below a cut through logarithms of scores, between ranks by interpolation."""
        share = np.interp(cut, self.logs, self._shares, left=0.0, right=1.0)
        return float(share * self._num_weights)

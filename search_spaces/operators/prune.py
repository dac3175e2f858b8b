"""Pruning without an update: drop the weights that a score holds for the least important.

The problem: which weights of a matrix can go. Four answers, from no data to gradients:

- ``magnitude``: ``|w|``.
- ``wanda``: ``|w| * sqrt(E x^2)``, the norm of the input that the weight reads (Sun et al., 2023).
- ``fisher``: ``F w^2 / 2``, the second-order estimate of what removing the weight costs.
- ``d_pruner``: the two-sided importance of D-Pruner (Zhang et al., 2024). A weight's general
  importance is the error of removing it by the optimal brain surgeon with a diagonal Hessian,
  ``G = w^2 E x^2 / 2``. It regularises the gradient g of the domain's loss at the paper's strength
  of 0.1, ``g' = g (1 + 0.1 G / mean(G))``, and the score is ``|g'w| + (g'w)^2 / 2``. The paper
  takes G on open text and g on the domain's; here both come from the calibration text. The Fisher
  holds no signs, so g is the root mean square of the gradient and the two terms cannot cancel.

How many weights go follows from the shape alone: the same number in each row (as Wanda found to be
best for language models), or the lowest of the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, Statistics, required
from search_spaces.operators.keep import Keep
from search_spaces.operators.sparse_storage import (
    GroupedStorage,
    SparseOperator,
    SparseStorage,
    refuse_values,
    values_label,
)

if TYPE_CHECKING:
    from torch import Tensor

SCORE_NEEDS: dict[str, frozenset[str]] = {
    "magnitude": frozenset(),
    "wanda": frozenset({"second_moment"}),
    "fisher": frozenset({"fisher"}),
    "d_pruner": frozenset({"fisher", "second_moment"}),
}
_PATTERNS = ("row", "matrix")
_GENERAL_STRENGTH = 0.1
_MOST_GROUP = 256


@dataclass(frozen=True)
class Prune(SparseOperator):
    """Drop a share of the weights, the lowest scores first.

    Attributes:
        sparsity: Share of the weights to drop, 0 to 1; rounded to whole weights.
        score: ``magnitude``, ``wanda``, ``fisher`` or ``d_pruner``.
        pattern: ``row`` drops the same number in each row, ``matrix`` the lowest of the matrix.
        values: Stores the weights that are kept: prune, then quantize.
    """

    sparsity: float
    score: str = "magnitude"
    pattern: str = "row"
    values: Operator = field(default_factory=Keep)

    name: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)
        _check_score(self.name, self.score)
        if self.pattern not in _PATTERNS:
            raise ValueError(f"prune: pattern must be row or matrix, got {self.pattern!r}")
        refuse_values(self.name, self.values)

    @property
    def needs(self) -> frozenset[str]:
        """What the score and the values need."""
        return SCORE_NEEDS[self.score] | self.values.needs

    @property
    def label(self) -> str:
        """For example ``wanda0.5``, ``matrix-magnitude0.5`` or ``magnitude0.5+int4-g64``."""
        scope = "" if self.pattern == "row" else "matrix-"
        return f"{scope}{self.score}{self.sparsity:g}{values_label(self.values)}"

    def storage(self, shape: Matrix) -> SparseStorage:
        """Even rows, or only their total known."""
        rows, columns = shape
        if self.pattern == "row":
            num_kept = rows * (columns - num_pruned(columns, self.sparsity))
            return SparseStorage(shape, num_kept, self.values, even=True)
        num_weights = rows * columns
        num_kept = num_weights - num_pruned(num_weights, self.sparsity)
        return SparseStorage(shape, num_kept, self.values)

    def select(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The highest scores of each row or of the matrix; the weights stay as they are."""
        rows, columns = weight.shape
        scores = score_weights(self.score, weight, stats, self.name)
        num_kept = self.num_kept((rows, columns))
        if self.pattern == "row":
            return keep_highest(scores, num_kept // rows), weight
        return keep_highest(scores.reshape(1, -1), num_kept).reshape(weight.shape), weight


@dataclass(frozen=True)
class PruneNM(SparseOperator):
    """Keep n of every m consecutive weights of a row, the highest scores.

    Attributes:
        n: Weights kept of a group.
        m: Weights in a group, 2 to 256; the columns must be whole groups.
        score: ``magnitude``, ``wanda``, ``fisher`` or ``d_pruner``.
        values: Stores the weights that are kept.
    """

    n: int = 2
    m: int = 4
    score: str = "magnitude"
    values: Operator = field(default_factory=Keep)

    name: ClassVar[str] = "prune_n_m"

    def __post_init__(self) -> None:
        check_n_m(self.name, self.n, self.m)
        _check_score(self.name, self.score)
        refuse_values(self.name, self.values)

    @property
    def needs(self) -> frozenset[str]:
        """What the score and the values need."""
        return SCORE_NEEDS[self.score] | self.values.needs

    @property
    def label(self) -> str:
        """For example ``wanda-2:4``."""
        return f"{self.score}-{self.n}:{self.m}{values_label(self.values)}"

    def storage(self, shape: Matrix) -> GroupedStorage:
        """The kept weights of each group and their places in it."""
        return GroupedStorage(shape, self.n, self.m, self.values)

    def select(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The highest scores of each group; the weights stay as they are."""
        scores = score_weights(self.score, weight, stats, self.name)
        return keep_highest(scores.reshape(-1, self.m), self.n).reshape(weight.shape), weight


def num_pruned(num_weights: int, sparsity: float) -> int:
    """Weights to drop of so many, to the nearest; halves up."""
    return min(num_weights, int(num_weights * sparsity + 0.5))


def score_weights(score: str, weight: Tensor, stats: Statistics, operator: str) -> Tensor:
    """Importance of each weight; larger means keep.

    Args:
        score: A name of ``SCORE_NEEDS``.
        weight: (rows, columns) float32.
        stats: What the score needs.
        operator: For the message when something is missing.

    Returns:
        (rows, columns) float32, not negative.

    Raises:
        ValueError: A statistic that the score needs is missing.
    """
    if score == "magnitude":
        return weight.abs()
    if score == "wanda":
        return weight.abs() * required(stats, "second_moment", operator).to(weight).sqrt()
    fisher = required(stats, "fisher", operator).to(weight)
    if score == "fisher":
        return weight.square() * fisher / 2
    general = weight.square() * required(stats, "second_moment", operator).to(weight) / 2
    mean = general.mean().clamp_(min=1e-30)  # all zero where nothing fires: no regularisation
    change = weight.abs() * fisher.sqrt() * (1 + _GENERAL_STRENGTH * general / mean)
    return change + change.square() / 2


def keep_highest(scores: Tensor, num_kept: int) -> Tensor:
    """Mark exactly so many of the highest scores of each row; of equal scores the first ones.

    Args:
        scores: (rows, columns); infinite ones are kept or dropped before all others.
        num_kept: Per row.

    Returns:
        (rows, columns) bool, true where kept.

    Raises:
        ValueError: A score is not a number.
    """
    import torch

    if scores.isnan().any():
        raise ValueError("pruning scores must be numbers: weights or statistics hold inf or NaN")
    columns = scores.shape[1]
    if num_kept in (0, columns):
        return torch.full_like(scores, num_kept > 0, dtype=torch.bool)
    least = _kth_least(scores, columns - num_kept)
    above, equal = scores > least, scores == least
    missing = num_kept - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))


def _kth_least(scores: Tensor, k: int) -> Tensor:
    """(rows, 1) value that k of each row's scores come before."""
    import numpy as np
    import torch

    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        found = np.partition(scores.detach().numpy(), k, axis=1)[:, k : k + 1]  # six times faster
        return torch.from_numpy(found)
    return scores.kthvalue(k + 1, dim=1, keepdim=True).values


def check_sparsity(operator: str, sparsity: float) -> None:
    """Refuse a share outside 0 to 1."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{operator}: sparsity must be 0 to 1, got {sparsity}")


def check_n_m(operator: str, n: int, m: int) -> None:
    """Refuse a pattern that keeps nothing or everything of its groups."""
    if not 2 <= m <= _MOST_GROUP:
        raise ValueError(f"{operator}: m must be 2 to {_MOST_GROUP}, got {m}")
    if not 0 < n < m:
        raise ValueError(f"{operator}: n must be 1 to m - 1 = {m - 1}, got {n}")


def _check_score(operator: str, score: str) -> None:
    if score not in SCORE_NEEDS:
        raise ValueError(f"{operator}: score must be {', '.join(SCORE_NEEDS)}, got {score!r}")

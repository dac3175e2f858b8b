"""Pruning whose rows keep different numbers of weights; only the matrix's total is fixed.

The problem: outputs differ in how much they can lose, so that the same share for each row wastes
weights. How the matrix's weights are divided among its rows:

- ``water``: what a row loses is the sum of its dropped weights' losses (squared scores; Fisher
  estimates as they are). Dropped in order of score these sums are convex, so one multiplier for all
  rows gives the split of least loss: every row keeps the weights of more loss than one same level.
- ``trim``: TRIM (targeted row-wise iterative metric-driven pruning, 2025). Rows whose outputs point
  where the dense ones do are pruned more, step by step, and the row vector with the best matrix
  quality is kept, the uniform one included. Qualities are cosines between dense and pruned outputs;
  the paper takes them on the last token of each sequence, here the Hessian takes them on all.
  Unlike the paper's loop, totals are exact at every step (box projection, largest remainder) and
  the whole grid of learning rates is tried, since a tie ended its sweep early.

Which losses ``water`` compares between rows matters more than the split itself. Wanda's squared
scores count the error of every output alike. ``factored_fisher`` weighs them by how much the loss
feels that output, in nats, so that rows of different matrices can be compared as well: a gradient
is an output's gradient times an input, so the Fisher is about ``E d^2 E x^2`` (the diagonals of the
factors of K-FAC, Martens and Grosse, 2015), with ``E d^2`` the row's Fisher over the sum of
``E x^2``.

The mask says which weights each row kept, so nothing else is stored and a plan needs the operator
only. A share of each row is kept whatever it scores: an output that is gone is gone for all text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, Statistics, required
from search_spaces.operators.keep import Keep
from search_spaces.operators.prune import (
    SCORE_NEEDS,
    check_sparsity,
    keep_highest,
    num_pruned,
    score_weights,
)
from search_spaces.operators.sparse_storage import (
    SparseOperator,
    SparseStorage,
    refuse_values,
    values_label,
)

if TYPE_CHECKING:
    from torch import Tensor

_SPLITS = {"water": "rows", "trim": "trim"}
_DEFAULT_FLOOR = 0.05
_SCORES = {**SCORE_NEEDS, "factored_fisher": frozenset({"fisher", "second_moment"})}
_SQUARED = ("magnitude", "wanda")  # scores whose squares are losses; the others are losses

_RATES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16, -0.01, -0.02, -0.04)  # TRIM's, of both directions
_NUM_STEPS = 10
_NUM_SLABS = 32  # of columns, in which the outputs of all prefixes are computed
_MOST_GATHERED = 1 << 22  # numbers gathered at once


@dataclass(frozen=True)
class RowPrune(SparseOperator):
    """Drop a share of a matrix, each row its own.

    Attributes:
        sparsity: Share of the matrix's weights to drop, 0 to 1; rounded to whole weights, halves
            up, so that ``rows * columns - floor(rows * columns * sparsity + 1/2)`` are kept.
        split: ``water`` or ``trim``.
        score: Orders the weights of a row, and says what ``water`` compares between rows:
            ``magnitude``, ``wanda``, ``fisher``, ``d_pruner`` or ``factored_fisher``, which orders
            the weights of a row as ``wanda`` does.
        values: Stores the weights that are kept.
        floor: Least share that each row keeps, rounded up to whole weights; lowered to an even
            share where the total is smaller than that.
        keep_exactly: Weights that the matrix keeps, in place of what ``sparsity`` says, so that a
            joint allocation can be stated to the weight; 0 to go by ``sparsity``.
    """

    sparsity: float
    split: str = "water"
    score: str = "wanda"
    values: Operator = field(default_factory=Keep)
    floor: float = _DEFAULT_FLOOR
    keep_exactly: int = 0

    name: ClassVar[str] = "row_prune"

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)
        if self.split not in _SPLITS:
            raise ValueError(f"row_prune: split must be {' or '.join(_SPLITS)}, got {self.split!r}")
        if self.score not in _SCORES:
            known = ", ".join(_SCORES)
            raise ValueError(f"row_prune: score must be one of {known}, got {self.score!r}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"row_prune: floor must be 0 to 1, got {self.floor}")
        if self.keep_exactly < 0:
            raise ValueError(f"row_prune: keep_exactly must be >= 0, got {self.keep_exactly}")
        refuse_values(self.name, self.values)

    @property
    def needs(self) -> frozenset[str]:
        """What the split, the score and the values need."""
        own = frozenset({"hessian"}) if self.split == "trim" else frozenset[str]()
        return own | _SCORES[self.score] | self.values.needs

    @property
    def label(self) -> str:
        """For example ``rows-wanda0.5``, ``trim-wanda0.5+int4-g64`` or ``rows-fisher0.5=1024``."""
        exactly = f"={self.keep_exactly}" if self.keep_exactly else ""
        floor = "" if self.floor == _DEFAULT_FLOOR else f"-floor{self.floor:g}"
        split = _SPLITS[self.split]
        return f"{split}-{self.score}{self.sparsity:g}{exactly}{floor}{values_label(self.values)}"

    def unfit(self, shape: Matrix) -> str:
        """Nothing, unless the matrix has too few weights or the values do not fit."""
        num_weights = math.prod(shape)
        if self.keep_exactly > num_weights:
            return f"keeps {self.keep_exactly} weights of a matrix that has {num_weights}"
        return super().unfit(shape)

    def storage(self, shape: Matrix) -> SparseStorage:
        """Rows of any lengths with an exact total."""
        num_weights = math.prod(shape)
        num_kept = self.keep_exactly or num_weights - num_pruned(num_weights, self.sparsity)
        return SparseStorage(shape, num_kept, self.values)

    def select(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """The highest scores of each row, as many as the split gives it; they stay as they are.

        Raises:
            ValueError: A statistic is missing, or something is not finite.
        """
        import torch

        rows, columns = weight.shape
        scores = weight_losses(self.score, weight, stats)
        num_kept = self.num_kept((rows, columns))
        least = min(*kept_counts(columns, [self.floor]), num_kept // rows)
        if self.split == "water":
            sure = keep_highest(scores, least)
            others = scores.masked_fill(sure, -1.0).reshape(1, -1)  # below every score
            more = keep_highest(others, num_kept - rows * least)
            return sure | more.reshape(weight.shape), weight
        hessian = required(stats, "hessian", self.name).to(weight)
        if not (bool(scores.isfinite().all()) and bool(hessian.isfinite().all())):
            raise ValueError("row_prune: expected finite weights and statistics, got inf or NaN")
        order = scores.argsort(dim=1, descending=True, stable=True)
        counts = _trim(_prefix_outputs(weight, hessian, order), num_kept, least)
        places = torch.arange(columns, device=weight.device) < counts[:, None]
        return torch.zeros_like(places).scatter_(1, order, places), weight


def weight_losses(score: str, weight: Tensor, stats: Statistics) -> Tensor:
    """What dropping each weight loses, as ``water`` sums it; larger means keep.

    Args:
        score: A score of :class:`RowPrune`.
        weight: (rows, columns).
        stats: What the score needs.

    Returns:
        (rows, columns) float32, not negative.

    Raises:
        ValueError: A statistic that the score needs is missing.
    """
    weight = weight.float()
    if score == "factored_fisher":
        moment = required(stats, "second_moment", RowPrune.name).to(weight)
        fisher = required(stats, "fisher", RowPrune.name).to(weight)
        gradients = fisher.sum(1, keepdim=True) / moment.sum().clamp(min=1e-30)
        return gradients * weight.square() * moment / 2
    scores = score_weights(score, weight, stats, RowPrune.name)
    return scores.square() if score in _SQUARED else scores


def kept_counts(columns: int, shares: Sequence[float]) -> list[int]:
    """Whole weights of a row that these shares of it are, rounded up."""
    # A share like 0.1 of 30 is a hair more than 3 in floating point.
    return [min(columns, math.ceil(columns * share - 1e-9)) for share in shares]


def row_losses(losses: Tensor, kept: Sequence[int]) -> Tensor:
    """What each row loses when it keeps so many of its weights.

    Args:
        losses: (rows, columns) of the weights.
        kept: (num_options,) numbers of weights kept, 0 to columns.

    Returns:
        (rows, num_options) float32.
    """
    import torch

    columns = losses.shape[1]
    ascending = losses.double().sort(dim=1).values
    dropped = torch.nn.functional.pad(ascending.cumsum(1), (1, 0))
    places = torch.tensor([columns - number for number in kept], device=losses.device)
    return dropped[:, places].float()


@dataclass(frozen=True)
class _PrefixOutputs:
    """Outputs of the rows when each keeps its first k weights in order of importance.

    Attributes:
        products: (rows, columns + 1) float64 mean product of the dense output and the output at k.
        squares: (rows, columns + 1) float64 mean square of the output at k.
    """

    products: Tensor
    squares: Tensor

    def row_quality(self, counts: Tensor) -> Tensor:
        """(..., rows) numbers of weights kept -> cosines; 1 for a row that puts nothing out."""
        product, square = self._at(counts)
        norms = (self.products[:, -1] * square).sqrt()
        return (product / norms).where(norms > 0, (self.products[:, -1] == 0).to(norms))

    def quality(self, counts: Tensor) -> Tensor:
        """(..., rows) numbers of weights kept -> (...) cosine of all outputs taken together."""
        product, square = (part.sum(-1) for part in self._at(counts))
        norms = (self.products[:, -1].sum() * square).sqrt()
        return (product / norms).where(norms > 0, norms.new_zeros(()))

    def _at(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        rows = torch.arange(len(self.products), device=counts.device).expand_as(counts)
        return self.products[rows, counts], self.squares[rows, counts]


def _prefix_outputs(weight: Tensor, hessian: Tensor, order: Tensor) -> _PrefixOutputs:
    """All prefixes at the cost of a few matrix products.

    The k-th weight w adds ``w^2 H_kk + 2 w sum_b H_kb w_b`` over the weights b before it: those of
    earlier slabs by one product for the whole slab, those of its own by gathering.

    Args:
        weight: (rows, columns) float32.
        hessian: (columns, columns) mean outer product of the inputs.
        order: (rows, columns) columns of each row, most important first.
    """
    import torch
    from torch.nn.functional import pad

    columns = weight.shape[1]
    width = max(16, -(-columns // _NUM_SLABS))
    chunk = max(1, _MOST_GATHERED // width**2)
    products, squares = [], []
    for own, places in zip(torch.split(weight, chunk), torch.split(order, chunk), strict=True):
        ordered = own.gather(1, places)
        products.append((ordered * (own @ hessian).gather(1, places)).double().cumsum(1))
        kept, added = torch.zeros_like(own), []
        slabs = zip(torch.split(places, width, 1), torch.split(ordered, width, 1), strict=True)
        for slab, values in slabs:
            inner = hessian[slab[:, :, None], slab[:, None, :]]
            before = (kept @ hessian).gather(1, slab)
            before += (inner.tril(-1) @ values[:, :, None]).squeeze(-1)
            added.append(values * (values * inner.diagonal(dim1=1, dim2=2) + 2 * before))
            kept.scatter_(1, slab, values)
        squares.append(torch.cat(added, 1).double().cumsum(1).clamp_(min=0))
    made = (pad(torch.cat(parts), (1, 0)) for parts in (products, squares))
    return _PrefixOutputs(*made)


def _trim(outputs: _PrefixOutputs, num_kept: int, least: int) -> Tensor:
    """TRIM's iteration, all learning rates side by side.

    Args:
        outputs: Of the matrix.
        num_kept: Weights kept in the whole matrix.
        least: Weights that every row keeps.

    Returns:
        (rows,) weights kept per row; of the counts seen those of best quality, the first of equals,
        beginning with the uniform ones.
    """
    import torch

    rows, columns = outputs.products.shape[0], outputs.products.shape[1] - 1
    rates = outputs.products.new_tensor(_RATES)[:, None]
    wanted = outputs.products.new_full((len(_RATES), rows), num_kept / rows)
    counts = exact_counts(wanted, num_kept, least, columns)
    best, best_quality = counts[0], outputs.quality(counts[0])
    for _ in range(_NUM_STEPS):
        quality = outputs.row_quality(counts)
        low, high = quality.amin(1, keepdim=True), quality.amax(1, keepdim=True)
        pruned_more = (quality - low) / (high - low + 1e-6) * 2 * rates
        wanted = project_counts(wanted - columns * pruned_more, num_kept, least, columns)
        counts = exact_counts(wanted, num_kept, least, columns)
        reached, where = outputs.quality(counts).max(0)
        if bool(reached > best_quality):
            best, best_quality = counts[int(where)], reached
    return torch.as_tensor(best)


def project_counts(wanted: Tensor, total: int, least: int, most: int) -> Tensor:
    """Shift every row by the same number, clipped to the box, until the sum is the total.

    Args:
        wanted: (..., rows) float64 weights per row.
        total: Sum to reach, ``rows * least`` to ``rows * most``.
        least: Of a row.
        most: Of a row.
    """
    low = least - wanted.amax(-1, keepdim=True)
    high = most - wanted.amin(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        below = (wanted + middle).clamp(least, most).sum(-1, keepdim=True) < total
        low, high = middle.where(below, low), high.where(below, middle)
    return (wanted + high).clamp(least, most)


def exact_counts(wanted: Tensor, total: int, least: int, most: int) -> Tensor:
    """Whole numbers with the exact total, by largest remainder; equal remainders go by index.

    Args:
        wanted: (..., rows) float64 weights per row that sum up to the total but for rounding.
        total: Their sum.
        least: Of a row.
        most: Of a row.

    Returns:
        (..., rows) int64.
    """
    import torch

    counts = wanted.clamp(least, most).floor().long()
    while bool((missing := total - counts.sum(-1, keepdim=True)).any()):
        step = missing.sign()
        may = ((counts < most) & (step > 0)) | ((counts > least) & (step < 0))
        assert bool((may.any(-1, keepdim=True) | (missing == 0)).all()), "the box holds no such sum"
        urgency = (step * (wanted - counts)).masked_fill(~may, -torch.inf)
        rank = urgency.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        counts = counts + step * (may & (rank < missing.abs()))
    return counts

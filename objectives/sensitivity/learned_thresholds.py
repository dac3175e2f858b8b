"""Lua-LLM: a threshold for every row of every matrix, learned on the loss of the whole model.

The problem: row sparsities from local errors do not know what the loss feels. Lua-LLM (NeurIPS
2025) ranks the weights of each row by Wanda's score, so that a threshold between 0 and 1 is the
row's sparsity, masks them softly, ``sigmoid((rank / n - t) n)``, and learns all thresholds at once
on ``cross-entropy + lambda |log(kept / wanted)|``. Weights stay frozen.

What we do otherwise: the penalty only encourages the budget, so thresholds are shifted by one
number until the count is exact; the hard masks of that count are measured at the start and after
each epoch, and the best are taken, so that the result is never worse on this text than one share
for all. Steps follow the text: epochs times sequences (the paper's 500 are about 4 epochs of 128
sequences), at a learning rate that suits few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives.mappers import Ratios
from objectives.row_masks import exact_survivors, least_share, row_ranks
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import Importances, ImportanceScorer
from objectives.statistics import gradient_hooks
from search_spaces.operators.members import logical, physical
from search_spaces.space import Member, SearchSpace


@dataclass(frozen=True)
class LearnedThresholds(ImportanceScorer):
    """Importance is the share of its weights that a unit keeps.

    Attributes:
        removed: Share of all searched weights to drop; met to the weight.
        epochs: Passes over the statistics sequences, one step per sequence.
        learning_rate: Of AdamW, in sparsity per step.
        penalty: Lambda, of the two-sided logarithm.
        weight_decay: Of AdamW; pulls thresholds to 0, which keeps more.
        floor: Least share that each row keeps, rounded up to whole weights, at least one.
    """

    removed: float = 0.5
    epochs: int = 2
    learning_rate: float = 0.01
    penalty: float = 16.0
    weight_decay: float = 0.05
    floor: float = 0.05

    name: ClassVar[str] = "learned_thresholds"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __post_init__(self) -> None:
        if not 0 < self.removed < 1:
            raise ValueError(
                f"scorer learned_thresholds: removed must be between 0 and 1, got {self.removed}"
            )
        if not 0 <= self.floor <= 1 - self.removed:
            raise ValueError(
                f"scorer learned_thresholds: floor must be 0 to {1 - self.removed:g}, the share "
                f"that is kept, got {self.floor}"
            )
        if self.epochs < 1:
            raise ValueError(f"scorer learned_thresholds: epochs must be >= 1, got {self.epochs}")

    def measure(self, context: ScoringContext) -> Importances:
        """Shares kept."""
        survivors = self.survivors(context)
        return np.array(
            [
                sum(int(survivors[member.name].sum()) for member in unit.members) / unit.num_weights
                for unit in context.space.units
            ]
        )

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """What was learned; it meets the share that was learned for."""
        del space, removed
        return np.asarray(1 - importances)

    def survivors(self, context: ScoringContext) -> dict[str, NDArray[np.int64]]:
        """Weights that each row keeps, exact in their sum; `RowPrune` takes a matrix's total.

        Returns:
            By member name, (rows,) or (matrices, rows).

        Raises:
            ValueError: A unit is a cache, or the inputs of a parameter cannot be observed.
        """
        self.refuse_caches(context.space)
        context.bank.restore()
        try:
            counts = _Training(self, context).run()
        finally:
            context.bank.restore()
        return counts


class _Rows:
    """The rows of one parameter: ranks of their weights and thresholds."""

    def __init__(self, member: Member, dense: Tensor, ranks: Tensor, start: float) -> None:
        self.member = member
        self.dense = dense
        self.ranks = ranks
        self.thresholds = torch.full(dense.shape[:2], start, device=dense.device)
        self.gradient = torch.zeros_like(self.thresholds)
        self.slopes = torch.zeros_like(self.thresholds)

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return self.dense.shape[-1]

    def soft(self) -> Tensor:
        """(matrices, rows, columns) mask, within a few ranks of the threshold between 0 and 1."""
        return (self.ranks - self.thresholds[..., None] * self.columns).sigmoid_()

    def hard(self, counts: Tensor) -> Tensor:
        """(matrices, rows, columns) mask of exactly so many weights per row."""
        return self.ranks > self.columns - counts[..., None]

    def masked(self, mask: Tensor) -> Tensor:
        """As the model holds it."""
        return physical((self.dense * mask).to(self.dense.dtype), self.member)

    def num_kept(self) -> int:
        """Weights whose soft mask rounds to one."""
        dropped = (self.thresholds * self.columns).floor().sum(dtype=torch.float64)
        return self.dense.numel() - int(dropped)


class _Training:
    """AdamW on the thresholds; the model's parameters are pointed at masked copies."""

    def __init__(self, wish: LearnedThresholds, context: ScoringContext) -> None:
        self._wish = wish
        self._context = context
        self._rows: dict[str, _Rows] = {}
        for index, unit in enumerate(context.space.units):
            for member, dense in zip(unit.members, context.bank.dense(index), strict=True):
                weight, stats = logical(dense, member), context.statistics[member.name]
                ranks = row_ranks(weight, member, stats, wish.name)
                self._rows[member.name] = _Rows(member, weight, ranks, wish.removed)
        parts = [np.full(r.thresholds.numel(), r.columns) for r in self._rows.values()]
        self._columns = np.concatenate(parts).astype(np.int64)
        self._ends = np.cumsum([len(part) for part in parts])[:-1]
        self._least = least_share(self._columns, wish.floor)

    def run(self) -> dict[str, NDArray[np.int64]]:
        """The best of the exact counts at the start and after each epoch."""
        sequences = np.array(self._context.sequences)
        random = np.random.default_rng(self._context.seed)
        optimizer = torch.optim.AdamW(
            [rows.thresholds for rows in self._rows.values()],
            lr=self._wish.learning_rate,
            weight_decay=self._wish.weight_decay,
        )
        best = self._counts()
        best_loss = self._hard_loss(best)
        for _ in range(self._wish.epochs):
            for index in random.permutation(sequences).tolist():
                self._differentiate(index)
                optimizer.step()
                for rows in self._rows.values():
                    rows.thresholds.clamp_(0, 1 - self._least)
            counts = self._counts()
            loss = self._hard_loss(counts)
            if loss < best_loss:
                best, best_loss = counts, loss
        return {
            name: counts.reshape(rows.member.shape[:-1])
            for (name, rows), counts in zip(self._rows.items(), best, strict=True)
        }

    def _counts(self) -> list[NDArray[np.int64]]:
        """Exact survivors of the thresholds as they stand, one array per parameter."""
        flat = torch.cat([rows.thresholds.flatten().cpu() for rows in self._rows.values()])
        keep = 1 - flat.double().numpy()
        found = exact_survivors(keep, self._columns, self._wish.removed, self._least)
        return np.split(found, self._ends)

    def _differentiate(self, index: int) -> None:
        """Gradients of cross-entropy and penalty under soft masks."""
        context = self._context
        for name, rows in self._rows.items():
            mask = rows.soft()
            context.model.get_parameter(name).data = rows.masked(mask)
            rows.slopes = -rows.columns * (mask * (1 - mask)).sum(-1)
            rows.gradient.zero_()
        with gradient_hooks(context.model, self._rows, self._fold):
            loss = context.task.likelihood_loss(context.model, "statistics", index)
            loss.backward()  # type: ignore[no-untyped-call]
        context.meter.add("statistics", context.task.tokens_per_sequence)
        context.meter.add("statistics_backward", 2 * context.task.tokens_per_sequence)
        num_weights = int(self._columns.sum())
        kept = sum(rows.num_kept() for rows in self._rows.values()) / num_weights
        # |log(kept / wanted)|, straight through the rounding of the masks.
        pull = float(np.sign(kept - (1 - self._wish.removed))) / max(kept, 1 / num_weights)
        for rows in self._rows.values():
            penalty = self._wish.penalty * pull / num_weights * rows.slopes
            rows.thresholds.grad = rows.gradient + penalty

    def _fold(self, name: str, gradient: Tensor) -> None:
        rows = self._rows[name]
        mask = rows.soft()
        change = logical(gradient, rows.member) * rows.dense * mask * (1 - mask)
        rows.gradient -= rows.columns * change.sum(-1)

    def _hard_loss(self, counts: Sequence[NDArray[np.int64]]) -> float:
        """Mean cross-entropy under exact masks."""
        context = self._context
        for (name, rows), own in zip(self._rows.items(), counts, strict=True):
            numbers = torch.from_numpy(own).to(rows.dense.device).reshape(rows.thresholds.shape)
            context.model.get_parameter(name).data = rows.masked(rows.hard(numbers))
        total = 0.0
        with torch.no_grad():
            for index in context.sequences:
                total += float(context.task.likelihood_loss(context.model, "statistics", index))
                context.meter.add("statistics", context.task.tokens_per_sequence)
        return total / len(context.sequences)

"""SparseGPT: prune column by column, and let the columns still to come make up for the loss.

The problem: dropping weights by a score leaves the error of the output as it falls. Inputs are
correlated, so the weights that stay can take over what the dropped ones did: the optimal brain
surgeon, with one Hessian for all rows by always compensating to the right. Frantar and Alistarh,
"SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023), algorithm 1.

The paper chooses a mask for whole blocks of columns, so that rows end with different numbers of
weights. Here each row loses the same exact number, spread evenly over the blocks, so that the bytes
follow from the shape. Such a quota can be worse than none where inputs are hardly correlated and
there is little to compensate: a row whose output error is then greater than by a plain cut with
Wanda's score takes that cut. So no row is ever worse than with Wanda, before the values are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, Statistics, required
from search_spaces.operators.hessian import FACTORS, output_errors
from search_spaces.operators.keep import Keep
from search_spaces.operators.prune import check_n_m, check_sparsity, keep_highest, num_pruned
from search_spaces.operators.sparse_storage import (
    GroupedStorage,
    SparseOperator,
    SparseStorage,
    refuse_values,
    values_label,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseGPT(SparseOperator):
    """Prune with an update of the weights that stay, the same number in each row or n of every m.

    Attributes:
        sparsity: Share of each row to drop, 0 to 1, rounded to whole weights; with n of m it must
            be ``1 - n / m``.
        block: Columns whose mask is chosen at once; whole groups with n of m.
        damping: Added to the diagonal of the Hessian, as a fraction of its mean.
        values: Stores the weights that are kept; what it rounds is not compensated for.
        n: Weights kept of every m consecutive ones of a row; 0 for any places.
        m: Weights in such a group; 0 for any places.
    """

    sparsity: float
    block: int = 128
    damping: float = 0.01
    values: Operator = field(default_factory=Keep)
    n: int = 0
    m: int = 0

    name: ClassVar[str] = "sparse_gpt"

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)
        if self.block < 1:
            raise ValueError(f"sparse_gpt: block must be at least 1, got {self.block}")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"sparse_gpt: damping must be positive and finite, got {self.damping}")
        if self.n or self.m:
            check_n_m(self.name, self.n, self.m)
            if self.block % self.m:
                raise ValueError(
                    f"sparse_gpt: block must be whole groups of m = {self.m}, got {self.block}"
                )
            if self.sparsity != 1 - self.n / self.m:
                raise ValueError(
                    f"sparse_gpt: sparsity must be {1 - self.n / self.m} for {self.n}:{self.m}, "
                    f"got {self.sparsity}"
                )
        refuse_values(self.name, self.values)

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, and what the values need."""
        return frozenset({"hessian"}) | self.values.needs

    @property
    def label(self) -> str:
        """For example ``sparsegpt0.5`` or ``sparsegpt-2:4``."""
        amount = f"-{self.n}:{self.m}" if self.m else f"{self.sparsity:g}"
        block = "" if self.block == 128 else f"-b{self.block}"
        damping = "" if self.damping == 0.01 else f"-d{self.damping:g}"
        return f"sparsegpt{amount}{block}{damping}{values_label(self.values)}"

    def storage(self, shape: Matrix) -> SparseStorage | GroupedStorage:
        """Even rows, or the kept weights of each group and their places in it."""
        if self.m:
            return GroupedStorage(shape, self.n, self.m, self.values)
        rows, columns = shape
        num_kept = rows * (columns - num_pruned(columns, self.sparsity))
        return SparseStorage(shape, num_kept, self.values, even=True)

    def select(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Row by row the better of the compensated weights and the plain cut.

        Raises:
            ValueError: There is no Hessian, or it is not finite.
        """
        import torch

        hessian = required(stats, "hessian", self.name).to(weight)
        mask, made = self._compensated(weight, hessian)
        diagonal = hessian.diagonal()
        plain = self._highest(weight.abs() * diagonal.sqrt(), weight.shape[1])
        loss = output_errors(made - weight, hessian)
        plain_loss = output_errors(weight * plain - weight, hessian)
        worse = (plain_loss < loss).unsqueeze(1)
        return torch.where(worse, plain, mask), torch.where(worse, weight, made)

    def _compensated(self, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1 on the transpose, where a column of the weight is contiguous in memory."""
        import torch

        columns = len(hessian)
        factor = FACTORS.factor(hessian, self.damping)
        fires = hessian.diagonal() > 0
        left = weight.T.contiguous().clone()
        mask = torch.empty_like(left, dtype=torch.bool)
        # A group of n:m is chosen when its first column is reached, a block otherwise.
        step = self.m or self.block
        for start in range(0, columns, self.block):
            end = min(columns, start + self.block)
            block, local = left[start:end], factor[start:end, start:end]
            errors = torch.empty_like(block)
            for i in range(end - start):
                if i % step == 0:
                    stop = min(i + step, end - start)
                    chosen = slice(start + i, start + stop)
                    scores = block[i:stop] / local.diagonal()[i:stop, None]
                    scores = scores.abs() * fires[chosen, None]
                    mask[chosen] = self._highest(scores.T, start + stop, start + i).T
                errors[i] = block[i] * ~mask[start + i] / local[i, i]
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        mask = mask.T.contiguous()
        return mask, left.T * mask

    def _highest(self, scores: Tensor, end: int, start: int = 0) -> Tensor:
        """Mark what the columns from ``start`` to ``end`` of each row keep."""
        if self.m:
            return keep_highest(scores.reshape(-1, self.m), self.n).reshape(scores.shape)
        total = scores.shape[1]
        num_dropped = num_pruned(end, self.sparsity) - num_pruned(start, self.sparsity)
        return keep_highest(scores, total - num_dropped)

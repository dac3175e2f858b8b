"""GPTQ: round column by column, and let the columns still to come make up for each error.

The problem: round-to-nearest minimises the error of the weights, but what counts is the error of
the output, ``tr(E H E')`` with ``H`` the second moment of the inputs. Inputs are correlated, so an
error made in one column can be cancelled by moving the others. Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", equation 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Statistics, required
from search_spaces.operators.hessian import FACTORS, output_errors
from search_spaces.operators.integer_grid import GridCodes, IntegerOperator, grouped, reach

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128


@dataclass(frozen=True)
class GPTQ(IntegerOperator):
    """Integer rounding that minimises the error of the output; stored as round-to-nearest.

    A row whose output error would be no less than that of round-to-nearest keeps the latter.

    Attributes:
        bits: Width of a code, 1 to 8 (1 only when asymmetric).
        group_size: Consecutive weights of a row that share a scale; 0 means the whole row. The
            last group of a row may be short.
        symmetric: Without zero points (grid centred on zero) or with.
        act_order: Round the columns of the largest inputs first. Groups stay those of the stored
            order, so their scales come from the weights as given; otherwise a group's scale comes
            from its weights as they are when its first column is reached.
        damping: Added to the diagonal of the Hessian, as a fraction of its mean.
    """

    act_order: bool = False
    damping: float = 0.01

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"gptq: damping must be positive and finite, got {self.damping}")

    @property
    def label(self) -> str:
        """For example ``gptq3-g64``, with ``-act`` when ordered by activation."""
        damping = "" if self.damping == 0.01 else f"-d{self.damping:g}"
        return f"gptq{self.grid_label}{'-act' if self.act_order else ''}{damping}"

    def quantize(self, weight: Tensor, stats: Statistics) -> GridCodes:
        """Codes of least output error by this greedy method.

        Raises:
            ValueError: There is no Hessian, or it is not finite.
        """
        import torch

        hessian = required(stats, "hessian", self.name).to(weight.device).float()
        weight = weight.float()
        columns = weight.shape[1]
        made = self._compensated(weight, hessian)
        plain = self.round_to_nearest(weight)
        loss = output_errors(made.dense(columns) - weight, hessian)
        plain_loss = output_errors(plain.dense(columns) - weight, hessian)
        # As good counts as worse: where nothing was seen to fire, all weights would go.
        worse = (plain_loss <= loss)[:, None, None]
        return GridCodes(*(torch.where(worse, b, a) for a, b in zip(made, plain, strict=True)))

    def _compensated(self, weight: Tensor, hessian: Tensor) -> GridCodes:
        """Algorithm 1 on the transpose: a column of the weight is contiguous in memory."""
        import torch

        diagonal = hessian.diagonal()
        # What never fires does not matter; zeroed, it neither widens a range nor needs a code.
        left = torch.where(diagonal[:, None] == 0, 0, weight.T)
        columns, rows = left.shape
        width = self.group_size or columns
        order, sorting = list(range(columns)), None
        groups = grouped(left.T, self.group_size)
        scales, zeros = (part.squeeze(-1).T.contiguous() for part in self.fit(*reach(groups, -1)))
        if self.act_order:
            sorting = diagonal.argsort(descending=True, stable=True)
            order = sorting.tolist()
            left = left[sorting]
        factor = FACTORS.factor(hessian, self.damping, sorting)
        codes = left.new_empty(columns, rows)

        def quantize(position: int, remaining: Tensor) -> Tensor:
            column = order[position]
            group = column // width
            if not self.act_order and column % width == 0:
                low, high = reach(remaining[:width], 0)
                scales[group], zeros[group] = (part[0] for part in self.fit(low, high))
            codes[column] = self.nearest(remaining[0], scales[group], zeros[group])
            return (codes[column] - zeros[group]) * scales[group]

        compensate(left, factor, width, quantize)
        return GridCodes(
            grouped(codes.T, self.group_size), scales.T.unsqueeze(-1), zeros.T.unsqueeze(-1)
        )


def compensate(
    weight: Tensor, factor: Tensor, width: int, quantize: Callable[[int, Tensor], Tensor]
) -> None:
    """Walk through the columns, spreading the error of each over those not yet rounded.

    Args:
        weight: (columns, rows) in the order of the walk; not written to.
        factor: (columns, columns) in the same order; see :mod:`search_spaces.operators.hessian`.
        width: Columns of a group. Updates are applied lazily, block by block, but never so that a
            group is seen half updated when its first column is reached.
        quantize: Given a position and the (columns left, rows) weights from there on, returns
            (rows,) what the first of them becomes. Those of its group are up to date.
    """
    import torch

    left = weight.clone(memory_format=torch.contiguous_format)  # an update moves whole columns
    for start, end in _blocks(len(weight), width):
        block, local = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            rounded = quantize(start + i, left[start + i :])
            errors[i] = (block[i] - rounded) / local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)


def _blocks(columns: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of about 128 columns that hold whole groups, or lie within one group."""
    step = width if width > _BLOCK else _BLOCK // width * width
    for first in range(0, columns, step):
        stop = min(columns, first + step)
        for start in range(first, stop, _BLOCK):
            yield start, min(stop, start + _BLOCK)

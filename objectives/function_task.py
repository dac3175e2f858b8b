"""Any model with a loss as a task: batches take the place of sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from objectives.task import SequenceLosses

LossFunction = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss with a graph, lower is better, mean over the batch."""

# Shares of the data when it is given as one list; what is left of rounding goes to the statistics.
_SHARES = {"heldout": 0.25, "guard": 0.15, "search": 0.35}


class FunctionTask:
    """Measures by how much ``loss(model, batch)`` rises over the dense model's.

    Args:
        loss: Returns a scalar; the mean of its increase over batches is what is minimised.
        splits: For each of ``statistics``, ``search``, ``guard`` and ``heldout`` its batches.
    """

    name = "loss_increase"
    has_slopes = True

    def __init__(self, loss: LossFunction, splits: Mapping[str, Sequence[Any]]) -> None:
        filled = {name for name, batches in splits.items() if len(batches)}
        missing = {"statistics", "search", "guard", "heldout"} - filled
        if missing:
            raise ValueError(f"the splits {', '.join(sorted(missing))} have no batches")
        self._loss = loss
        self._splits = splits
        self._dense: dict[str, list[float]] = {}

    @property
    def tokens_per_sequence(self) -> int:
        """1: such a task counts batches."""
        return 1

    def num_sequences(self, split: str) -> int:
        """Batches in a split."""
        return len(self._splits[split])

    def prepare(self, model: nn.Module, split: str) -> int:
        """Measure the dense model on a split; returns the batches spent."""
        if split in self._dense:
            return 0
        self._dense[split] = self._absolute(model, split, range(self.num_sequences(split)))
        return len(self._dense[split])

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """The increase of each batch's loss."""
        losses = self._absolute(model, split, indices)
        dense = self._dense[split]
        return SequenceLosses([loss - dense[i] for loss, i in zip(losses, indices, strict=True)])

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The loss itself: its squared gradient is the empirical Fisher if it is a likelihood."""
        return self._scalar(model, split, index)

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The increase of one batch's loss, with a graph; its loss before its split is prepared."""
        own = self._scalar(model, split, index)
        return own - self._dense[split][index] if split in self._dense else own

    def _absolute(self, model: nn.Module, split: str, indices: Sequence[int]) -> list[float]:
        with torch.no_grad():
            return [float(self._scalar(model, split, index)) for index in indices]

    def _scalar(self, model: nn.Module, split: str, index: int) -> Tensor:
        """What the caller's function returns, if it is of use."""
        loss = self._loss(model, self._splits[split][index])
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss(model, batch) must return a scalar tensor, got {got}")
        return loss


def split_batches(batches: Sequence[Any]) -> dict[str, list[Any]]:
    """Cut a list of batches into the four splits, held-out first, in order.

    Raises:
        ValueError: Fewer than eight batches.
    """
    if len(batches) < 8:
        raise ValueError(
            f"expected at least 8 batches to make four splits of, got {len(batches)}; "
            "use smaller batches"
        )
    splits: dict[str, list[Any]] = {}
    begin = 0
    for name, share in _SHARES.items():
        end = begin + max(1, int(share * len(batches)))
        splits[name] = list(batches[begin:end])
        begin = end
    splits["statistics"] = list(batches[begin:])
    return splits

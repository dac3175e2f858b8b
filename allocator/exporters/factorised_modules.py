"""Two thin Linear layers in place of a dense one, as a factorised checkpoint needs them.

The problem: transformers builds a model with dense matrices and then loads its weights. A
checkpoint that holds factors has to exchange the modules in between. This file is copied into such
a checkpoint, so it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``inputs`` times the right, then the left factor: a Linear layer of a given rank."""

    def __init__(self, rows: int, rank: int, columns: int, *, bias: bool) -> None:
        """Make both layers.

        Args:
            rows: Outputs.
            rank: Between the factors.
            columns: Inputs.
            bias: Whether the outputs get one.
        """
        super().__init__()
        self.right = nn.Linear(columns, rank, bias=False)
        self.left = nn.Linear(rank, rows, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., columns) to (..., rows)."""
        outputs: Tensor = self.left(self.right(inputs))
        return outputs


def factorise(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Exchange the named modules, in place, for factorised ones that are yet to be filled.

    Args:
        model: Linear layers, or GPT-2's Conv1D, by these names.
        sizes: (rows, rank, columns) by module.
    """
    for name, (rows, rank, columns) in sizes.items():
        bias = getattr(model.get_submodule(name), "bias", None) is not None
        model.set_submodule(name, LowRankLinear(rows, rank, columns, bias=bias))

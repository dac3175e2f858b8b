"""From a parameter as the model holds it to logical matrices, and back.

The problem: the same projection is (rows, columns) in a Linear, (columns, rows) in GPT-2's Conv1D
and a stack of either for fused experts. Operators see one (rows, columns) matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from search_spaces.operators.base import Operator, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.space import Member


def logical(parameter: Tensor, member: Member) -> Tensor:
    """The parameter as (matrices, rows, columns), a view of it.

    Raises:
        ValueError: The parameter does not have the member's shape.
    """
    view = parameter.transpose(-1, -2) if member.transposed else parameter
    if tuple(view.shape) != member.shape:
        raise ValueError(
            f"{member.name}: the plan expects shape {list(member.shape)}, "
            f"the model has {list(view.shape)}"
        )
    return view if view.ndim == 3 else view.unsqueeze(0)


def physical(matrices: Tensor, member: Member) -> Tensor:
    """Invert :func:`logical`, contiguous in the parameter's own layout."""
    view = matrices if len(member.shape) == 3 else matrices.squeeze(0)
    return (view.transpose(-1, -2) if member.transposed else view).contiguous()


def compress_member(
    parameter: Tensor, member: Member, operator: Operator, stats: Statistics
) -> Tensor:
    """The parameter after compression, in its own layout and dtype.

    Args:
        parameter: As the model holds it.
        member: Its address and logical shape.
        operator: What to do to each matrix; it works in float32.
        stats: What the parameter saw; shared by all matrices of a stack.
    """
    import torch

    matrices = [
        operator.apply(matrix.float(), stats) for matrix in _each(logical(parameter, member))
    ]
    return physical(torch.stack(matrices).to(parameter.dtype), member)


def _each(stack: Tensor) -> Iterator[Tensor]:
    return iter(stack.unbind(0))

"""From a parameter as the model holds it to logical matrices, and back.

The problem: the same projection is (rows, columns) in a Linear, (columns, rows) in GPT-2's Conv1D
and a stack of either for fused experts. Operators see (rows, columns) matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from search_spaces.operators.base import Operator, Statistics, UnitOperator
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.operators import AnyOperator
    from search_spaces.space import Member, Unit

_NONE = Statistics()


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


def compress_unit(
    parameters: Sequence[Tensor],
    unit: Unit,
    operator: AnyOperator,
    stats: Mapping[str, Statistics],
) -> tuple[Tensor, ...]:
    """The parameters of a unit after compression, in their own layouts and dtypes.

    Args:
        parameters: As the model holds them, in the order of the members.
        unit: Addresses and logical shapes.
        operator: What to do; it works in float32.
        stats: By member name, on any device; shared by all matrices of a stack.
    """
    import torch

    if isinstance(operator, UnitOperator):
        packed = pack_unit(parameters, unit, operator, stats)
        made = unpack_unit(packed, unit, operator)
        return tuple(new.to(old) for new, old in zip(made, parameters, strict=True))
    return tuple(
        physical(
            torch.stack(
                [operator.apply(matrix.float(), own) for matrix in logical(parameter, member)]
            ).to(parameter.dtype),
            member,
        )
        for parameter, member, own in zip(
            parameters, unit.members, _beside(parameters, unit, stats), strict=True
        )
    )


def pack_unit(
    parameters: Sequence[Tensor],
    unit: Unit,
    operator: AnyOperator,
    stats: Mapping[str, Statistics],
) -> dict[str, Tensor]:
    """The stored tensors of a unit by their names in a file, on the CPU."""
    import torch

    found = _beside(parameters, unit, stats)
    views = [logical(p, m) for p, m in zip(parameters, unit.members, strict=True)]
    packed: dict[str, Tensor] = {}
    if isinstance(operator, UnitOperator):
        matrices = [view.squeeze(0).float() for view in views]
        packed.update(operator.pack_unit(matrices, unit.members, found))
    else:
        for view, member, own in zip(views, unit.members, found, strict=True):
            parts = [operator.pack(matrix.float(), own) for matrix in view]
            for part, stored in _named(member, operator):
                stack = torch.stack([one[part.name] for one in parts])
                packed[stored.name] = stack.reshape(stored.shape)
    return {name: tensor.cpu() for name, tensor in packed.items()}


def unpack_unit(
    tensors: Mapping[str, Tensor], unit: Unit, operator: AnyOperator
) -> tuple[Tensor, ...]:
    """Invert :func:`pack_unit`: float32 parameters in the model's layouts."""
    import torch

    if isinstance(operator, UnitOperator):
        made = operator.unpack_unit(tensors, unit.members)
        return tuple(physical(t[None], m) for t, m in zip(made, unit.members, strict=True))
    unpacked = []
    for member in unit.members:
        stacks = {
            part.name: tensors[stored.name].reshape(member.num_matrices, *part.shape)
            for part, stored in _named(member, operator)
        }
        matrices = [
            operator.unpack({name: stack[i] for name, stack in stacks.items()}, member.matrix_shape)
            for i in range(member.num_matrices)
        ]
        unpacked.append(physical(torch.stack(matrices), member))
    return tuple(unpacked)


def _beside(
    parameters: Sequence[Tensor], unit: Unit, stats: Mapping[str, Statistics]
) -> list[Statistics]:
    """The statistics of each member, on the device of its parameter."""
    return [
        stats.get(member.name, _NONE).to(parameter.device)
        for parameter, member in zip(parameters, unit.members, strict=True)
    ]


def _named(member: Member, operator: Operator) -> list[tuple[StoredTensor, StoredTensor]]:
    """The operator's stored tensors beside the same under their names in a file."""
    layout = operator.layout(member.matrix_shape)
    return list(zip(layout, member.layout(operator), strict=True))

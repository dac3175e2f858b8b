"""Operators inside operators: a factor, residual or block of values stored by another operator.

The problem: compositions keep several matrices per weight, each by an operator of its own, and
their stored tensors need names that cannot meet. A part's tensors are called ``PART.codes`` and so
on; a part that is stored dense is called ``PART``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from search_spaces.operators.base import Matrix, Operator, Statistics
from search_spaces.operators.keep import Keep
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

NO_STATISTICS = Statistics()
DENSE = Keep()
"""How parts are stored unless something else is asked for: in 16 bits."""


def part_name(part: str, tensor: str) -> str:
    """Name of a nested operator's tensor inside the outer one."""
    return part if tensor == "weight" else f"{part}.{tensor}"


def part_layout(part: str, operator: Operator, shape: Matrix) -> tuple[StoredTensor, ...]:
    """The stored tensors of one part under their outer names."""
    return tuple(replace(t, name=part_name(part, t.name)) for t in operator.layout(shape))


def pack_part(
    part: str, operator: Operator, matrix: Tensor, stats: Statistics = NO_STATISTICS
) -> dict[str, Tensor]:
    """One part's (rows, columns) matrix as the tensors of :func:`part_layout`, by name."""
    packed = operator.pack(matrix, stats)
    return {part_name(part, name): tensor for name, tensor in packed.items()}


def unpack_part(
    part: str, operator: Operator, packed: Mapping[str, Tensor], shape: Matrix
) -> Tensor:
    """Invert :func:`pack_part`: (rows, columns) float32."""
    names = (tensor.name for tensor in operator.layout(shape))
    return operator.unpack({name: packed[part_name(part, name)] for name in names}, shape)

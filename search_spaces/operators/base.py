"""What an operator is: one way to compress one matrix, priced from its shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

Matrix = tuple[int, int]


@dataclass(frozen=True)
class Statistics:
    """What one matrix saw during calibration; entries an operator does not need stay ``None``.

    Attributes:
        second_moment: (columns,) mean over tokens of the squared input, one per input feature.
        hessian: (columns, columns) mean over tokens of the outer product of inputs.
        fisher: (rows, columns) mean squared gradient per token, nats squared.
    """

    second_moment: Tensor | None = None
    hessian: Tensor | None = None
    fisher: Tensor | None = None


@runtime_checkable
class Operator(Protocol):
    """One way to compress a matrix of shape (rows, columns).

    Implementations are frozen dataclasses whose fields are plain numbers, strings and booleans, so
    that an operator is its JSON. They import torch inside the methods that need it: pricing must
    run without it.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    @property
    def label(self) -> str:
        """Short text for tables, such as ``int3-g64``."""
        ...

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The stored tensors, from the shape alone; their payload is the operator's price."""
        ...

    def bytes(self, shape: Matrix) -> int:
        """Payload bytes of one (rows, columns) matrix, header excluded."""
        ...

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """(rows, columns) -> its compressed, dense equivalent of the same shape and dtype."""
        ...

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The tensors of :meth:`layout`, by name."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 matrix from :meth:`pack`'s tensors; equals :meth:`apply`."""
        ...

"""What an operator is: one way to compress, priced from shapes alone.

Most act on one matrix; some on all parameters of a unit together. Operators nest: a field of an
operator may be another operator that stores its values, its factors or its residual, so that
compositions need no classes of their own and their bytes add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from search_spaces.storage import StoredTensor, payload_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from search_spaces.space import Member

Matrix = tuple[int, int]


@dataclass(frozen=True)
class Statistics:
    """What one matrix saw during calibration; entries an operator does not need stay ``None``.

    Attributes:
        second_moment: (columns,) mean over tokens of the squared input, one per input feature.
        hessian: (columns, columns) mean over tokens of the outer product of inputs.
        fisher: (rows, columns) mean squared gradient per token, nats squared.
        weighted_inputs: (num_tokens, columns) what some tokens of other text put in, each times the
            length of the gradient by its outputs; bfloat16, on the host.
    """

    second_moment: Tensor | None = None
    hessian: Tensor | None = None
    fisher: Tensor | None = None
    weighted_inputs: Tensor | None = None

    def to(self, device: torch.device) -> Statistics:
        """The same statistics on a device."""
        return Statistics(
            *(
                None if value is None else value.to(device)
                for value in (self.second_moment, self.hessian, self.fisher, self.weighted_inputs)
            )
        )


def required(stats: Statistics, kind: str, operator: str) -> Tensor:
    """The statistics of a kind that an operator cannot do without.

    Args:
        stats: What is known of the matrix.
        kind: ``second_moment``, ``hessian`` or ``fisher``.
        operator: Its name, for the message.

    Raises:
        ValueError: They were not collected.
    """
    found: Tensor | None = getattr(stats, kind)
    if found is None:
        raise ValueError(f"{operator} needs the {kind} of the calibration text, got none")
    return found


@runtime_checkable
class Operator(Protocol):
    """One way to compress a matrix of shape (rows, columns).

    Implementations are frozen dataclasses whose fields are plain numbers, strings, booleans and
    other operators, so that an operator is its JSON. They import torch inside the methods that need
    it: pricing must run without it.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics without which it cannot work; mostly a class variable."""
        ...

    @property
    def label(self) -> str:
        """Short text for tables, such as ``int3-g64``."""
        ...

    def unfit(self, shape: Matrix) -> str:
        """Why a matrix of this shape cannot be stored so, or nothing if it can."""
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


class PackedOperator(ABC):
    """A matrix operator that is what it stores: applying is packing and unpacking."""

    @property
    def needs(self) -> frozenset[str]:
        """No statistics unless a subclass says otherwise."""
        return frozenset()

    def unfit(self, shape: Matrix) -> str:
        """Any matrix will do unless a subclass says otherwise."""
        del shape
        return ""

    @abstractmethod
    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The stored tensors, from the shape alone; their payload is the operator's price."""

    def bytes(self, shape: Matrix) -> int:
        """Payload bytes of one (rows, columns) matrix, header excluded."""
        return payload_bytes(self.layout(shape))

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """(rows, columns) -> what is read back after storing it, in the weight's own dtype."""
        rows, columns = weight.shape
        return self.unpack(self.pack(weight, stats), (rows, columns)).to(weight)

    @abstractmethod
    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The tensors of :meth:`layout`, by name."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 matrix from :meth:`pack`'s tensors."""


@runtime_checkable
class UnitOperator(Protocol):
    """One way to compress all parameters of a unit together, such as gate, up and down.

    A frozen dataclass like :class:`Operator`. The unit's parameters come and go in the order of its
    members, as (rows, columns) matrices. Stored tensors carry full names, ``MEMBER.part``.
    """

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics without which it cannot work; mostly a class variable."""
        ...

    @property
    def label(self) -> str:
        """Short text for tables."""
        ...

    def unfit_unit(self, members: Sequence[Member]) -> str:
        """Why a unit of these members cannot be stored so, or nothing if it can."""
        ...

    def layout_unit(self, members: Sequence[Member]) -> tuple[StoredTensor, ...]:
        """The stored tensors under their full names, from shapes alone."""
        ...

    def pack_unit(
        self, weights: Sequence[Tensor], members: Sequence[Member], stats: Sequence[Statistics]
    ) -> Mapping[str, Tensor]:
        """The tensors of :meth:`layout_unit`, by name."""
        ...

    def unpack_unit(self, packed: Mapping[str, Tensor], members: Sequence[Member]) -> list[Tensor]:
        """One (rows, columns) float32 matrix per member; dense, zeros where something is gone."""
        ...

"""Sparse matrices as they are stored: a bitmap, compressed rows or dense, whichever is smallest.

The problem: 50 % sparsity is not 50 % of the memory. Where the kept weights sit must be stored as
well, so a bitmap of 16-bit values saves nothing below 1/16 sparsity and an index per weight nothing
below one half. And the price must be known from the shape alone, before a weight is seen: how many
weights a matrix keeps is therefore decided by the operator's fields, never by its scores.

To use it from an operator, derive from :class:`SparseOperator` and say two things: ``storage``, the
storage of a shape with its exact number of kept weights, and ``select``, the mask that keeps so
many, with the weights to keep. Layout, packing, unpacking and the price follow, and the exporters
of masks understand the operator. Where rows keep different numbers only their total must follow
from the shape: ``SparseStorage(shape, num_kept, values)``. Where every row keeps the same number,
say ``even=True``: the values then form a matrix with the rows of the original, which suits nested
operators that scale by row, and no row pointers are needed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, PackedOperator, Statistics
from search_spaces.operators.keep import Keep
from search_spaces.operators.nested import pack_part, part_layout, unpack_part
from search_spaces.storage import StoredTensor, packed_bytes, payload_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NARROW_COLUMNS = 2**16  # column indices of wider matrices need 32 bits
_VALUES = "values"


@dataclass(frozen=True)
class SparseStorage:
    """How one matrix with a known number of kept weights is stored.

    Attributes:
        shape: (rows, columns) of the matrix.
        num_kept: Weights kept in the whole matrix.
        values: Stores the kept weights, as a matrix of :attr:`values_shape`. Where it is ``keep``
            and dense storage the smallest, the whole matrix, zeros in place of what is gone; other
            operators would not give those zeros back.
        even: Whether every row keeps the same number of weights.
    """

    shape: Matrix
    num_kept: int
    values: Operator
    even: bool = False

    def __post_init__(self) -> None:
        rows, columns = self.shape
        assert 0 <= self.num_kept <= rows * columns, self
        assert not self.even or self.num_kept % rows == 0, self

    @property
    def values_shape(self) -> Matrix:
        """The kept weights in order of rows, then columns: row by row if even, else in one row."""
        rows = self.shape[0] if self.even else 1
        return rows, self.num_kept // rows

    @cached_property
    def form(self) -> str:
        """``none``, ``dense``, ``bitmap`` or ``compressed_rows``; of equals the simplest."""
        sizes = {form: payload_bytes(self.layout_as(form)) for form in self._forms}
        return min(sizes, key=sizes.__getitem__)

    def unfit(self) -> str:
        """Why the values cannot be stored, or nothing if they can."""
        if not self.num_kept:
            return ""
        dense = self.values.unfit(self.shape) if self._dense_is_exact else ""
        return self.values.unfit(self.values_shape) or dense

    def layout(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of the smallest form."""
        return self.layout_as(self.form)

    def layout_as(self, form: str) -> tuple[StoredTensor, ...]:
        """The stored tensors of a form, whether or not it is the smallest."""
        if form == "none":
            return ()
        if form == "dense":
            return self.values.layout(self.shape)
        rows, columns = self.shape
        values = _values_layout(self)
        if form == "bitmap":
            return (StoredTensor("mask", "U8", (packed_bytes(rows * columns, 1),)), *values)
        index = "U16" if columns <= _NARROW_COLUMNS else "U32"
        indices = [StoredTensor("columns", index, (self.num_kept,))]
        if not self.even:
            indices.append(StoredTensor("row_pointers", "U32", (rows + 1,)))
        return (*indices, *values)

    def encode(self, weight: Tensor, mask: Tensor, fisher: Tensor | None) -> dict[str, Tensor]:
        """Store a matrix.

        Args:
            weight: (rows, columns) float32.
            mask: (rows, columns) bool, true for the ``num_kept`` weights to keep.
            fisher: (rows, columns) if known; the nested operator sees that of what it stores.

        Returns:
            The tensors of :meth:`layout`, by name.
        """
        import torch

        from search_spaces.operators.packing import pack_bits

        counts = mask.sum(1)
        assert int(counts.sum()) == self.num_kept, "the mask keeps another number of weights"
        assert not self.even or bool((counts == counts[0]).all()), "the rows are not even"
        if self.form == "none":
            return {}
        if self.form == "dense":
            stats = Statistics(fisher=None if fisher is None else fisher * mask)
            return dict(self.values.pack(weight * mask, stats))
        packed = _pack_values(self, weight, mask, fisher)
        if self.form == "bitmap":
            packed["mask"] = pack_bits(mask.flatten(), 1)
            return packed
        packed["columns"] = mask.nonzero()[:, 1].to(self._index_dtype)
        if not self.even:
            ends = counts.cumsum(0)
            packed["row_pointers"] = torch.cat([ends.new_zeros(1), ends]).to(torch.uint32)
        return packed

    def decode(self, packed: Mapping[str, Tensor]) -> Tensor:
        """(rows, columns) float32, zeros where nothing was kept."""
        import torch

        if self.form == "none":
            return torch.zeros(self.shape)
        if self.form == "dense":
            return self.values.unpack(packed, self.shape)
        values = _unpack_values(self, packed)
        mask = self._mask(packed).to(values.device)
        return torch.zeros(self.shape, device=values.device).masked_scatter_(mask, values)

    def _mask(self, packed: Mapping[str, Tensor]) -> Tensor:
        """(rows, columns) bool, from the bitmap or the column indices."""
        import torch

        from search_spaces.operators.packing import unpack_bits

        rows, columns = self.shape
        if self.form == "bitmap":
            return unpack_bits(packed["mask"], 1, rows * columns).bool().reshape(self.shape)
        found = packed["columns"].long()
        if self.even:
            counts = torch.full((rows,), self.num_kept // rows, device=found.device)
        else:
            counts = packed["row_pointers"].long().diff()
        mask = torch.zeros(self.shape, dtype=torch.bool, device=found.device)
        mask[torch.arange(rows, device=found.device).repeat_interleave(counts), found] = True
        return mask

    @property
    def _dense_is_exact(self) -> bool:
        """Whether a weight that is gone is a zero when read back from the dense form."""
        rows, columns = self.shape
        return isinstance(self.values, Keep) or self.num_kept == rows * columns

    @property
    def _forms(self) -> tuple[str, ...]:
        if not self.num_kept:
            return ("none",)
        sparse = ("bitmap", "compressed_rows")
        return ("dense", *sparse) if self._dense_is_exact else sparse

    @property
    def _index_dtype(self) -> torch.dtype:
        import torch

        return torch.uint16 if self.shape[1] <= _NARROW_COLUMNS else torch.uint32


@dataclass(frozen=True)
class GroupedStorage:
    """How a matrix that keeps ``kept`` of every ``group`` weights of a row is stored.

    The form that sparse tensor cores read: the kept weights in order, and the place of each inside
    its group in the fewest bits that can say it.

    Attributes:
        shape: (rows, columns) of the matrix; the columns are whole groups.
        kept: Weights kept of each group.
        group: Consecutive weights of a row, at most 256.
        values: Stores the kept weights, as a matrix of :attr:`values_shape`.
    """

    shape: Matrix
    kept: int
    group: int
    values: Operator

    @property
    def num_kept(self) -> int:
        """Weights kept in the whole matrix."""
        return self.shape[0] * self.values_shape[1]

    @property
    def values_shape(self) -> Matrix:
        """The kept weights, row by row."""
        rows, columns = self.shape
        return rows, columns // self.group * self.kept

    def unfit(self) -> str:
        """Why the matrix cannot be stored so, or nothing if it can."""
        columns = self.shape[1]
        if columns % self.group:
            return f"{columns} columns are not whole groups of {self.group}"
        return self.values.unfit(self.values_shape)

    def layout(self) -> tuple[StoredTensor, ...]:
        """Packed places and the values."""
        places = packed_bytes(self.num_kept, self._bits)
        return (StoredTensor("places", "U8", (places,)), *_values_layout(self))

    def encode(self, weight: Tensor, mask: Tensor, fisher: Tensor | None) -> dict[str, Tensor]:
        """Store a matrix; the arguments are those of :meth:`SparseStorage.encode`."""
        from search_spaces.operators.packing import pack_bits

        groups = mask.reshape(-1, self.group)
        assert bool((groups.sum(1) == self.kept).all()), "a group keeps another number of weights"
        packed = _pack_values(self, weight, mask, fisher)
        packed["places"] = pack_bits(groups.nonzero()[:, 1], self._bits)
        return packed

    def decode(self, packed: Mapping[str, Tensor]) -> Tensor:
        """(rows, columns) float32, zeros where nothing was kept."""
        from search_spaces.operators.packing import unpack_bits

        values = _unpack_values(self, packed).reshape(-1, self.kept)
        places = unpack_bits(packed["places"], self._bits, self.num_kept).long()
        groups = values.new_zeros(len(values), self.group)
        groups.scatter_(1, places.reshape(-1, self.kept).to(values.device), values)
        return groups.reshape(self.shape)

    @property
    def _bits(self) -> int:
        return (self.group - 1).bit_length()


class SparseOperator(PackedOperator):
    """A matrix operator that keeps some weights and stores where they are."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short text for tables."""

    @abstractmethod
    def storage(self, shape: Matrix) -> SparseStorage | GroupedStorage:
        """How a (rows, columns) matrix is stored, with its exact number of kept weights."""

    @abstractmethod
    def select(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Choose what to keep.

        Args:
            weight: (rows, columns) float32; not written to.
            stats: What the operator needs of the calibration text.

        Returns:
            (rows, columns) bool, true where kept, and the (rows, columns) float32 weights to keep.
        """

    def num_kept(self, shape: Matrix) -> int:
        """Weights that a (rows, columns) matrix keeps."""
        return self.storage(shape).num_kept

    def unfit(self, shape: Matrix) -> str:
        """Nothing, unless the values or the groups do not fit the matrix."""
        return self.storage(shape).unfit()

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The kept values and where they are."""
        return self.storage(shape).layout()

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The kept values and where they are."""
        rows, columns = weight.shape
        mask, kept = self.select(weight.float(), stats)
        return self.storage((rows, columns)).encode(kept, mask, stats.fisher)

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32, zeros where nothing was kept."""
        return self.storage(shape).decode(packed)


def refuse_values(operator: str, values: Operator) -> None:
    """Refuse a nested operator that asks what compacted values cannot tell.

    Once the kept weights of a row are moved together, a column of the values is no input feature
    any more: they have a Fisher, weight by weight, but no second moment and no Hessian.

    Raises:
        ValueError: It needs more than the Fisher.
    """
    lacking = sorted(values.needs - {"fisher"})
    if lacking:
        raise ValueError(
            f"{operator}: values must be an operator that needs no statistics but the fisher, got "
            f"{values.label!r}, which needs {', '.join(lacking)} of whole columns"
        )


def values_label(values: Operator) -> str:
    """What nested values add to a label: nothing where they are kept in bfloat16."""
    return "" if values == Keep() else f"+{values.label}"


def _values_layout(storage: SparseStorage | GroupedStorage) -> tuple[StoredTensor, ...]:
    return part_layout(_VALUES, storage.values, storage.values_shape)


def _pack_values(
    storage: SparseStorage | GroupedStorage, weight: Tensor, mask: Tensor, fisher: Tensor | None
) -> dict[str, Tensor]:
    shape = storage.values_shape
    stats = Statistics(fisher=None if fisher is None else fisher[mask].reshape(shape))
    return pack_part(_VALUES, storage.values, weight[mask].reshape(shape), stats)


def _unpack_values(storage: SparseStorage | GroupedStorage, packed: Mapping[str, Tensor]) -> Tensor:
    return unpack_part(_VALUES, storage.values, packed, storage.values_shape)

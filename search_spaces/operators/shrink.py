"""Structured removal: whole channels of an MLP, whole head groups of an attention block.

The problem: scattered zeros need a mask to be stored and a sparse kernel to be fast. Removing what
a whole channel or head does leaves dense matrices of a smaller shape that any runtime multiplies:
rows of the projections in, columns of the projection out, and nothing that says where they were but
one bit per channel or head. With ``keep=0`` the block's contribution is gone altogether.

What a channel or head matters is what it feeds into the projection out: its mean squared input
times the squared norm of the columns that read it. Query heads that share keys and values go
together, as grouped-query attention needs the same number of them for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, Statistics, required
from search_spaces.operators.keep import Keep
from search_spaces.operators.nested import pack_part, unpack_part
from search_spaces.operators.sparse_storage import values_label
from search_spaces.storage import StoredTensor, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.space import Member

# The projections into a block's hidden channels, and the one out of them.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_QUERY, _KEY, _VALUE = "q_proj", "k_proj", "v_proj"
_OUT = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class _Cut:
    """What can be removed from a unit, and where it sits.

    Attributes:
        out: Index of the projection out; its columns are cut, the rows of all others.
        num_pieces: Channels, or groups of heads.
        widths: Rows (columns of ``out``) of one piece, by member.
    """

    out: int
    num_pieces: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Shrink:
    """Remove channels of an MLP or groups of heads of an attention block, and store what is left.

    Attributes:
        keep: Share of the channels or head groups that stay, 0 to 1. At least one stays unless it
            is 0, which removes the block.
        head_dim: Rows of one head, for attention; 0 means unknown, which fits no attention that
            keeps anything.
        multiple: The number of channels kept is rounded to a multiple of this, for kernels.
        values: Stores each matrix at its new shape.
    """

    keep: float
    head_dim: int = 0
    multiple: int = 8
    values: Operator = field(default_factory=Keep)

    name: ClassVar[str] = "shrink"

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"shrink: keep must be 0 to 1, got {self.keep}")
        if self.head_dim < 0:
            raise ValueError(f"shrink: head_dim must be >= 0, got {self.head_dim}")
        if self.multiple < 1:
            raise ValueError(f"shrink: multiple must be at least 1, got {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        """What the importance and the values need; nothing where all is removed."""
        if self.keep == 0:
            return frozenset()
        return self.values.needs | {"second_moment"}

    @property
    def label(self) -> str:
        """For example ``shrink0.75``, with what differs from the defaults of multiples and values.

        The size of a head is the model's and not shown.
        """
        multiple = "" if self.multiple == 8 else f"-x{self.multiple}"
        return f"shrink{self.keep:g}{multiple}{values_label(self.values)}"

    def unfit_unit(self, members: Sequence[Member]) -> str:
        """Nothing for an MLP, or an attention block whose head size is known."""
        cut = self._cut(members)
        if isinstance(cut, str):
            return cut
        shapes = self._shapes(members, cut)
        reasons = (self.values.unfit(shape) for shape in shapes if 0 not in shape)
        return next(filter(None, reasons), "")

    def layout_unit(self, members: Sequence[Member]) -> tuple[StoredTensor, ...]:
        """The smaller matrices, and one bit per piece where some are gone."""
        cut = self._fitting(members)
        num_kept = self._num_kept(cut)
        if not num_kept:
            return ()
        stored = [
            tensor
            for member, shape in zip(members, self._shapes(members, cut), strict=True)
            for tensor in replace(member, shape=shape).layout(self.values)
        ]
        if num_kept < cut.num_pieces:
            size = packed_bytes(cut.num_pieces, 1)
            stored.append(StoredTensor(_kept_name(members, cut), "U8", (size,)))
        return tuple(stored)

    def pack_unit(
        self, weights: Sequence[Tensor], members: Sequence[Member], stats: Sequence[Statistics]
    ) -> Mapping[str, Tensor]:
        """The tensors of :meth:`layout_unit`, by name.

        Raises:
            ValueError: The second moment of what the projection out reads is missing.
        """
        from search_spaces.operators.packing import pack_bits

        cut = self._fitting(members)
        num_kept = self._num_kept(cut)
        if not num_kept:
            return {}
        kept = self._choose(weights[cut.out], stats[cut.out], cut)
        packed: dict[str, Tensor] = {}
        for index, (weight, member) in enumerate(zip(weights, members, strict=True)):
            lines = kept.repeat_interleave(cut.widths[index])
            columns = index == cut.out
            part = weight[:, lines] if columns else weight[lines]
            seen = _remaining(stats[index], lines, columns=columns)
            packed |= pack_part(member.name, self.values, part, seen)
        if num_kept < cut.num_pieces:
            packed[_kept_name(members, cut)] = pack_bits(kept, 1)
        return packed

    def unpack_unit(self, packed: Mapping[str, Tensor], members: Sequence[Member]) -> list[Tensor]:
        """One (rows, columns) float32 matrix per member, zeros where something was removed."""
        import torch

        from search_spaces.operators.packing import unpack_bits

        cut = self._fitting(members)
        num_kept = self._num_kept(cut)
        dense = [torch.zeros(member.matrix_shape) for member in members]
        if not num_kept:
            return dense
        kept = torch.ones(cut.num_pieces, dtype=torch.bool)
        if num_kept < cut.num_pieces:
            kept = unpack_bits(packed[_kept_name(members, cut)], 1, cut.num_pieces).bool()
        shapes = self._shapes(members, cut)
        for index, (member, shape) in enumerate(zip(members, shapes, strict=True)):
            lines = kept.repeat_interleave(cut.widths[index])
            part = unpack_part(member.name, self.values, packed, shape).cpu()
            where = (slice(None), lines) if index == cut.out else (lines,)
            dense[index][where] = part
        return dense

    def _choose(self, out: Tensor, stats: Statistics, cut: _Cut) -> Tensor:
        """(pieces,) bool: the most important ones."""
        from search_spaces.operators.prune import keep_highest

        moment = required(stats, "second_moment", self.name).to(out)
        importance = out.square().sum(0) * moment
        pieces = importance.reshape(cut.num_pieces, -1).sum(1)
        return keep_highest(pieces.unsqueeze(0), self._num_kept(cut)).squeeze(0)

    def _num_kept(self, cut: _Cut) -> int:
        """Pieces that stay, channels rounded to the multiple."""
        if self.keep in (0, 1):
            return int(self.keep) * cut.num_pieces
        unit = self.multiple if cut.widths[cut.out] == 1 else 1
        wanted = int(self.keep * cut.num_pieces / unit + 0.5) * unit
        return min(cut.num_pieces, max(unit, wanted))

    def _shapes(self, members: Sequence[Member], cut: _Cut) -> list[Matrix]:
        """Shapes of the matrices after the cut."""
        num_kept = self._num_kept(cut)
        return [
            (member.shape[0], num_kept * width)
            if index == cut.out
            else (num_kept * width, member.shape[1])
            for index, (member, width) in enumerate(zip(members, cut.widths, strict=True))
        ]

    def _fitting(self, members: Sequence[Member]) -> _Cut:
        cut = self._cut(members)
        assert not isinstance(cut, str), cut
        return cut

    def _cut(self, members: Sequence[Member]) -> _Cut | str:
        """Where the unit can be cut, or why it cannot."""
        if any(len(member.shape) != 2 for member in members):
            return "stacked experts cannot shrink: the channels of each would differ"
        leaves = [member.module.rpartition(".")[2] for member in members]
        for sources, out in _MLPS:
            if sorted(leaves) == sorted((*sources, out)):
                return _cut_mlp(members, leaves.index(out))
        outs = [leaf for leaf in leaves if leaf in _OUT]
        if len(outs) == 1 and sorted(leaves) == sorted((_QUERY, _KEY, _VALUE, *outs)):
            return self._cut_attention(members, leaves)
        return f"{', '.join(leaves)} are neither an MLP nor an attention block"

    def _cut_attention(self, members: Sequence[Member], leaves: list[str]) -> _Cut | str:
        rows = {leaf: member.shape[0] for leaf, member in zip(leaves, members, strict=True)}
        out = next(index for index, leaf in enumerate(leaves) if leaf in _OUT)
        if self.keep == 0:
            return _Cut(out, 1, tuple(rows.values()))
        if not self.head_dim:
            return "head_dim is 0: set it to the model's to remove heads"
        extents = (rows[_QUERY], rows[_KEY], rows[_VALUE], members[out].shape[1])
        if reason := uneven_heads(extents, self.head_dim):
            return reason
        num_groups = rows[_KEY] // self.head_dim
        query_width = rows[_QUERY] // num_groups
        narrow = (_KEY, _VALUE)
        widths = tuple(self.head_dim if leaf in narrow else query_width for leaf in leaves)
        return _Cut(out, num_groups, widths)


def uneven_heads(extents: tuple[int, int, int, int], head_dim: int) -> str:
    """Why an attention block is not made of whole heads, or nothing if it is.

    Args:
        extents: Rows of the queries, keys and values, and columns of the projection out.
        head_dim: Rows of one head.
    """
    queries, keys, values, out = extents
    if keys != values or keys % head_dim or queries != out or queries % keys:
        return (
            f"queries of {queries} rows, keys of {keys}, values of {values} and {out} columns out "
            f"are not whole heads of {head_dim}"
        )
    return ""


def _cut_mlp(members: Sequence[Member], out: int) -> _Cut | str:
    channels = members[out].shape[1]
    if any(member.shape[0] != channels for i, member in enumerate(members) if i != out):
        return f"not an MLP of {channels} channels: a projection in has other rows"
    return _Cut(out, channels, (1,) * len(members))


def _kept_name(members: Sequence[Member], cut: _Cut) -> str:
    return f"{members[cut.out].name}.kept"


def _remaining(stats: Statistics, lines: Tensor, *, columns: bool) -> Statistics:
    """What was seen of the rows or columns that stay."""
    fisher = stats.fisher
    if not columns:
        return replace(stats, fisher=None if fisher is None else fisher[lines])
    moment, hessian = stats.second_moment, stats.hessian
    return Statistics(
        second_moment=None if moment is None else moment[lines],
        hessian=None if hessian is None else hessian[lines][:, lines],
        fisher=None if fisher is None else fisher[:, lines],
    )

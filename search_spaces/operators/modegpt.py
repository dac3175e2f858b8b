"""MoDeGPT (ICLR 2025): shrink an MLP or an attention block by decomposing its matrices jointly.

The problem: matrices that follow each other can be cut where they meet, which leaves dense matrices
of a smaller shape that need no special kernel. What is cut is chosen, and made up for, by how the
calibration text uses the space between them. Between up and down projection stands a nonlinearity,
so that only whole channels can go (Nystroem, algorithm 1); between queries and keys stand rotary
embeddings, so that only whole pairs can go (CR, algorithm 2); between values and outputs stands
nothing, so that any subspace can (SVD, algorithm 3).

Biases are not seen: those of queries, keys and values would have to be cut and turned alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, Statistics, required
from search_spaces.operators.decomposition import stored_as
from search_spaces.operators.low_rank import damped, round_rank, whole
from search_spaces.operators.nested import DENSE, pack_part, unpack_part
from search_spaces.operators.shrink import uneven_heads
from search_spaces.storage import StoredTensor, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.space import Member

_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"
_QUERY, _KEY, _VALUE, _OUT = "q_proj", "k_proj", "v_proj", "o_proj"
_MLPS = ({_GATE, _UP, _DOWN}, {_UP, _DOWN})
_ATTENTION = {_QUERY, _KEY, _VALUE, _OUT}
_MULTIPLE = 8


@dataclass(frozen=True)
class MoDeGPT:
    """Fewer channels of an MLP, or smaller heads of an attention block with rotary embeddings.

    Rotary pairs are taken to be dimensions i and i + head_dim / 2 of a head, as in Llama.

    Attributes:
        keep: Share of the channels, or of every head's dimensions, that stays.
        head_dim: Rows of one head, for attention; 0 means unknown, which fits no attention.
        multiple: Widths are rounded down to multiples of this, as kernels want them; those of
            heads to even numbers besides.
        values: Stores each matrix at its new shape; it must need no statistics.
    """

    keep: float
    head_dim: int = 0
    multiple: int = _MULTIPLE
    values: Operator = DENSE

    name: ClassVar[str] = "modegpt"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"modegpt: keep must be above 0 and at most 1, got {self.keep}")
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(f"modegpt: head_dim must be even and not below 0, got {self.head_dim}")
        if self.multiple < 1:
            raise ValueError(f"modegpt: multiple must be at least 1, got {self.multiple}")
        if self.values.needs:
            raise ValueError(
                f"modegpt: values must be an operator without statistics, got {self.values.label}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian: covariances of hidden channels, queries, keys and values follow from it."""
        return frozenset({"hessian"})

    @property
    def label(self) -> str:
        """For example ``modegpt0.75``; the size of a head is the model's and not shown."""
        multiple = "" if self.multiple == _MULTIPLE else f"-m{self.multiple}"
        return f"modegpt{self.keep}{multiple}{stored_as(self.values)}"

    def unfit_unit(self, members: Sequence[Member]) -> str:
        """Nothing for an MLP, or an attention block whose head size is known."""
        if any(len(member.shape) != 2 for member in members):
            return "stacked experts cannot shrink: the channels of each would differ"
        roles = _roles(members)
        leaves = set(roles) if len(roles) == len(members) else set()
        if leaves in _MLPS:
            reason = _uneven_mlp(members, roles)
        elif leaves == _ATTENTION:
            reason = self._uneven_attention(members, roles)
        else:
            return (
                f"{', '.join(_leaf(member) for member in members)} are neither an MLP nor an "
                "attention block"
            )
        if reason:
            return reason
        return next(filter(None, map(self.values.unfit, self._shapes(members))), "")

    def layout_unit(self, members: Sequence[Member]) -> tuple[StoredTensor, ...]:
        """The smaller matrices, and a bit per channel, or per pair of every key head."""
        stored = [
            tensor
            for member, shape in zip(members, self._shapes(members), strict=True)
            for tensor in replace(member, shape=shape).layout(self.values)
        ]
        name, num_bits = self._kept(members)
        return (*stored, StoredTensor(name, "U8", (packed_bytes(num_bits, 1),)))

    def pack_unit(
        self, weights: Sequence[Tensor], members: Sequence[Member], stats: Sequence[Statistics]
    ) -> Mapping[str, Tensor]:
        """The tensors of :meth:`layout_unit`, by name.

        Raises:
            ValueError: The Hessian of what a projection reads is missing.
        """
        from search_spaces.operators.packing import pack_bits

        roles = _roles(members)
        matrices = {leaf: weights[index].double() for leaf, index in roles.items()}
        width = self._width(members)
        if _DOWN in roles:
            hessian = required(stats[roles[_DOWN]], "hessian", self.name).double()
            kept, cut = shrink_mlp(matrices, hessian, width)
        else:
            seen = {
                leaf: required(stats[roles[leaf]], "hessian", self.name).double()
                for leaf in (_QUERY, _KEY, _VALUE)
            }
            heads = {leaf: self._heads(matrix, leaf) for leaf, matrix in matrices.items()}
            kept, queries, keys = shrink_query_key(heads[_QUERY], heads[_KEY], seen, width)
            values, out = shrink_value_out(heads[_VALUE], heads[_OUT], seen[_VALUE], width)
            cut = {_QUERY: queries, _KEY: keys, _VALUE: values.flatten(0, 1)}
            cut[_OUT] = out.flatten(0, 1).T.contiguous()
        packed: dict[str, Tensor] = {}
        for member in members:
            packed |= pack_part(member.name, self.values, cut[_leaf(member)].float())
        return {**packed, self._kept(members)[0]: pack_bits(kept.flatten(), 1)}

    def unpack_unit(self, packed: Mapping[str, Tensor], members: Sequence[Member]) -> list[Tensor]:
        """One (rows, columns) float32 matrix per member: together they compute what is stored.

        Channels and pairs return to their places; the dimensions of values, which are others than
        before, come first in each head.
        """
        import torch

        from search_spaces.operators.packing import unpack_bits

        name, num_bits = self._kept(members)
        kept = unpack_bits(packed[name], 1, num_bits).bool()
        width = self._width(members)
        dense = []
        for member, shape in zip(members, self._shapes(members), strict=True):
            part = unpack_part(member.name, self.values, packed, shape).cpu()
            full = torch.zeros(member.matrix_shape)
            leaf = _leaf(member)
            if leaf == _DOWN:
                full[:, kept] = part
            elif leaf in (_GATE, _UP):
                full[kept] = part
            elif leaf in (_QUERY, _KEY):
                pairs = kept.reshape(-1, self.head_dim // 2)
                full[_rows_of_pairs(pairs, member.shape[0] // (2 * num_bits))] = part
            elif leaf == _VALUE:
                heads = full.view(-1, self.head_dim, full.shape[1])
                heads[:, :width] = part.reshape(-1, width, full.shape[1])
            else:
                heads = full.view(len(full), -1, self.head_dim)
                heads[..., :width] = part.reshape(len(full), -1, width)
            dense.append(full)
        return dense

    def _heads(self, matrix: Tensor, leaf: str) -> Tensor:
        """(heads, head_dim, hidden) of a projection into or, transposed, out of heads."""
        rows = matrix.T if leaf == _OUT else matrix
        return rows.reshape(-1, self.head_dim, rows.shape[1])

    def _width(self, members: Sequence[Member]) -> int:
        """Channels, or dimensions of a head, that stay."""
        roles = _roles(members)
        if _DOWN in roles:
            channels = members[roles[_DOWN]].shape[1]
            return round_rank(whole(self.keep * channels), channels, self.multiple)
        width = round_rank(whole(self.keep * self.head_dim), self.head_dim, self.multiple)
        return max(2, width - width % 2)

    def _shapes(self, members: Sequence[Member]) -> list[Matrix]:
        """Shapes of the matrices after the cut."""
        width = self._width(members)
        shapes = []
        for member in members:
            (rows, columns), leaf = member.matrix_shape, _leaf(member)
            if leaf in (_GATE, _UP):
                rows = width
            elif leaf == _DOWN:
                columns = width
            elif leaf == _OUT:
                columns = columns // self.head_dim * width
            else:
                rows = rows // self.head_dim * width
            shapes.append((rows, columns))
        return shapes

    def _kept(self, members: Sequence[Member]) -> tuple[str, int]:
        """Name of the bitmap, and its bits."""
        roles = _roles(members)
        if _DOWN in roles:
            down = members[roles[_DOWN]]
            return f"{down.name}.kept", down.shape[1]
        key = members[roles[_KEY]]
        return f"{key.name}.kept", key.shape[0] // 2

    def _uneven_attention(self, members: Sequence[Member], roles: Mapping[str, int]) -> str:
        if not self.head_dim:
            return "the size of a head is unknown: set head_dim to the model's"
        queries, keys, values = (members[roles[leaf]].shape[0] for leaf in (_QUERY, _KEY, _VALUE))
        out = members[roles[_OUT]].shape[1]
        return uneven_heads((queries, keys, values, out), self.head_dim)


def shrink_mlp(
    matrices: Mapping[str, Tensor], hessian: Tensor, width: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Nystroem: channels of the highest ridge leverage stay, and stand in for the others.

    The ridge is the channels' mean energy, so that a channel's leverage does not depend on the
    scale of the activations.

    Args:
        matrices: Projections in, (channels, hidden) float64, and the one out, (hidden, channels).
        hessian: (channels, channels) of what the latter reads.
        width: Channels that stay.

    Returns:
        (channels,) bool, true where one stays, and the smaller matrices.
    """
    import torch

    down = matrices[_DOWN]
    energy = hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, 1.0)))
    leverage = 1 - energy * inverse.diagonal()
    kept = torch.zeros(len(hessian), dtype=torch.bool, device=hessian.device)
    kept[leverage.topk(width).indices] = True
    shared = damped(hessian[kept][:, kept])
    stand_in = torch.linalg.solve(shared, hessian[kept][:, ~kept] @ down[:, ~kept].T).T
    cut = {leaf: matrix[kept] for leaf, matrix in matrices.items() if leaf != _DOWN}
    return kept, {**cut, _DOWN: down[:, kept] + stand_in}


def shrink_query_key(
    queries: Tensor, keys: Tensor, hessians: Mapping[str, Tensor], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """CR: rotary pairs stay whose queries and keys are large together.

    A dimension's score is ``sqrt(C_q,ii C_k,ii)``, summed over both of a pair and over the query
    heads that share a key head.

    Args:
        queries: (query heads, head_dim, hidden).
        keys: (key heads, head_dim, hidden).
        hessians: (hidden, hidden) by projection.
        width: Dimensions of a head that stay, even.

    Returns:
        (key heads, head_dim / 2) bool, true where a pair stays, and the rows of all queries and of
        all keys that do.
    """
    import torch

    num_groups, head_dim, _ = keys.shape
    of_queries = ((queries @ hessians[_QUERY]) * queries).sum(-1).clamp(min=0)
    of_keys = ((keys @ hessians[_KEY]) * keys).sum(-1).clamp(min=0)
    grouped = of_queries.reshape(num_groups, -1, head_dim)
    scores = (grouped * of_keys.unsqueeze(1)).sqrt().sum(1)
    pairs = scores.reshape(num_groups, 2, head_dim // 2).sum(1)
    kept = torch.zeros_like(pairs, dtype=torch.bool)
    kept.scatter_(1, pairs.topk(width // 2, 1).indices, True)
    num_sharing = len(queries) // num_groups
    return (
        kept,
        queries.flatten(0, 1)[_rows_of_pairs(kept, num_sharing)],
        keys.flatten(0, 1)[_rows_of_pairs(kept, 1)],
    )


def shrink_value_out(
    values: Tensor, out: Tensor, hessian: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """SVD: the subspace of each value head that matters most to what is read from it.

    With R a root of the covariance of a head's values, the product of both matrices is ``(W_o R)
    (R^-1 W_v)``, whose right factor has orthonormal rows on the calibration text. So the leading
    right singular vectors of ``W_o R`` are those of the product: both decompositions of the paper
    in the size of a head. Where several query heads share a value head, the decomposition of the
    values alone decides, by the singular vectors of R.

    Args:
        values: (value heads, head_dim, hidden).
        out: (query heads, head_dim, hidden), transposed.
        hessian: (hidden, hidden) of what the values read.
        width: Dimensions of a head that stay.

    Returns:
        (value heads, width, hidden) and (query heads, width, hidden).
    """
    import torch

    covariances = values @ hessian @ values.mT
    damp = torch.stack([damped(covariance) for covariance in covariances])
    energies, vectors = torch.linalg.eigh(damp)
    deviations = energies.sqrt()
    roots = (vectors * deviations.unsqueeze(1)) @ vectors.mT
    inverses = (vectors / deviations.unsqueeze(1)) @ vectors.mT
    num_sharing = len(out) // len(values)
    if num_sharing == 1:
        vectors = torch.linalg.eigh(roots @ out @ out.mT @ roots)[1]
    leading = vectors.flip(2)[:, :, :width]
    to_out = (leading.mT @ roots).repeat_interleave(num_sharing, 0)
    return leading.mT @ inverses @ values, to_out @ out


def _rows_of_pairs(kept: Tensor, num_sharing: int) -> Tensor:
    """(rows,) bool of a projection, from (key heads, pairs): both of a pair, in all heads."""
    return kept.repeat(1, 2).repeat_interleave(num_sharing, 0).flatten()


def _leaf(member: Member) -> str:
    return member.module.rpartition(".")[2]


def _roles(members: Sequence[Member]) -> dict[str, int]:
    """Index of each projection by its name."""
    return {_leaf(member): index for index, member in enumerate(members)}


def _uneven_mlp(members: Sequence[Member], roles: Mapping[str, int]) -> str:
    channels = members[roles[_DOWN]].shape[1]
    rows = {members[index].shape[0] for leaf, index in roles.items() if leaf != _DOWN}
    return "" if rows == {channels} else f"not an MLP of {channels} channels: others come in"

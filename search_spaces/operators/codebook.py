"""Codebooks: each row's weights replaced by the nearest of a few numbers of its own.

The problem: weights crowd around zero and have long tails, so a uniform grid spends its levels
where nothing is. SqueezeLLM (Kim et al., 2024) clusters every output row by k-means, each weight
counting by its empirical Fisher (equation 4), and stores a table of ``2**bits`` numbers per row.

In one dimension clusters are intervals of the sorted row, so that sums over a cluster are
differences of running sums: a step of Lloyd costs a binary search per centroid, however many
columns there are. The centroids start where companding theory puts them (as dense as the cube root
of the density, Panter and Dite, 1951). Lloyd's steps never carry a centroid across the row, so
rounds follow that do: the centroid whose absence costs least goes to where splitting a cluster
gains most, and the row keeps the move if it helped. That ends 1 to 7 % above the optimum of dynamic
programming.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics, required
from search_spaces.storage import StoredTensor, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

_ITERATIONS = 10
_LLOYD_STEPS = 4
_BLOCK_WEIGHTS = 2**20  # rows are fitted in blocks of about so many weights, to bound memory
_LARGEST = 65504.0  # of float16, which stores the tables
_TINY = 1e-300


@dataclass(frozen=True)
class Codebook(PackedOperator):
    """A table of ``2**bits`` float16 numbers per row, and a code per weight.

    A row of no more distinct weights than that is stored without error but that of float16.

    Attributes:
        bits: Width of a code, 1 to 8.
        weighted: Whether a weight counts by its Fisher when the table is fitted, or all alike (as
            in rows whose Fisher is zero).
        iterations: Most rounds of moving one centroid of a row to a better place, at least 1.
    """

    bits: int
    weighted: bool = True
    iterations: int = _ITERATIONS

    name: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codebook: bits must be 1 to 8, got {self.bits}")
        if self.iterations < 1:
            raise ValueError(f"codebook: iterations must be >= 1, got {self.iterations}")

    @property
    def needs(self) -> frozenset[str]:
        """The Fisher, if weighted."""
        return frozenset({"fisher"} if self.weighted else ())

    @property
    def label(self) -> str:
        """For example ``kmeans3-fisher``; the rounds follow if they are not the usual ones."""
        weighting = "-fisher" if self.weighted else ""
        rounds = "" if self.iterations == _ITERATIONS else f"-i{self.iterations}"
        return f"kmeans{self.bits}{weighting}{rounds}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes and a float16 table: ``ceil(m n b / 8) + 2 m 2**b`` bytes."""
        rows, columns = shape
        return (
            StoredTensor("codes", "U8", (packed_bytes(rows * columns, self.bits),)),
            StoredTensor("table", "F16", (rows, 2**self.bits)),
        )

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Every weight's number in its row's table, in the weight's own dtype."""
        codes, table = self._fit(weight, stats)
        return table.float().gather(1, codes.long()).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Codes bit-packed, tables in float16."""
        from search_spaces.operators.packing import pack_bits

        codes, table = self._fit(weight, stats)
        return {"codes": pack_bits(codes.flatten(), self.bits), "table": table}

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        codes = unpack_bits(packed["codes"], self.bits, rows * columns).reshape(rows, columns)
        return packed["table"].to(codes).gather(1, codes.long())

    def _fit(self, weight: Tensor, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Codes (rows, columns) uint8 and tables (rows, 2**bits) float16."""
        import torch

        fisher = required(stats, "fisher", self.name).to(weight.device) if self.weighted else None
        step = max(1, _BLOCK_WEIGHTS // weight.shape[1])
        codes, tables = [], []
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].float()
            ordered, order = rows.sort(dim=1)
            counts = torch.ones_like(ordered, dtype=torch.float64)
            if fisher is not None:
                known = fisher[start : start + step].double().gather(1, order)
                counts = torch.where(known.sum(1, keepdim=True) > 0, known, counts)
            found = _cluster(ordered.double(), counts, 2**self.bits, self.iterations)
            table = found.clamp(-_LARGEST, _LARGEST).to(torch.float16)
            tables.append(table)
            codes.append(torch.searchsorted(_midpoints(table.float()), rows).to(torch.uint8))
        return torch.cat(codes), torch.cat(tables)


class _Rows:
    """Sorted rows with the running sums from which every cluster's moments follow.

    Args:
        values: (rows, columns) float64, ascending along each row.
        counts: (rows, columns) float64, how much each value counts; not negative.
    """

    def __init__(self, values: Tensor, counts: Tensor) -> None:
        from torch.nn.functional import pad

        self.values = values
        terms = (counts, counts * values, counts * values.square())
        self.sums = tuple(pad(term.cumsum(1), (1, 0)) for term in terms)

    def subset(self, rows: Tensor) -> _Rows:
        """Only some of the rows, by index."""
        chosen = object.__new__(_Rows)
        chosen.values = self.values[rows]
        chosen.sums = tuple(running[rows] for running in self.sums)
        return chosen

    def edges(self, centroids: Tensor) -> Tensor:
        """(rows, clusters + 1) int64: where the cluster of each ascending centroid begins."""
        import torch
        from torch.nn.functional import pad

        inner = torch.searchsorted(self.values, _midpoints(centroids))
        return pad(pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def moments(self, edges: Tensor) -> tuple[Tensor, ...]:
        """Of each cluster: its count, its sum and its sum of squares."""
        return tuple(running.gather(1, edges).diff(dim=1) for running in self.sums)

    def lloyd(self, centroids: Tensor) -> Tensor:
        """Lloyd's steps: every centroid to the mean of its cluster, if that is not empty."""
        import torch

        for _ in range(_LLOYD_STEPS):
            count, total, _squares = self.moments(self.edges(centroids))
            centroids = torch.where(count > 0, total / count.clamp_min(_TINY), centroids)
        return centroids

    def error(self, centroids: Tensor) -> Tensor:
        """(rows,) squared distance to the nearest centroid, each value by its count."""
        count, total, squares = self.moments(self.edges(centroids))
        return (squares - 2 * centroids * total + centroids.square() * count).sum(1)


def _cluster(values: Tensor, counts: Tensor, num_clusters: int, rounds: int) -> Tensor:
    """Weighted k-means of each row.

    Args:
        values: (rows, columns) float64, ascending along each row.
        counts: (rows, columns) float64, not negative, some positive in every row.
        num_clusters: Centroids per row.
        rounds: Most moves of one centroid per row.

    Returns:
        (rows, num_clusters) float64 centroids, ascending.
    """
    import torch

    distinct, exact = _distinct(values, num_clusters)
    rest = (~exact).nonzero()[:, 0]
    if not len(rest):
        return distinct
    rows = _Rows(values[rest], counts[rest])
    best = rows.lloyd(_companded(values[rest], counts[rest], num_clusters))
    least = rows.error(best)
    active = torch.arange(len(rest), device=values.device)
    for _ in range(rounds):
        moved = rows.lloyd(_move_one(rows, best[active]))
        error = rows.error(moved)
        better = error < least[active]
        active = active[better]
        if not len(active):
            break
        best[active], least[active] = moved[better], error[better]
        rows = rows.subset(better.nonzero()[:, 0])
    return distinct.index_copy_(0, rest, best)


def _distinct(values: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """(rows, num_clusters) distinct values of each row, and whether that was all of them."""
    from torch.nn.functional import pad

    rank = pad((values.diff(dim=1) != 0).long().cumsum(1), (1, 0))
    table = values[:, -1:].repeat(1, num_clusters)
    table.scatter_(1, rank.clamp(max=num_clusters - 1), values)
    return table, rank[:, -1] < num_clusters


def _companded(values: Tensor, counts: Tensor, num_clusters: int) -> Tensor:
    """(rows, num_clusters) centroids as dense as the cube root of the values' density.

    The density between two neighbours is their count over the gap, so that its cube root times the
    gap is ``count**(1/3) * gap**(2/3)``.
    """
    import torch
    from torch.nn.functional import pad

    between = (counts[:, 1:] + counts[:, :-1]) / 2
    mass = pad((between ** (1 / 3) * values.diff(dim=1) ** (2 / 3)).cumsum(1), (1, 0))
    share = torch.arange(num_clusters, device=values.device, dtype=values.dtype) + 0.5
    wanted = share / num_clusters * mass[:, -1:]
    right = torch.searchsorted(mass, wanted).clamp(1, values.shape[1] - 1)
    below, above = mass.gather(1, right - 1), mass.gather(1, right)
    part = ((wanted - below) / (above - below).clamp_min(_TINY)).clamp(0, 1)
    return torch.lerp(values.gather(1, right - 1), values.gather(1, right), part)


def _move_one(rows: _Rows, centroids: Tensor) -> Tensor:
    """Merge the two neighbours that lose least and split, at its mean, the cluster that gains most.

    Both are changes of the variance between clusters, ``ab / (a + b) * (mean_a - mean_b)**2``. The
    new centroids are tried, not trusted: the caller measures them.
    """
    import torch

    edges = rows.edges(centroids)
    count, total, _squares = rows.moments(edges)
    mean = torch.where(count > 0, total / count.clamp_min(_TINY), centroids)

    middle = torch.searchsorted(rows.values, mean).clamp(edges[:, :-1], edges[:, 1:])
    left, left_total = (s.gather(1, middle) - s.gather(1, edges[:, :-1]) for s in rows.sums[:2])
    right, right_total = count - left, total - left_total
    left_mean, right_mean = left_total / left.clamp_min(_TINY), right_total / right.clamp_min(_TINY)
    gain = left * right / count.clamp_min(_TINY) * (left_mean - right_mean).square()
    split = gain.argmax(1, keepdim=True)

    pair = count[:, :-1] + count[:, 1:]
    loss = count[:, :-1] * count[:, 1:] / pair.clamp_min(_TINY) * mean.diff(dim=1).square()
    place = torch.arange(loss.shape[1], device=loss.device)
    loss = loss.masked_fill((place == split) | (place == split - 1), torch.inf)
    merge = loss.argmin(1, keepdim=True)
    merged = (total[:, :-1] + total[:, 1:]) / pair.clamp_min(_TINY)
    merged = torch.where(pair > 0, merged, mean[:, 1:])

    moved = mean.scatter(1, merge, merged.gather(1, merge))
    moved.scatter_(1, merge + 1, left_mean.gather(1, split))
    moved.scatter_(1, split, right_mean.gather(1, split))
    return moved.sort(dim=1).values


def _midpoints(centroids: Tensor) -> Tensor:
    """(rows, clusters - 1): where the nearest centroid changes."""
    return (centroids[:, 1:] + centroids[:, :-1]) / 2

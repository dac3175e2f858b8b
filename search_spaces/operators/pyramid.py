"""Pyramid vector quantization: the bits of a group set by how many pulses it may spend.

The problem: whole bits per weight are coarse steps for an allocator. Fischer's pyramid (1986), used
on language models by van der Ouderaa et al. (2024), quantizes a group of N weights to a point with
integer coordinates whose magnitudes sum to K pulses, times a gain. There are ``V(N, K) = V(N-1, K)
+ V(N, K-1) + V(N-1, K-1)`` such points, so one index of ``ceil(log2 V)`` bits says which, and K
moves the price in steps of a fraction of a bit. Points are numbered and found again in exact
integers; no table of points exists.

The paper rotates by a Hadamard matrix first; none is needed here, since every group has a gain of
its own and no grid must reach to an outlier of another group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics
from search_spaces.storage import StoredTensor, num_groups, packed_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_INDEX_BITS = 62  # indices are int64, and sums of two must not overflow
_MOST_PULSES = 256
_BLOCK_WEIGHTS = 2**20  # groups are worked on in blocks of about so many weights
_SWAPS = 3  # passes after which fewer than 1 group in 100 still improves
_LARGEST_SCALE = 65504.0
_TINY = 1e-30


@dataclass(frozen=True)
class Pyramid(PackedOperator):
    """A point of the pyramid and a gain per group, a float16 scale of the gains per row.

    The gain multiplies the integers. It is linear in its code: on real weights and at 3 to 5 bits
    that errs 1 to 25 % less than a logarithmic or companded code; at 8 bits all are alike.

    Attributes:
        group_size: Weights of a group, N, 1 to 256. The last group of a row is filled with zeros.
        pulses: Sum of the magnitudes of a group's integers, K, 1 to 256; V(N, K) must fit 62 bits.
        gain_bits: Width of a group's gain, 1 to 8.
    """

    group_size: int = 16
    pulses: int = 16
    gain_bits: int = 8

    name: ClassVar[str] = "pyramid"

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= 256:
            raise ValueError(f"pyramid: group_size must be 1 to 256, got {self.group_size}")
        if not 1 <= self.pulses <= _MOST_PULSES:
            raise ValueError(f"pyramid: pulses must be 1 to {_MOST_PULSES}, got {self.pulses}")
        if not 1 <= self.gain_bits <= 8:
            raise ValueError(f"pyramid: gain_bits must be 1 to 8, got {self.gain_bits}")
        if self.index_bits > _MOST_INDEX_BITS:
            raise ValueError(
                f"pyramid: {self.pulses} pulses in groups of {self.group_size} need an index of "
                f"{self.index_bits} bits, got room for {_MOST_INDEX_BITS}; take fewer pulses or "
                f"smaller groups"
            )

    @property
    def index_bits(self) -> int:
        """Bits of a group's point: ``ceil(log2 V)``."""
        return (num_points(self.group_size, self.pulses) - 1).bit_length()

    @property
    def label(self) -> str:
        """For example ``pvq16-k32-g8``: group, pulses, bits of the gain."""
        return f"pvq{self.group_size}-k{self.pulses}-g{self.gain_bits}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed points and gains, and a float16 scale per row.

        ``ceil(m G ceil(log2 V) / 8) + ceil(m G gain_bits / 8) + 2 m`` bytes, ``G = ceil(n / N)``.
        """
        rows, columns = shape
        groups = rows * num_groups(columns, self.group_size)
        return (
            StoredTensor("points", "U8", (packed_bytes(groups, self.index_bits),)),
            StoredTensor("gains", "U8", (packed_bytes(groups, self.gain_bits),)),
            StoredTensor("scales", "F16", (rows,)),
        )

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Nearest point times its gain, in the weight's own dtype."""
        del stats
        points, gains, scales = self._quantize(weight)
        return self._dequantize(points, gains, scales, weight.shape[1]).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Each group's index and gain without gaps; scales in float16."""
        del stats
        import torch

        from search_spaces.operators.packing import pack_bits

        points, gains, scales = self._quantize(weight)
        blocks = torch.split(points.flatten(0, 1), self._block)
        index = torch.cat([index_of(block.to(torch.int64), self.pulses) for block in blocks])
        return {
            "points": _pack_index(index, self.index_bits),
            "gains": pack_bits(gains.flatten(), self.gain_bits),
            "scales": scales.to(torch.float16),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        import torch

        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        groups = num_groups(columns, self.group_size)
        index = _unpack_index(packed["points"], self.index_bits, rows * groups)
        points = torch.cat(
            [
                point_at(block, self.group_size, self.pulses).float()
                for block in torch.split(index, self._block)
            ]
        ).reshape(rows, groups, self.group_size)
        gains = unpack_bits(packed["gains"], self.gain_bits, rows * groups).reshape(rows, groups)
        return self._dequantize(points, gains, packed["scales"].to(gains), columns)

    @property
    def _block(self) -> int:
        return max(1, _BLOCK_WEIGHTS // self.group_size)

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (rows, groups, N), gain codes (rows, groups) and scales (rows,), all float32."""
        import torch

        from search_spaces.operators.integer_grid import grouped

        groups = grouped(weight.float(), self.group_size)
        blocks = torch.split(groups.flatten(0, 1), self._block)
        points = torch.cat([project(block, self.pulses) for block in blocks]).reshape(groups.shape)
        # Least squares; never negative, since no pulse opposes its weight.
        gains = (groups * points).sum(-1) / points.square().sum(-1)
        scales = gains.amax(1).clamp_(max=_LARGEST_SCALE).to(torch.float16).float()
        levels = 2**self.gain_bits - 1
        codes = (gains / scales.clamp_min(_TINY).unsqueeze(1)).mul_(levels).round_()
        return points, codes.clamp_(0, levels), scales

    def _dequantize(self, points: Tensor, gains: Tensor, scales: Tensor, columns: int) -> Tensor:
        gains = gains * (scales / (2**self.gain_bits - 1)).unsqueeze(1)
        return (points * gains.unsqueeze(-1)).flatten(1)[:, :columns]


def num_points(dimensions: int, pulses: int) -> int:
    """V(N, K): integer points in N dimensions whose magnitudes sum to K (Fischer, 1986)."""
    return _counts(dimensions, pulses)[dimensions][pulses]


def project(groups: Tensor, pulses: int) -> Tensor:
    """The point of the pyramid closest in direction to each group, by local search.

    Scaling a group to K and giving the missing pulses to the largest remainders is nearest in
    distance. Moving a pulse from the coordinate that can best spare it to the one that can best use
    it, while that brings the direction closer, gains up to another fifth.

    Args:
        groups: (groups, N) float32.
        pulses: K.

    Returns:
        (groups, N) float32 integers; a group of zeros gets all pulses somewhere.
    """
    import torch

    sizes = groups.abs()
    total = sizes.sum(1, keepdim=True)
    scaled = torch.where(total > 0, sizes / total.clamp_min(_TINY), 0.0).mul_(pulses)
    points = scaled.floor()
    order = (scaled - points).argsort(dim=1, descending=True, stable=True)
    missing = pulses - points.sum(1, keepdim=True)
    places = torch.arange(groups.shape[1], device=groups.device).expand_as(order)
    points.scatter_add_(1, order, (places < missing).float())
    points[:, :1] += pulses - points.sum(1, keepdim=True)  # zeros and K > N: no remainders to give
    left = torch.arange(len(points), device=points.device)
    for _ in range(_SWAPS):
        swapped, better = _swap(sizes[left], points[left])
        left = left[better]
        points[left] = swapped[better]
        if not len(left):
            break
    return torch.where(groups < 0, -points, points)


def _swap(sizes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Points with one pulse moved, and whether that brings them closer to the groups' directions.

    Closeness is the squared inner product over the squared length of the point.
    """
    import torch

    one = sizes.new_ones(len(sizes), 1)
    inner = (sizes * points).sum(1, keepdim=True)
    length = points.square().sum(1, keepdim=True)
    before = inner.square() / length
    # K = 1 empties the point: any positive length will do, the pulse is counted back below.
    closeness = (inner - sizes).square() / (length - 2 * points + 1).clamp_min(0.5)
    taken = closeness.masked_fill_(points == 0, -1).argmax(1, keepdim=True)
    inner = inner - sizes.gather(1, taken)
    length = length - 2 * points.gather(1, taken) + 1
    points = points.scatter_add(1, taken, -one)
    closeness = (inner + sizes).square() / (length + 2 * points + 1)
    after, given = closeness.max(1, keepdim=True)
    better = (after > before * (1 + 1e-6)).squeeze(1)
    return torch.where(better.unsqueeze(1), points.scatter_add(1, given, one), points), better


def index_of(points: Tensor, pulses: int) -> Tensor:
    """Number each point: a coordinate's zero comes first, then 1, -1, 2, -2 and so on.

    Args:
        points: (points, N) int64, magnitudes summing to the pulses.
        pulses: K.

    Returns:
        (points,) int64 in ``[0, V(N, K))``.
    """
    import torch

    counts, offsets = _tables(points.shape[1], pulses, points.device)
    left = torch.full_like(points[:, 0], pulses)
    index = torch.zeros_like(left)
    for column, values in enumerate(points.unbind(1)):
        rest = points.shape[1] - column - 1
        size = values.abs()
        index += offsets[rest, left, size]
        left -= size
        index += counts[rest, left] * (values < 0)
    return index


def point_at(index: Tensor, dimensions: int, pulses: int) -> Tensor:
    """Invert :func:`index_of`: (points,) int64 -> (points, N) int64."""
    import torch

    counts, offsets = _tables(dimensions, pulses, index.device)
    index, left = index.clone(), torch.full_like(index, pulses)
    columns = []
    for rest in range(dimensions - 1, -1, -1):
        size = torch.zeros_like(index)
        for power in range(pulses.bit_length() - 1, -1, -1):  # bisect on the magnitude
            larger = size + 2**power
            fits = (larger <= left) & (offsets[rest, left, larger.clamp(max=pulses)] <= index)
            size = torch.where(fits, larger, size)
        index -= offsets[rest, left, size]
        left -= size
        negative = (size > 0) & (index >= counts[rest, left])
        index -= counts[rest, left] * negative
        columns.append(torch.where(negative, -size, size))
    return torch.stack(columns, dim=1)


@lru_cache(maxsize=64)
def _counts(dimensions: int, pulses: int) -> tuple[tuple[int, ...], ...]:
    """V(d, k) for all d up to N and k up to K, in Python's unbounded integers."""
    table = [[1] + [0] * pulses]
    for _ in range(dimensions):
        above, row = table[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[k - 1] + above[k - 1])
        table.append(row)
    return tuple(tuple(row) for row in table)


def _tables(dimensions: int, pulses: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What numbering needs of the d coordinates behind one, with k pulses left for it and them.

    Returns:
        ``counts[d, k]`` = V(d, k), and ``offsets[d, k, a]``, the points whose coordinate is smaller
        than a in magnitude: V(d, k) + 2 (V(d, k-1) + ... + V(d, k-a+1)), or 0 for a = 0.
    """
    import torch

    counts = torch.tensor(_counts(dimensions, pulses)[:-1], dtype=torch.int64, device=device)
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))  # [d, k]: all of fewer than k pulses
    k = torch.arange(pulses + 1, device=device)
    least = (k[:, None] - k + 1).clamp(min=0)
    # Magnitudes beyond k never occur; 0 and 1 follow the rules of their own.
    offsets = counts.unsqueeze(2) + 2 * (sums[:, :-1].unsqueeze(2) - sums[:, least])
    offsets[:, :, 0] = 0
    return counts, offsets


def _pack_index(index: Tensor, bits: int) -> Tensor:
    """Bit-pack wide codes: all their lowest bytes, then the next, then what bits are left."""
    import torch

    from search_spaces.operators.packing import pack_bits

    planes = [(index >> place & 255).to(torch.uint8) for place in range(0, bits - 7, 8)]
    if bits % 8:
        planes.append(pack_bits(index >> bits // 8 * 8, bits % 8))
    return torch.cat(planes) if planes else index.new_empty(0, dtype=torch.uint8)


def _unpack_index(packed: Tensor, bits: int, num_values: int) -> Tensor:
    """Invert :func:`_pack_index`: (num_values,) int64."""
    import torch

    from search_spaces.operators.packing import unpack_bits

    whole = bits // 8
    index = torch.zeros(num_values, dtype=torch.int64, device=packed.device)
    for place, plane in enumerate(packed[: whole * num_values].reshape(whole, num_values)):
        index |= plane.long() << 8 * place
    if bits % 8:
        last = unpack_bits(packed[whole * num_values :], bits % 8, num_values)
        index |= last.long() << 8 * whole
    return index

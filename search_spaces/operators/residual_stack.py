"""Residual stacks: a matrix as a sum of levels, each a sign matrix times a low-rank magnitude.

The problem: a model stored once should serve every memory budget. Each level approximates what the
levels before it left, so that the first levels of a deep stack are the shallow stack to the bit:
more memory loads more of the same file. Iterative absolute value decomposition, BitStack (ICLR
2025), section 3.2. There the input scales are folded into the preceding operator; a matrix alone
has none, so they are stored here and priced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics, required
from search_spaces.operators.decomposition import relative_scales, truncated_svd
from search_spaces.storage import StoredTensor, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

_MOST_LEVELS = 64
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class ResidualStack(PackedOperator):
    """Sum of levels ``sign * (left @ right)``: one bit a weight and two float16 factors each.

    Attributes:
        levels: How many, 1 to 64.
        rank: Of the magnitude of each level; clipped to the smaller side of the matrix.
        scaled: Decompose the matrix times the norms of its input features (needs second_moment),
            one float16 scale per column. The weighted error then decreases with every level.
    """

    levels: int
    rank: int = 16
    scaled: bool = False

    name: ClassVar[str] = "residual_stack"

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= _MOST_LEVELS:
            raise ValueError(
                f"residual_stack: levels must be 1 to {_MOST_LEVELS}, got {self.levels}"
            )
        if self.rank < 1:
            raise ValueError(f"residual_stack: rank must be at least 1, got {self.rank}")

    @property
    def needs(self) -> frozenset[str]:
        """Second moments of the inputs when scaled."""
        return frozenset({"second_moment"} if self.scaled else ())

    @property
    def label(self) -> str:
        """For example ``stack4-r16``, with an ``s`` at the end when scaled."""
        return f"stack{self.levels}-r{self.rank}{'s' if self.scaled else ''}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Level by level along the first axis: packed signs and the two factors.

        ``ceil(m n / 8) + 2 k (m + n)`` bytes a level, and ``2 n`` once when scaled.
        """
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        levels = (
            StoredTensor("signs", "U8", (self.levels, packed_bytes(rows * columns, 1))),
            StoredTensor("left", "F16", (self.levels, rows, rank)),
            StoredTensor("right", "F16", (self.levels, rank, columns)),
        )
        return (*levels, StoredTensor("input_scales", "F16", (columns,)))[: 4 if self.scaled else 3]

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """The sum of the levels, in the weight's own dtype."""
        import torch

        scales = self._scales(weight, stats)
        total = torch.zeros_like(weight, dtype=torch.float32)
        for positive, left, right in self._levels(weight, scales):
            total += _level(positive, left, right)
        return _unscaled(total, scales).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Signs bit-packed (set: positive), factors and scales in float16."""
        import torch

        from search_spaces.operators.packing import pack_bits

        scales = self._scales(weight, stats)
        signs, lefts, rights = zip(*self._levels(weight, scales), strict=True)
        packed = {
            "signs": torch.stack([pack_bits(positive.flatten(), 1) for positive in signs]),
            "left": torch.stack(lefts),
            "right": torch.stack(rights),
        }
        return packed if scales is None else {**packed, "input_scales": scales}

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        import torch

        from search_spaces.operators.packing import unpack_bits

        rows, columns = shape
        left, right = packed["left"], packed["right"]
        total = torch.zeros(shape, device=left.device)
        for level in range(self.levels):
            bits = unpack_bits(packed["signs"][level], 1, rows * columns).reshape(shape)
            total += _level(bits.to(left.device).bool(), left[level], right[level])
        return _unscaled(total, packed.get("input_scales"))

    def _scales(self, weight: Tensor, stats: Statistics) -> Tensor | None:
        """(columns,) float16, as they are stored."""
        if not self.scaled:
            return None
        moment = required(stats, "second_moment", self.label)
        return relative_scales(moment, 0.5).to(weight.device).half()

    def _levels(
        self, weight: Tensor, scales: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each level where it is positive and its factors as they are stored.

        The projection of the magnitude never adds to the error, but rounding its factors could once
        hardly anything is left: such a level is stored as zeros.
        """
        import torch

        rest = weight.float() if scales is None else weight.float() * scales.float()
        rank = min(self.rank, *weight.shape)
        error = rest.square().sum(dtype=torch.float64)
        for _ in range(self.levels):
            positive = rest > 0
            left, right = (
                factor.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().contiguous()
                for factor in truncated_svd(rest.abs(), rank)
            )
            after = rest - _level(positive, left, right)
            if (less := after.square().sum(dtype=torch.float64)) < error:
                rest, error = after, less
            else:
                left, right = torch.zeros_like(left), torch.zeros_like(right)
            yield positive, left, right


def _level(positive: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(rows, columns) float32 of one level: the magnitude with its signs."""
    import torch

    magnitude = left.float() @ right.float()
    return torch.where(positive, magnitude, -magnitude)


def _unscaled(matrix: Tensor, scales: Tensor | None) -> Tensor:
    return matrix if scales is None else matrix / scales.float()

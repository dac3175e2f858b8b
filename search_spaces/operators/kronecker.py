"""Kronecker: a matrix as a sum of Kronecker products of two small ones.

The problem: a matrix whose blocks are nearly multiples of one another has full rank, and yet few
numbers describe it. Rearranged so that every block becomes a row, it is a matrix of low rank; a
singular value decomposition of that gives the best sum of products (Van Loan and Pitsianis 1993,
theorem 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, PackedOperator, Statistics
from search_spaces.operators.decomposition import stored_as
from search_spaces.operators.low_rank import (
    factors_layout,
    left_singular_vectors,
    pack_factors,
    unpack_factors,
    whole,
)
from search_spaces.operators.nested import DENSE
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_TIE = 1e-9  # sums of many shares differ by rounding alone


@dataclass(frozen=True)
class Kronecker(PackedOperator):
    """``sum_k A_k (x) B_k`` with A of shape (rows_a, columns_a) (SoKA's KPSVD).

    Attributes:
        terms: Number of products, at most as many as an exact sum needs. 0: as ``keep`` says.
        keep: Stored values as a fraction of the dense matrix's, rounded down to whole terms but to
            one at least. 0: as ``terms`` says.
        rows_a: Rows of A, a divisor of the rows; 0: the divisor nearest to their square root.
        columns_a: Columns of A, likewise.
        factors: Stores all A as a (rows_a columns_a, terms) matrix and all B as one of (terms,
            rows columns / (rows_a columns_a)); it must need no statistics.
    """

    terms: int = 0
    keep: float = 0.0
    rows_a: int = 0
    columns_a: int = 0
    factors: Operator = DENSE

    name: ClassVar[str] = "kronecker"

    def __post_init__(self) -> None:
        if self.terms < 0 or not 0 <= self.keep <= 1 or (self.terms > 0) == (self.keep > 0):
            raise ValueError(
                "kronecker: expected either terms of at least 1 or keep above 0 and at most 1, "
                f"got terms={self.terms} and keep={self.keep}"
            )
        for field, value in (("rows_a", self.rows_a), ("columns_a", self.columns_a)):
            if value < 0:
                raise ValueError(f"kronecker: {field} must be at least 0, got {value}")
        if self.factors.needs:
            raise ValueError(
                "kronecker: factors must be an operator without statistics, "
                f"got {self.factors.label}"
            )

    @property
    def label(self) -> str:
        """For example ``kron8``, ``kron8-a16x16`` or ``kron0.25`` by the fraction kept."""
        parts = [f"kron{self.terms or float(self.keep)}"]
        parts += [f"a{self.rows_a}x{self.columns_a}"] if self.rows_a or self.columns_a else []
        return "-".join(parts) + stored_as(self.factors)

    def shape_a(self, shape: Matrix) -> Matrix:
        """(rows, columns) of every A in a matrix of a shape that fits."""
        rows, columns = shape
        return self.rows_a or middle_divisor(rows), self.columns_a or middle_divisor(columns)

    def num_terms(self, shape: Matrix) -> int:
        """Products that are stored."""
        size_a, size_b = self._sizes(shape)
        wanted = self.terms or whole(self.keep * size_a * size_b / (size_a + size_b))
        return max(1, min(wanted, size_a, size_b))

    def unfit(self, shape: Matrix) -> str:
        """Sizes that A does not divide, or that only trivial factors divide."""
        rows_a, columns_a = self.shape_a(shape)
        for length, part, axis in zip(shape, (rows_a, columns_a), ("rows", "columns"), strict=True):
            if length % part:
                return f"{part} does not divide {length} {axis}"
        size_a, size_b = self._sizes(shape)
        if 1 in (size_a, size_b):
            return f"{shape[0]} rows and {shape[1]} columns have no divisors to factor by"
        terms = self.num_terms(shape)
        return self.factors.unfit((size_a, terms)) or self.factors.unfit((terms, size_b))

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """All A in ``left``, all B in ``right``: ``2 r (m_A n_A + m n / (m_A n_A))`` bytes."""
        return factors_layout(self.factors, self._sizes(shape), self.num_terms(shape))

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The leading singular vectors of the rearranged matrix."""
        del stats
        shape = (weight.shape[0], weight.shape[1])
        blocks = rearrange(weight, self.shape_a(shape)).double()
        directions = left_singular_vectors(blocks, self.num_terms(shape))
        return pack_factors(blocks, directions, self.factors)

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """The sum of the products."""
        (rows, columns), (rows_a, columns_a) = shape, self.shape_a(shape)
        left, right = unpack_factors(
            packed, self.factors, self._sizes(shape), self.num_terms(shape)
        )
        blocks = (left @ right).reshape(rows_a, columns_a, rows // rows_a, columns // columns_a)
        return blocks.transpose(1, 2).reshape(shape)

    def _sizes(self, shape: Matrix) -> tuple[int, int]:
        """Values in one A and in one B."""
        rows_a, columns_a = self.shape_a(shape)
        return rows_a * columns_a, (shape[0] // rows_a) * (shape[1] // columns_a)


def middle_divisor(length: int) -> int:
    """The largest divisor that is at most the square root; 1 for a prime."""
    return next(d for d in range(isqrt(length), 0, -1) if length % d == 0)


def rearrange(weight: Tensor, shape_a: Matrix) -> Tensor:
    """Blocks as rows: ``A (x) B`` becomes the outer product of ``vec A`` and ``vec B``.

    Args:
        weight: (rows, columns).
        shape_a: Rows and columns of the grid of blocks; they divide the weight's.

    Returns:
        (rows_a * columns_a, values of a block).
    """
    (rows, columns), (rows_a, columns_a) = weight.shape, shape_a
    blocks = weight.reshape(rows_a, rows // rows_a, columns_a, columns // columns_a)
    return blocks.transpose(1, 2).reshape(rows_a * columns_a, -1)


def kronecker_rank(
    singular_values: Sequence[float], energy: float, *, least: int = 1, most: int = 0
) -> int:
    """SoKA's rank of one matrix: enough energy, but not beyond the elbow of the spectrum.

    The paper's elbow could not be recovered; here it is the point of the curve (index, cumulative
    energy) that lies farthest from its chord, or the last such point: a flat spectrum has no elbow.
    Serves any spectrum, that of a plain SVD too. The energy can be bisected to meet a byte budget.

    Args:
        singular_values: Of the rearranged matrix, the largest first.
        energy: Fraction of the summed squares to reach, above 0 and at most 1.
        least: Smallest rank to return.
        most: Largest; 0: as many as there are singular values.

    Returns:
        ``clip(min(first index that reaches the energy, elbow), least, most)``; ``least`` if all
        singular values are zero.

    Raises:
        ValueError: An energy outside its range, no singular values, or values that grow.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    values = [float(value) for value in singular_values]
    if not values or min(values) < 0 or values != sorted(values, reverse=True):
        raise ValueError("singular values must be at least one, not negative, the largest first")
    most = min(most, len(values)) if most else len(values)
    squares = [value * value for value in values]
    total = sum(squares)
    if total == 0:
        return min(least, most)
    reached = list(enumerate(accumulate(square / total for square in squares), 1))
    enough = next(k for k, share in reached if share >= energy - _TIE)
    # The chord runs from (0, 0) to (number of values, 1); the curve is concave and lies above.
    highest = max(share - k / len(values) for k, share in reached)
    elbow = max(k for k, share in reached if share - k / len(values) >= highest - _TIE)
    return max(min(enough, elbow, most), min(least, most))

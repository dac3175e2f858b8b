"""Low rank plus sparse columns: thin factors, and the worst columns kept whole.

The problem: a few input features carry what no low rank can follow. LOST (2025) keeps those columns
beside the factors: the ones of largest norm in the residual of the top-r part. Its non-linearity
between the factors is trained together with them and means nothing for a given matrix, so it is
absent here, and its mixing weight is part of the factors. Once the columns are chosen the factors
are fitted anew to the others, which never errs more than leaving them as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from search_spaces.operators.base import Matrix, Operator, PackedOperator, Statistics
from search_spaces.operators.decomposition import (
    factor_statistics,
    needed,
    relative_scales,
    stored_as,
    truncated_svd,
)
from search_spaces.operators.nested import DENSE, pack_part, part_layout, unpack_part
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_NARROW_COLUMNS = 2**16  # column indices of wider matrices need 32 bits


class _Parts(NamedTuple):
    """What is stored, before it goes through the nested operators, and what the parts see."""

    left: Tensor
    right: Tensor
    chosen: Tensor
    kept: Tensor
    stats: Statistics
    of_kept: Statistics


@dataclass(frozen=True)
class LowRankSparseColumns(PackedOperator):
    """``left @ right``, and some columns of the matrix stored by an operator of their own.

    Attributes:
        rank: Of the factors; clipped to the smaller side of the matrix and priced as clipped.
        columns: Fraction of the columns that is kept, more than 0 and at most 1; at least one.
        factors: Stores the two factors.
        kept: Stores the kept columns, a matrix of (rows, kept columns).
        weighted: Columns count by the mean square of their inputs (needs second_moment), when they
            are chosen and when the factors are fitted.
    """

    rank: int
    columns: float
    factors: Operator = DENSE
    kept: Operator = DENSE
    weighted: bool = False

    name: ClassVar[str] = "low_rank_sparse_columns"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"low_rank_sparse_columns: rank must be at least 1, got {self.rank}")
        if not 0 < self.columns <= 1:
            raise ValueError(
                "low_rank_sparse_columns: columns must be a fraction above 0 and at most 1, "
                f"got {self.columns}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Those of the nested operators, and second moments when weighted."""
        own = {"second_moment"} if self.weighted else set[str]()
        return self.factors.needs | self.kept.needs | own

    @property
    def label(self) -> str:
        """For example ``lr16+cols0.05``, with a ``w`` at the end when weighted."""
        low = f"lr{self.rank}{stored_as(self.factors)}"
        kept = f"cols{self.columns:g}{stored_as(self.kept)}"
        return f"{low}+{kept}{'-w' if self.weighted else ''}"

    def unfit(self, shape: Matrix) -> str:
        """The first reason that a nested operator has."""
        left, right, kept = self._part_shapes(shape)
        stored = ((self.factors, left), (self.factors, right), (self.kept, kept))
        return next(filter(None, (operator.unfit(part) for operator, part in stored)), "")

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The factors, the kept columns and their indices in ascending order.

        With dense parts and c columns ``2 r (m + n) + 2 m c + 2 c`` bytes; indices of more than
        65,536 columns take 4 bytes each.
        """
        left, right, kept = self._part_shapes(shape)
        index = "U16" if shape[1] <= _NARROW_COLUMNS else "I32"
        return (
            *part_layout("left", self.factors, left),
            *part_layout("right", self.factors, right),
            *part_layout("kept", self.kept, kept),
            StoredTensor("indices", index, (kept[1],)),
        )

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Both parts as their operators store them, and the indices."""
        import torch

        parts = self._fit(weight, stats)
        of_left, of_right = self._of_factors(parts)
        narrow = weight.shape[1] <= _NARROW_COLUMNS
        return {
            **pack_part("left", self.factors, parts.left, of_left),
            **pack_part("right", self.factors, parts.right, of_right),
            **pack_part("kept", self.kept, parts.kept, parts.of_kept),
            "indices": parts.chosen.to(torch.uint16 if narrow else torch.int32),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        of_left, of_right, of_kept = self._part_shapes(shape)
        left = unpack_part("left", self.factors, packed, of_left)
        right = unpack_part("right", self.factors, packed, of_right)
        dense = left @ right
        dense[:, packed["indices"].long()] = unpack_part("kept", self.kept, packed, of_kept)
        return dense

    def _part_shapes(self, shape: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """Of the left and the right factor and of the kept columns."""
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        return (rows, rank), (rank, columns), (rows, max(1, round(self.columns * columns)))

    def _fit(self, weight: Tensor, stats: Statistics) -> _Parts:
        """Choose the columns by what the top-r part leaves of them, then fit it to the others."""
        matrix, known = weight.float(), needed(stats, self.needs, self.label)
        rows, columns = matrix.shape
        scales = matrix.new_ones(columns)
        if known.second_moment is not None and self.weighted:
            scales = relative_scales(known.second_moment, 0.5)
        (_, rank), _, (_, count) = self._part_shapes((rows, columns))
        scaled = matrix * scales
        left, right = truncated_svd(scaled, rank)
        norms = (scaled - left @ right).square().sum(0)
        chosen = norms.argsort(descending=True, stable=True)[:count].sort().values
        left, right = truncated_svd(scaled.index_fill(1, chosen, 0), rank)
        moment, hessian, fisher = known.second_moment, known.hessian, known.fisher
        of_kept = Statistics(
            None if moment is None else moment[chosen],
            None if hessian is None else hessian[chosen][:, chosen],
            None if fisher is None else fisher[:, chosen],
        )
        return _Parts(left, right / scales, chosen, matrix[:, chosen], known, of_kept)

    def _of_factors(self, parts: _Parts) -> tuple[Statistics, Statistics]:
        return factor_statistics(parts.stats, self.factors.needs, parts.left, parts.right)

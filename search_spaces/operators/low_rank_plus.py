"""Low rank plus a stored residual: two thin factors carry what another operator loses most of.

The problem: quantization errs most where a few directions dominate the matrix. Take those out as
factors, and what remains is easier to store. The two parts are fitted in turn, since the best
factors depend on what the residual's operator makes of the rest: LQ-LoRA (ICLR 2024), algorithm 1,
with its Fisher weighting (equation 6), and SVDQuant (ICLR 2025), whose scales move the weight of
strong input features into the matrix first. Both stop when the error rises; unlike the published
code of the former, which returns the round after the best one, the best is kept.
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

_ROUNDS = 10


class _Parts(NamedTuple):
    """What is stored, before it goes through the nested operators."""

    left: Tensor
    right: Tensor
    rest: Tensor
    scales: Tensor | None
    stats: Statistics


@dataclass(frozen=True)
class LowRankPlus(PackedOperator):
    """``left @ right`` plus a residual, each stored by an operator of its own.

    The error that decides which round is best is weighted by the finest statistics the operator
    needs: Fisher, else the Hessian, else second moments; without any it is the plain squared error.

    Attributes:
        rank: Of the factors; clipped to the smaller side of the matrix and priced as clipped.
        residual: Stores the matrix less its low-rank part.
        factors: Stores the two factors.
        iterations: Most rounds of fitting the factors, then the residual.
        smoothing: 0 to 1: columns are first scaled by this power of their inputs' norms (needs
            second_moment), one float16 scale each; 0 stores none.
        weighted: Fit the factors under row and column means of the Fisher (needs fisher).
    """

    rank: int
    residual: Operator
    factors: Operator = DENSE
    iterations: int = _ROUNDS
    smoothing: float = 0.0
    weighted: bool = False

    name: ClassVar[str] = "low_rank_plus"

    def __post_init__(self) -> None:
        for field, value in (("rank", self.rank), ("iterations", self.iterations)):
            if value < 1:
                raise ValueError(f"low_rank_plus: {field} must be at least 1, got {value}")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"low_rank_plus: smoothing must be 0 to 1, got {self.smoothing}")

    @property
    def needs(self) -> frozenset[str]:
        """Its own and those of the nested operators."""
        own = {"fisher": self.weighted, "second_moment": self.smoothing > 0}
        nested = self.residual.needs | self.factors.needs
        return nested | {kind for kind, wanted in own.items() if wanted}

    @property
    def label(self) -> str:
        """For example ``lr16+int3-g64`` or ``lr16(int8-g64)-i5-s0.5-w+int3-g64``."""
        rounds = "" if self.iterations == _ROUNDS else f"-i{self.iterations}"
        smooth = f"-s{self.smoothing:g}" if self.smoothing else ""
        low = f"lr{self.rank}{stored_as(self.factors)}{rounds}{smooth}"
        return f"{low}{'-w' if self.weighted else ''}+{self.residual.label}"

    def unfit(self, shape: Matrix) -> str:
        """The first reason that a nested operator has."""
        left, right = self._factor_shapes(shape)
        stored = ((self.factors, left), (self.factors, right), (self.residual, shape))
        return next(filter(None, (operator.unfit(part) for operator, part in stored)), "")

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The nested operators' tensors, and a float16 scale per column when smoothing.

        With dense factors of rank r ``2 r (m + n)`` bytes besides the residual's and ``2 n``.
        """
        left, right = self._factor_shapes(shape)
        stored = (
            *part_layout("left", self.factors, left),
            *part_layout("right", self.factors, right),
            *part_layout("residual", self.residual, shape),
        )
        scales = StoredTensor("input_scales", "F16", (shape[1],))
        return (*stored, scales) if self.smoothing else stored

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Both parts as their operators store them."""
        parts = self._fit(weight, stats)
        of_left, of_right = self._of_factors(parts.left, parts.right, parts.stats)
        packed = {
            **pack_part("left", self.factors, parts.left, of_left),
            **pack_part("right", self.factors, parts.right, of_right),
            **pack_part("residual", self.residual, parts.rest, parts.stats),
        }
        return packed if parts.scales is None else {**packed, "input_scales": parts.scales}

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        of_left, of_right = self._factor_shapes(shape)
        left = unpack_part("left", self.factors, packed, of_left)
        right = unpack_part("right", self.factors, packed, of_right)
        residual = unpack_part("residual", self.residual, packed, shape)
        return _joined(left @ right, residual, packed.get("input_scales"))

    def _factor_shapes(self, shape: Matrix) -> tuple[Matrix, Matrix]:
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        return (rows, rank), (rank, columns)

    def _fit(self, weight: Tensor, stats: Statistics) -> _Parts:
        """The best round: factors of what the residual left, residual of what the factors leave."""
        import torch

        matrix, inner, scales = weight.float(), needed(stats, self.needs, self.label), None
        if inner.second_moment is not None and self.smoothing:
            scales = relative_scales(inner.second_moment, self.smoothing / 2).half()
            matrix = matrix * scales.float()
            inner = _scaled_statistics(inner, scales.float())
        rank = min(self.rank, *matrix.shape)
        stored = torch.zeros_like(matrix)
        best, least = None, float("inf")
        for _ in range(self.iterations):
            left, right = self._factorize(matrix - stored, rank, inner)
            rest = matrix - self._stored_low_rank(left, right, inner)
            stored = self.residual.apply(rest, inner)
            error = _error(rest - stored, inner)
            if best is not None and not error < least:
                break
            best, least = _Parts(left, right, rest, scales, inner), error
        assert best is not None
        return best

    def _factorize(self, matrix: Tensor, rank: int, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Factors of least error, by rows and columns of the Fisher when weighted."""
        if stats.fisher is None or not self.weighted:
            return truncated_svd(matrix, rank)
        of_rows = relative_scales(stats.fisher.mean(1), 0.5)[:, None]
        of_columns = relative_scales(stats.fisher.mean(0), 0.5)
        left, right = truncated_svd(of_rows * matrix * of_columns, rank)
        return left / of_rows, right / of_columns

    def _stored_low_rank(self, left: Tensor, right: Tensor, stats: Statistics) -> Tensor:
        """(rows, columns) product of the factors as they are stored."""
        of_left, of_right = self._of_factors(left, right, stats)
        return self.factors.apply(left, of_left) @ self.factors.apply(right, of_right)

    def _of_factors(
        self, left: Tensor, right: Tensor, stats: Statistics
    ) -> tuple[Statistics, Statistics]:
        return factor_statistics(stats, self.factors.needs, left, right)


def _scaled_statistics(stats: Statistics, scales: Tensor) -> Statistics:
    """Statistics of a matrix whose columns are multiplied by the scales, inputs divided by them."""
    moment, hessian, fisher = stats.second_moment, stats.hessian, stats.fisher
    return Statistics(
        None if moment is None else moment / scales.square(),
        None if hessian is None else hessian / (scales[:, None] * scales),
        None if fisher is None else fisher / scales.square(),
    )


def _error(error: Tensor, stats: Statistics) -> float:
    """Squared error (rows, columns) under the finest statistics there are."""
    import torch

    if stats.fisher is not None:
        weighted = error.square() * stats.fisher
    elif stats.hessian is not None:
        weighted = (error @ stats.hessian) * error
    elif stats.second_moment is not None:
        weighted = error.square() * stats.second_moment
    else:
        weighted = error.square()
    return weighted.sum(dtype=torch.float64).item()


def _joined(low: Tensor, residual: Tensor, scales: Tensor | None) -> Tensor:
    total = low + residual
    return total if scales is None else total / scales.float()

"""Low rank: a matrix as the product of two thin ones.

The problem: of all matrices of rank r, find the one that loses least, where the loss is the plain
squared error, or weighs inputs by the Fisher information or by how often they occur. Every such
loss is ``|(W - A B) S|`` for some root S that acts on the inputs. Its minimum is the projection of
W on the leading left singular vectors U of ``W S``, that is ``A B = U U' W``: the inverse of S,
which the published factors carry, cancels and is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, PackedOperator, Statistics, required
from search_spaces.operators.decomposition import factor_statistics, needed, stored_as
from search_spaces.operators.nested import (
    DENSE,
    NO_STATISTICS,
    pack_part,
    part_layout,
    unpack_part,
)
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_NEEDS: Mapping[str, Set[str]] = {
    "plain": frozenset(),
    "fisher": {"fisher"},
    "whitened": {"hessian"},
    "output": {"hessian"},
    "corda": {"hessian"},
}
_RIDGE = 1e-6  # of the mean: inputs that never fire are approximated for their own sake


@dataclass(frozen=True)
class LowRank(PackedOperator):
    """A (rows, rank) and a (rank, columns) factor, each stored by an operator of its own.

    The weightings, by the root S of the module's docstring:

    - ``plain``: none (SVD).
    - ``fisher``: the square root of each input's summed Fisher information (FWSVD, section 3).
    - ``whitened``: a root of the Hessian, so that the output error on the calibration text is least
      (SVD-LLM, section 3.1).
    - ``output``: principal components of the outputs (LoRD). Without a correction for their mean
      these are the leading eigenvectors of ``W H W'``, the very subspace of ``whitened``.
    - ``corda``: the Hessian itself (CorDA, equation 3), which favours strong inputs further.

    Attributes:
        keep: Values stored in both factors as a fraction of the dense matrix's.
        weighting: What the error is weighed by.
        multiple: Ranks are multiples of this, as kernels want them. Where a matrix is too small
            for one, any rank will do.
        factors: Stores both factors; statistics that it needs are made those of its own inputs.
    """

    keep: float
    weighting: str = "plain"
    multiple: int = 8
    factors: Operator = DENSE

    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"low_rank: keep must be above 0 and at most 1, got {self.keep}")
        if self.weighting not in _NEEDS:
            raise ValueError(
                f"low_rank: weighting must be one of {', '.join(_NEEDS)}, got {self.weighting!r}"
            )
        if self.multiple < 1:
            raise ValueError(f"low_rank: multiple must be at least 1, got {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        """Those of the weighting and those of the factors' operator."""
        return self.factors.needs | _NEEDS[self.weighting]

    @property
    def label(self) -> str:
        """For example ``rank0.5`` or ``rank0.25-whitened(int4-g64)``."""
        parts = [f"rank{self.keep}"]
        parts += [self.weighting] if self.weighting != "plain" else []
        parts += [f"m{self.multiple}"] if self.multiple != 8 else []
        return "-".join(parts) + stored_as(self.factors)

    def rank(self, shape: Matrix) -> int:
        """``floor(keep m n / (m + n))``, rounded down to the multiple but never to nothing."""
        rows, columns = shape
        raw = whole(self.keep * rows * columns / (rows + columns))
        return round_rank(raw, min(shape), self.multiple)

    def unfit(self, shape: Matrix) -> str:
        """Whatever keeps the factors' operator from storing them."""
        rank = self.rank(shape)
        return self.factors.unfit((shape[0], rank)) or self.factors.unfit((rank, shape[1]))

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The factors ``left`` and ``right``: ``2 r (m + n)`` bytes at 16 bits."""
        return factors_layout(self.factors, shape, self.rank(shape))

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The factors; their singular values are split evenly between them."""
        matrix = weight.double()
        seen = needed(stats, self.needs, self.name)
        rank = self.rank((weight.shape[0], weight.shape[1]))
        directions = left_singular_vectors(self._weigh(matrix, seen), rank)
        return pack_factors(matrix, directions, self.factors, seen)

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """The product of the factors."""
        left, right = self.unpack_factors(packed, shape)
        return left @ right

    def unpack_factors(self, packed: Mapping[str, Tensor], shape: Matrix) -> tuple[Tensor, Tensor]:
        """(rows, rank) and (rank, columns) float32 factors."""
        return unpack_factors(packed, self.factors, shape, self.rank(shape))

    def _weigh(self, matrix: Tensor, stats: Statistics) -> Tensor:
        """``W S`` for a (rows, columns) float64 matrix."""
        if self.weighting == "plain":
            return matrix
        if self.weighting == "fisher":
            information = required(stats, "fisher", self.name).double().sum(0)
            return matrix * (information + (_RIDGE * information.mean() or 1)).sqrt()
        hessian = required(stats, "hessian", self.name).double()
        return matrix @ (damped(hessian) if self.weighting == "corda" else cholesky_root(hessian))


def whole(count: float) -> int:
    """A count rounded down, where 0.3 of 10 are 3 and no rounding error makes them 2."""
    return int(count + 1e-9)


def round_rank(raw: int, most: int, multiple: int) -> int:
    """A rank rounded down to a multiple: at least one multiple, or ``raw`` if there is no room.

    Args:
        raw: What is wanted.
        most: The most that is possible.
        multiple: As kernels want it.

    Returns:
        1 to ``most``.
    """
    rounded = raw - raw % multiple or multiple
    return rounded if rounded <= most else min(max(raw, 1), most)


def damped(hessian: Tensor, ridge: float = _RIDGE) -> Tensor:
    """(columns, columns) with a multiple of its mean diagonal added; the identity if it is zero."""
    import torch

    mean = hessian.diagonal().mean()
    unit = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian + ridge * mean * unit if mean > 0 else unit


def cholesky_root(hessian: Tensor) -> Tensor:
    """(columns, columns) lower triangular S with ``S S'`` the Hessian, damped until it has one."""
    import torch

    ridge = _RIDGE
    while True:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(damped(hessian, ridge))
        if not failed:
            return root
        assert ridge < 1, "a Hessian must be positive semidefinite"
        ridge *= 2


def left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, through the Gram matrix of the shorter side.

    Args:
        matrix: (rows, columns) float64; squaring it leaves float32 its full precision.
        rank: How many, at most the shorter side.

    Returns:
        (rows, rank) orthonormal columns, the strongest first.
    """
    import torch

    if matrix.shape[0] <= matrix.shape[1]:
        return _leading(matrix @ matrix.T, rank)
    directions: Tensor = torch.linalg.qr(matrix @ _leading(matrix.T @ matrix, rank))[0]
    return directions


def _leading(gram: Tensor, rank: int) -> Tensor:
    """(side, rank) eigenvectors of a symmetric matrix, the strongest first."""
    import torch

    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)[:, :rank]


def factors_layout(factors: Operator, shape: Matrix, rank: int) -> tuple[StoredTensor, ...]:
    """The stored tensors of the two factors of a (rows, columns) matrix."""
    rows, columns = shape
    left = part_layout("left", factors, (rows, rank))
    return left + part_layout("right", factors, (rank, columns))


def pack_factors(
    matrix: Tensor, directions: Tensor, factors: Operator, stats: Statistics = NO_STATISTICS
) -> dict[str, Tensor]:
    """Store a matrix projected on some of its output directions.

    The right factor is fitted to the left one as stored, which makes up for part of its rounding.
    Because S cancels, least squares are the right fit for every weighting.

    Args:
        matrix: (rows, columns) float64.
        directions: (rows, rank) orthonormal.
        factors: Stores both factors.
        stats: Of the matrix; those that ``factors`` needs must be known.
    """
    right = directions.T @ matrix
    balance = right.norm(dim=1).sqrt()
    balance[balance == 0] = 1
    left, right = directions * balance, right / balance[:, None]
    of_left, _ = factor_statistics(stats, factors.needs, left.float(), right.float())
    packed = pack_part("left", factors, left.float(), of_left)
    stored = unpack_part("left", factors, packed, (len(left), len(right))).to(matrix)
    right = _fit(stored, matrix)
    _, of_right = factor_statistics(stats, factors.needs, stored.float(), right.float())
    return packed | pack_part("right", factors, right.float(), of_right)


def unpack_factors(
    packed: Mapping[str, Tensor], factors: Operator, shape: Matrix, rank: int
) -> tuple[Tensor, Tensor]:
    """Invert :func:`pack_factors`: (rows, rank) and (rank, columns) float32."""
    rows, columns = shape
    left = unpack_part("left", factors, packed, (rows, rank))
    return left, unpack_part("right", factors, packed, (rank, columns))


def _fit(left: Tensor, matrix: Tensor) -> Tensor:
    """(rank, columns) least-squares right factor; a zero column of ``left`` gets a zero row."""
    import torch

    norms: Tensor = left.norm(dim=0)
    norms[norms == 0] = 1
    unit = left / norms
    gram = damped(unit.T @ unit, 1e-10)
    right: Tensor = torch.linalg.solve(gram, unit.T @ matrix)
    return right / norms[:, None]

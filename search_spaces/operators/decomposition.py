"""The truncated SVD that compositions are made of, and the scales they put a matrix under.

The problem: fitting factors and residual in turn takes one decomposition a round, a residual stack
one a level. For a large matrix each has to be found without the full decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from search_spaces.operators.base import Operator, Statistics, required
from search_spaces.operators.nested import DENSE

if TYPE_CHECKING:
    from torch import Tensor

_OVERSAMPLING = 10
_POWER_ITERATIONS = 4
_LARGEST_EXACT = 128
_LEAST_SHARE = 1e-6  # of the mean: what never fires still gets a scale that float16 holds


def stored_as(operator: Operator) -> str:
    """How a nested operator shows in a label: in parentheses, or nothing if it is the default."""
    return "" if operator == DENSE else f"({operator.label})"


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the best approximation of a rank, or nearly so.

    Small matrices and high ranks are decomposed exactly; others by subspace iteration from a fixed
    Gaussian start with ten columns to spare (Halko, Martinsson and Tropp 2011, algorithm 4.4). The
    product is then still an orthogonal projection of the matrix.

    Args:
        matrix: (rows, columns) float32.
        rank: At most the smaller of the two.

    Returns:
        (rows, rank) and (rank, columns), each with the square root of the singular values.
    """
    import torch

    smaller = min(matrix.shape)
    if smaller <= _LARGEST_EXACT or 3 * (rank + _OVERSAMPLING) > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[1], rank + _OVERSAMPLING, generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis)[0]
            basis = torch.linalg.qr(matrix @ basis)[0]
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def relative_scales(weights: Tensor, power: float) -> Tensor:
    """Scales of the size of one that follow importances: their ``power`` over their mean's.

    Args:
        weights: (num_values,) not negative.
        power: 0.5 turns mean squares into norms.

    Returns:
        (num_values,) float32; where nothing is important at all, ones.
    """
    mean = weights.float().mean()
    if not mean > 0:
        return weights.new_ones(weights.shape).float()
    return (weights.float() / mean).clamp(min=_LEAST_SHARE).pow(power)


def factor_statistics(
    stats: Statistics, needs: frozenset[str], left: Tensor, right: Tensor
) -> tuple[Statistics, Statistics]:
    """What each factor of a matrix sees of what the matrix sees.

    Inputs reach the right factor as they are and the left one through it. Second moments and
    Fisher are carried over as if inputs, and gradients, were uncorrelated.

    Args:
        stats: Of the (rows, columns) matrix.
        needs: Kinds that the factors' operator needs; all of them must be known.
        left: (rows, rank).
        right: (rank, columns).
    """
    moment = stats.second_moment if "second_moment" in needs else None
    hessian = stats.hessian if "hessian" in needs else None
    fisher = stats.fisher if "fisher" in needs else None
    of_left = Statistics(
        None if moment is None else right.square() @ moment,
        None if hessian is None else right @ hessian @ right.T,
        None if fisher is None else fisher @ right.square().T,
    )
    of_right = Statistics(moment, hessian, None if fisher is None else left.square().T @ fisher)
    return of_left, of_right


def needed(stats: Statistics, needs: frozenset[str], operator: str) -> Statistics:
    """Only the kinds that an operator needs, in float32: others must not change its numbers.

    Raises:
        ValueError: One of them was not collected.
    """
    return Statistics(**{kind: required(stats, kind, operator).float() for kind in needs})

"""Second moments of a matrix's inputs: what output errors are, and the factor that undoes them.

GPTQ and SparseGPT walk along the same factor of the inverse. For wide matrices it takes as long to
make as the walk, and all options of one matrix ask for the same.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Made:
    of: weakref.ref[Tensor]
    how: tuple[int, float, tuple[int, ...] | None]
    factor: Tensor


class LatestFactor:
    """Makes factors, and remembers the last: options of one matrix are made one after another.

    Nothing outlives its Hessian, and a Hessian that was written to since is factored again.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None  # replaced as a whole, so that threads see one or another

    def factor(self, hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
        """:func:`inverse_factor` of a Hessian whose columns were put in an order.

        Args:
            hessian: (columns, columns) mean outer product of the inputs.
            damping: Added to the diagonal, as a fraction of its mean.
            order: (columns,) the walk; as they stand where there is none.

        Returns:
            (columns, columns) float32; not to be written to.

        Raises:
            ValueError: The Hessian is not finite.
        """
        places = None if order is None else tuple(order.tolist())
        version = 0 if hessian.is_inference() else hessian._version
        how = version, damping, places
        made = self._made
        if made is not None and made.of() is hessian and made.how == how:
            return made.factor
        self.forget()
        sorted_ = hessian if order is None else hessian[order][:, order]
        factor = inverse_factor(sorted_.float(), damping)
        self._made = _Made(weakref.ref(hessian, self._died), how, factor)
        return factor

    def forget(self) -> None:
        """Free what is remembered."""
        self._made = None

    def _died(self, dead: weakref.ref[Tensor]) -> None:
        made = self._made
        if made is not None and made.of is dead:
            self.forget()


FACTORS = LatestFactor()
"""Of this process."""


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``U' U`` the inverse of the damped Hessian.

    Factorising the Hessian from its last column upwards gives the inverse of ``U`` itself, so
    nothing is inverted but a triangle. Where that fails, damping grows tenfold until it works.

    Args:
        hessian: (columns, columns) mean outer product of the inputs.
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        (columns, columns) float32; columns that never fire stand apart from all others.

    Raises:
        ValueError: The Hessian is not finite.
    """
    import torch

    if not torch.isfinite(hessian).all():
        raise ValueError("hessian: expected finite values, got some that are not")
    base = hessian.double()
    diagonal = base.diagonal()
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    while True:
        damped = base.clone()
        damped.diagonal().copy_(diagonal + damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping *= 10
    identity = torch.eye(len(base), dtype=base.dtype, device=base.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor.float()


def output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """(rows,) mean squared error of each output, ``e H e'``, from the (rows, columns) error."""
    return (error @ hessian).mul_(error).sum(1)

"""Small expressions that turn a layer's importances into one number, and numbers into ratios.

DSA does not design the statistic by which layers are given their sparsity, it searches for one: a
chain of element-wise operators, one reduction and operators on the reduced value, mapped to ratios
by the spread mapper. A found chain is plain data and serves other models unchanged.

Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models",
NeurIPS 2024. Its importances are whole matrices; here they are sorted samples, so the reductions
that need a matrix are left out: Gram, correlation, diagonal, determinant, log-determinant and rank.
(The paper reduces the concatenated importances of a block, of which they say nothing either: a
single row has rank 1 and correlation 1.) The Frobenius norm is that of the sample, a root mean
square but for a constant, which does not grow with the layer as the norm of all its weights does.
The unused trailing integer of the released code has no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from objectives.mappers import box_project, minmax, spread_map

Values = NDArray[np.float64]
Operator = Callable[[Values], Values]
_FLOOR = 0.01  # least ratio that is removed, as in DSA's code


def _entropy(values: Values) -> Values:
    """Shannon entropy in nats of the absolute values, scaled to sum to 1."""
    shares = np.abs(values) / np.abs(values).sum(axis=-1, keepdims=True)
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(-(shares * logarithms).sum(axis=-1))


def _softplus(values: Values) -> Values:
    return np.logaddexp(0.0, values)


def _sigmoid(values: Values) -> Values:
    return 1 / (1 + np.exp(-values))


PRE: Mapping[str, Operator] = {
    "identity": lambda v: v,
    "abs": np.abs,
    "log": np.log,
    "abs_log": lambda v: np.log(np.abs(v)),
    "square": np.square,
    "exp": np.exp,
    "z_score": lambda v: (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "minmax": lambda v: np.stack([minmax(row) for row in v]),
}
"""Element-wise; z-score and min-max by the layer's own moments and range."""

REDUCTIONS: Mapping[str, Operator] = {
    "identity": lambda v: v,
    "frobenius": lambda v: np.sqrt(np.square(v).sum(-1)),
    "l1_mean": lambda v: np.abs(v).mean(-1),
    "geometric_mean": lambda v: np.exp(np.log(np.abs(v)).mean(-1)),
    "mean": lambda v: v.mean(-1),
    "variance": lambda v: v.var(-1),
    "std": lambda v: v.std(-1),
    "entropy": _entropy,
}
"""Over the sample; after ``identity`` the result is averaged in the end."""

POST: Mapping[str, Operator] = {
    "identity": lambda v: v,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "exp": np.exp,
    "log": np.log,
    "abs": np.abs,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softplus": _softplus,
}
SIGNS = (-1, 1)
GROUPS = ("block", "unit")


@dataclass(frozen=True)
class Formula:
    """One expression with the mapper's parameters.

    Attributes:
        pre: 0 to 2 names of ``PRE``.
        reduction: A name of ``REDUCTIONS``.
        post: 1 or 2 names of ``POST``.
        sign: -1 if a larger statistic removes more, as published; 1 if it removes less.
        spread: Half the range of the ratios (lambda).
        group: What gets one ratio: a ``block``, as published, or a ``unit``.
    """

    pre: tuple[str, ...]
    reduction: str
    post: tuple[str, ...]
    sign: int = -1
    spread: float = 0.08
    group: str = "block"

    def __post_init__(self) -> None:
        stages = (
            ("pre", self.pre, PRE, (0, 2)),
            ("reduction", (self.reduction,), REDUCTIONS, (1, 1)),
            ("post", self.post, POST, (1, 2)),
        )
        for stage, names, table, (least, most) in stages:
            if not least <= len(names) <= most or any(name not in table for name in names):
                raise ValueError(
                    f"formula: expected {least} to {most} operators as {stage}, of "
                    f"{', '.join(table)}; got {', '.join(names) or 'none'}"
                )
        if self.sign not in SIGNS or self.group not in GROUPS or not 0 < self.spread <= 0.5:
            raise ValueError(
                f"formula: expected a sign of -1 or 1, a group of {' or '.join(GROUPS)} and a "
                f"spread up to 0.5; got {self.sign}, {self.group!r}, {self.spread}"
            )

    def __str__(self) -> str:
        chain = " - ".join([*self.pre, self.reduction, *self.post])
        return f"{'-' if self.sign < 0 else '+'}({chain}), spread {self.spread:g}, by {self.group}"

    def statistics(self, samples: Sequence[Values]) -> Values:
        """The number of each group; NaN becomes 0, infinite stays.

        Args:
            samples: For each group a sorted (num_samples,) sample of its importances.
        """
        values = np.stack(samples)
        with np.errstate(all="ignore"):
            for name in self.pre:
                values = PRE[name](values)
            values = REDUCTIONS[self.reduction](values)
            for name in self.post:
                values = POST[name](values)
            if values.ndim > 1:
                values = values.mean(-1)
        return np.where(np.isnan(values), 0.0, values)

    def ratios(self, samples: Sequence[Values], removed: float) -> Values:
        """The share to remove of each group.

        Args:
            samples: For each group a sorted (num_samples,) sample of its importances.
            removed: Plain mean of the shares, 0 to 1.

        Raises:
            ValueError: A statistic is infinite, or ``removed`` is not a share.
        """
        statistics = self.statistics(samples)
        if not np.isfinite(statistics).all():
            raise ValueError(f"formula {self} is infinite on these importances")
        if not 0 <= removed <= 1:
            raise ValueError(f"expected a share to remove from 0 to 1, got {removed}")
        ratios = spread_map(statistics, removed, self.spread, sign=self.sign)
        if ratios.min() >= _FLOOR and ratios.max() <= 1:
            return ratios
        equal = np.ones_like(ratios)
        return box_project(ratios, equal, removed, least=min(_FLOOR, removed), most=1.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Formula:
        """The formula that :meth:`to_json` wrote.

        Raises:
            ValueError: It names what is not in the operator table.
        """
        names = ("pre", "reduction", "post", "sign", "spread", "group")
        pre, reduction, post, sign, spread, group = (data[name] for name in names)
        for stage, given in (("pre", pre), ("post", post)):
            if not isinstance(given, list):
                raise ValueError(f"formula: expected a list as {stage}, got {given!r}")
        if not isinstance(spread, int | float):
            raise ValueError(f"formula: expected a number as spread, got {spread!r}")
        return cls(tuple(pre), reduction, tuple(post), sign, spread, group)

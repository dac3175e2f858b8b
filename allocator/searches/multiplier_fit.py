"""The way back from an assignment to multipliers: which point of the reduced space decodes to it.

The problem: what another search measured has no point, and samplers learn from points alone. At a
multiplier ``w`` of its losses and a price per byte, a unit's best option is ``i`` as long as
``log w`` lies between two numbers: below, a smaller option would pay; above, a larger one. So an
assignment is an interval for each unit, and its point is that of which the units' sums of factors
are nearest to their intervals in least squares, the price being one more unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Losses
from search_spaces.space import Assignment

_ROUNDS = 60  # of moving every unit into its interval and fitting anew
_RIDGE = 1e-3  # where several points serve, the one nearest to 0

Vector = NDArray[np.float64]


def fit_multipliers(
    bytes_: Sequence[Costs],
    losses: Sequence[Losses],
    members: NDArray[np.float64],
    assignment: Assignment,
) -> Vector:
    """The log multipliers whose plans are nearest to an assignment.

    Args:
        bytes_: For each unit the bytes of its options.
        losses: For each unit the losses of its options, before they are multiplied.
        members: (num_units, num_factors) 1 where a factor applies to a unit, else 0.
        assignment: Option index of each unit.

    Returns:
        (num_factors,) not limited; all 0 where no unit says anything.
    """
    ends = [_interval(*row) for row in zip(bytes_, losses, assignment, strict=True)]
    low, high = np.array(ends).T
    rows = np.isfinite(low) | np.isfinite(high)
    if not rows.any():
        return np.zeros(members.shape[1])
    low, high = low[rows], high[rows]
    design = np.column_stack([members, np.ones(len(ends))])[rows]
    ridge = np.diag([*[_RIDGE] * members.shape[1], _RIDGE**2])  # the price is hardly held back
    inverse = np.linalg.solve(design.T @ design + ridge, design.T)
    one_end = np.where(np.isfinite(low), low, high)
    wanted = np.where(np.isfinite(low) & np.isfinite(high), (low + high) / 2, one_end)
    for _ in range(_ROUNDS):
        wanted = np.clip(design @ (inverse @ wanted), low, high)
    return np.asarray((inverse @ wanted)[:-1], np.float64)


def _interval(cost: Costs, loss: Losses, option: int) -> tuple[float, float]:
    """Where the log multiplier of a unit may lie that chooses an option at a price of 1.

    An option above its menu's convex hull is chosen nowhere: both ends are then the middle of what
    the options on either side ask for.
    """
    larger = (cost - cost[option]).astype(np.float64)
    gained = loss[option] - loss
    least_above, most_below = 0.0, np.inf
    if (larger > 0).any():
        least_above = float((gained[larger > 0] / larger[larger > 0]).max())
    if (larger < 0).any():
        most_below = float((gained[larger < 0] / larger[larger < 0]).min())
    if most_below <= 0:  # a smaller option is no worse: no multiplier chooses this one
        return -np.inf, np.inf
    if least_above > most_below:
        least_above = most_below = float(np.sqrt(least_above * most_below))
    high = -float(np.log(least_above)) if least_above > 0 else np.inf
    return -float(np.log(most_below)), high

"""From a ratio per unit to an assignment: as near to the ratios as whole options and bytes allow.

Published heuristics end in a ratio for each block or matrix, and realise it by truncation, which
leaks budget in one direction or the other. Here all ratios are shifted by one number until the
options nearest to them would fill the budget, and the exact solver chooses the options with the
least squared distance, weighted by size, that do not exceed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.problem import Costs, Problem
from allocator.solvers.dynamic import DynamicProgram
from search_spaces.space import Assignment

_BISECTIONS = 60


def nearest_assignment(
    bytes_: Sequence[Costs],
    removed: Sequence[NDArray[np.float64]],
    ratios: ArrayLike,
    budget_bytes: int,
) -> Assignment:
    """The assignment within a budget that is nearest to a removed ratio per unit.

    Args:
        bytes_: For each unit the bytes of its options.
        removed: For each unit the ratio that each option removes, such as its sparsity, or the
            share of the dense bytes that it saves; what the ratios speak of.
        ratios: (num_units,) wanted; shifted together until the budget is met.
        budget_bytes: Most bytes; never exceeded.

    Raises:
        ValueError: Nothing fits the budget, or a ratio is not finite.
    """
    wanted = np.asarray(ratios, dtype=float)
    if wanted.shape != (len(bytes_),) or not np.isfinite(wanted).all():
        raise ValueError(f"expected {len(bytes_)} finite ratios, got {ratios!r}")
    sizes = [float(cost.max()) for cost in bytes_]

    def distances(shift: float) -> tuple[NDArray[np.float64], ...]:
        return tuple(
            size * (row - (ratio + shift)) ** 2
            for size, row, ratio in zip(sizes, removed, wanted, strict=True)
        )

    def nearest_bytes(shift: float) -> int:
        return sum(
            int(cost[int(distance.argmin())])
            for cost, distance in zip(bytes_, distances(shift), strict=True)
        )

    ends = [float(row.max()) for row in removed], [float(row.min()) for row in removed]
    high = max(ends[0]) - float(wanted.min())  # removes the most everywhere
    low = min(ends[1]) - float(wanted.max())  # removes the least everywhere
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if nearest_bytes(middle) >= budget_bytes:
            low = middle
        else:
            high = middle
    solution = DynamicProgram().solve(Problem(tuple(bytes_), distances(low), budget_bytes))
    if not solution.choice:
        raise ValueError(f"no assignment fits {budget_bytes} bytes")
    return solution.choice

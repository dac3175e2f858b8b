"""From a ratio per unit to an assignment: as near to the ratios as whole options and bytes allow.

Published heuristics end in a ratio for each block or matrix, and realise it by truncation, which
leaks budget in one direction or the other. Here all ratios are shifted by one number until the
options nearest to them would fill the budget, and the exact solver chooses the options with the
least squared distance, weighted by size, that do not exceed it. :func:`published_plan` does so for
a scorer's importances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.problem import Costs, Problem
from allocator.solvers.dynamic import DynamicProgram
from search_spaces.operators import AnyOperator, Keep
from search_spaces.operators.sparse_storage import SparseOperator
from search_spaces.space import Assignment, SearchSpace, Unit

if TYPE_CHECKING:
    from objectives.sensitivity.importance import ImportanceScorer

_BISECTIONS = 60


def published_plan(
    scorer: ImportanceScorer, importances: ArrayLike, space: SearchSpace, budget_bytes: int
) -> Assignment:
    """What a published heuristic would do with a budget, to the byte.

    The heuristic is asked for ratios at the mean that fills the budget when every unit loses alike,
    and the assignment nearest to its ratios within the budget is taken.

    Args:
        scorer: Whose mapping is used; the one that measured the importances.
        importances: (num_units,) as it measured them.
        space: Units and menus.
        budget_bytes: Most bytes of the searched units; never exceeded.

    Raises:
        ValueError: Nothing fits the budget, or the scorer cannot serve the space.
    """
    bytes_ = [np.array([option.bytes for option in menu]) for menu in space.menus]
    removed = removed_ratios(space)
    mean = float(np.clip(_even_ratio(bytes_, removed, budget_bytes), 0.0, 1.0))
    ratios = scorer.ratios(importances, space, mean)
    return nearest_assignment(bytes_, removed, ratios, budget_bytes)


def removed_ratios(space: SearchSpace) -> list[NDArray[np.float64]]:
    """For each unit the ratio that each option removes, in the sense of published heuristics.

    The sparsity where the space holds nothing but dense matrices and prunings whose kept weights
    stay dense; else the share of the dense bytes that an option saves, for all options of all
    units: the two must not be mixed, since half the weights are less than half the bytes.
    """
    pairs = list(zip(space.units, space.menus, strict=True))
    sparsities = [[_sparsity(unit, option.operator) for option in menu] for unit, menu in pairs]
    if all(sparsity is not None for row in sparsities for sparsity in row):
        return [np.array(row, dtype=float) for row in sparsities]
    dense = [unit.bytes(Keep()) for unit, _ in pairs]
    return [
        np.array([1 - option.bytes / size for option in menu])
        for (_, menu), size in zip(pairs, dense, strict=True)
    ]


def _sparsity(unit: Unit, operator: AnyOperator) -> float | None:
    """Share of a unit's weights that are dropped; ``None`` where that does not say it all."""
    if isinstance(operator, Keep):
        return 0.0
    if not isinstance(operator, SparseOperator) or getattr(operator, "values", None) != Keep():
        return None
    kept = sum(operator.num_kept(m.matrix_shape) * m.num_matrices for m in unit.members)
    return 1 - kept / unit.num_weights


def _even_ratio(
    bytes_: Sequence[Costs], removed: Sequence[NDArray[np.float64]], budget_bytes: int
) -> float:
    """The ratio that fills the budget if every unit loses it, between options by interpolation."""
    orders = [row.argsort(kind="stable") for row in removed]
    curves = [(row[i], cost[i]) for row, cost, i in zip(removed, bytes_, orders, strict=True)]
    low = min(float(ratios[0]) for ratios, _ in curves)
    high = max(float(ratios[-1]) for ratios, _ in curves)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(np.interp(middle, ratios, costs) for ratios, costs in curves) > budget_bytes:
            low = middle
        else:
            high = middle
    return high


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

    offered = np.full((len(bytes_), max(map(len, bytes_))), np.inf)  # no option is never nearest
    prices = np.zeros(offered.shape, np.int64)
    for unit, (row, cost) in enumerate(zip(removed, bytes_, strict=True)):
        offered[unit, : len(row)] = row
        prices[unit, : len(cost)] = cost

    units = np.arange(len(bytes_))

    def nearest_bytes(shift: float) -> int:
        nearest = ((offered - (wanted + shift)[:, None]) ** 2).argmin(axis=1)
        return int(prices[units, nearest].sum())

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


def cut_assignment(problem: Problem) -> Assignment:
    """The plan of one cut through all losses: the smallest option of each unit that is under it.

    BitStack and ASVD sort all pairs of matrix and level by the loss that each causes alone, and
    cut the list where the size is met: every unit then takes its cheapest option whose loss does
    not exceed the cut. A unit none of whose options does takes its least loss.

    Args:
        problem: Losses of single options, and a byte budget, which is never exceeded.

    Raises:
        ValueError: Nothing fits the budget.
    """
    levels = np.unique(np.concatenate(problem.losses))

    def plan(cut: float) -> Assignment:
        chosen = []
        for cost, loss in zip(problem.bytes, problem.losses, strict=True):
            under = np.flatnonzero(loss <= cut)
            best = int(loss.argmin()) if not len(under) else int(under[cost[under].argmin()])
            chosen.append(best)
        return tuple(chosen)

    low, high = 0, len(levels) - 1  # a higher cut is never larger
    if problem.total_bytes(plan(levels[high])) > problem.budget_bytes:
        raise ValueError(f"no assignment fits {problem.budget_bytes} bytes")
    while low < high:
        middle = (low + high) // 2
        if problem.total_bytes(plan(levels[middle])) <= problem.budget_bytes:
            high = middle
        else:
            low = middle + 1
    return plan(levels[high])

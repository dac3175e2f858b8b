"""One budget for all rows of all matrices: from loss curves to exact counts and operators.

The problem: a sparsity per matrix, split among its rows afterwards, lets no weight move from a row
that can spare it to a row of another matrix. Here every row of every matrix gets a menu of numbers
of weights to keep, priced in bytes, and one multiplier buys for all of them (`solvers/rows.py`).
What comes out can be stated in a plan: each matrix's exact total, which `RowPrune` divides among
its rows by the same rule, weight by weight, so at least as well as the menu's steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Status
from allocator.row_problem import RowLosses, RowProblem, RowSolution
from allocator.solvers.rows import solve_rows
from search_spaces.operators import RowPrune
from search_spaces.operators.base import Matrix
from search_spaces.operators.row_prune import kept_counts
from search_spaces.storage import packed_bytes


@dataclass(frozen=True)
class RowCurves:
    """What the rows of one matrix lose by the share of their weights that they keep.

    Attributes:
        name: For messages.
        shape: (rows, columns) of the matrix.
        losses: (rows, num_shares) float32 or float64, as `row_losses` of `row_prune.py` makes them,
            in a unit that all matrices share.
    """

    name: str
    shape: Matrix
    losses: RowLosses


@dataclass(frozen=True)
class RowAllocation:
    """A joint allocation over rows.

    Attributes:
        counts: For each matrix int64 (rows,) weights kept in each row.
        operators: For each matrix the pruning with that exact total.
        bytes: Exact bytes that the operators store.
        solution: Of the row problem, whose bytes leave out the bitmaps.
    """

    counts: tuple[NDArray[np.int64], ...]
    operators: tuple[RowPrune, ...]
    bytes: int
    solution: RowSolution

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Share dropped of each matrix."""
        return tuple(operator.sparsity for operator in self.operators)


def allocate_rows(
    curves: Sequence[RowCurves], shares: Sequence[float], *, budget_bytes: int, rule: RowPrune
) -> RowAllocation:
    """Divide a budget among all rows of all matrices.

    A row is priced as its share of a bitmap. That is exact for values kept in 16 bits, and never
    too little for values in groups: only the last group of a matrix is short, not one of each row.
    A matrix that ends below 1/16 of its weights is stored in compressed rows, which take less than
    the bitmap that was paid for; those bytes stay unspent.

    Args:
        curves: The matrices.
        shares: Ascending shares of a row's weights to choose from, above 0 to 1; the first is the
            floor.
        budget_bytes: Most bytes that all matrices together may store.
        rule: How weights are scored and stored; its split must be ``water``.

    Raises:
        ValueError: The shares, the rule or the losses do not fit, or the budget is too small.
    """
    _check(curves, shares, rule)
    menus = [kept_counts(matrix.shape[1], shares) for matrix in curves]
    fixed_bytes = sum(packed_bytes(math.prod(matrix.shape), 1) for matrix in curves)
    prices = [_price(rule, menu) for menu in menus]
    problem = RowProblem(
        tuple(prices), tuple(matrix.losses for matrix in curves), budget_bytes - fixed_bytes
    )
    solution = solve_rows(problem)
    if solution.status is Status.INFEASIBLE:
        raise ValueError(
            f"rows: the budget is {budget_bytes} bytes, but keeping {shares[0]:g} of every row "
            f"takes {problem.least_bytes + fixed_bytes}"
        )
    counts = tuple(
        np.array(menu, dtype=np.int64)[choice]
        for menu, choice in zip(menus, problem.split(solution.choice), strict=True)
    )
    operators = []
    for matrix, own in zip(curves, counts, strict=True):
        num_kept = int(own.sum())
        sparsity = 1 - num_kept / math.prod(matrix.shape)
        operators.append(
            replace(rule, sparsity=sparsity, keep_exactly=num_kept, floor=float(shares[0]))
        )
    stored = sum(o.bytes(matrix.shape) for o, matrix in zip(operators, curves, strict=True))
    assert stored <= budget_bytes, (stored, budget_bytes)
    return RowAllocation(counts, tuple(operators), stored, solution)


def _price(rule: RowPrune, menu: Sequence[int]) -> Costs:
    """(num_shares,) bytes of the values of one row."""
    for kept in menu:
        reason = rule.values.unfit((1, kept))
        if reason:
            raise ValueError(
                f"rows: {kept} weights cannot be stored as {rule.values.label}: {reason}"
            )
    return np.array([rule.values.bytes((1, kept)) for kept in menu], dtype=np.int64)


def _check(curves: Sequence[RowCurves], shares: Sequence[float], rule: RowPrune) -> None:
    ascending = all(low < high for low, high in pairwise(shares))
    if not shares or not ascending or not 0 < shares[0] <= shares[-1] <= 1:
        raise ValueError(f"rows: shares must ascend within 0 to 1, above 0, got {list(shares)}")
    if rule.split != "water":
        raise ValueError(f"rows: only the split 'water' takes exact totals from here, got {rule!r}")
    for matrix in curves:
        if matrix.losses.shape != (matrix.shape[0], len(shares)):
            raise ValueError(
                f"rows: {matrix.name} has losses {matrix.losses.shape}, expected one for each of "
                f"{matrix.shape[0]} rows and {len(shares)} shares"
            )

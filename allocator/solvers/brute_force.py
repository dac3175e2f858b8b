"""Every assignment, one by one: the oracle that the tests hold the other solvers against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem, Solution, Status
from allocator.solvers.base import check_extras, infeasible


@dataclass(frozen=True)
class BruteForce:
    """Tries all assignments, constraints and ties included.

    Of equal losses the one with the fewest bytes wins, then the first in option order.

    Attributes:
        most_assignments: Larger problems are refused.
    """

    name: ClassVar[str] = "brute_force"
    most_assignments: int = 1_000_000

    def solve(self, problem: Problem) -> Solution:
        """The optimum.

        Raises:
            ValueError: More assignments than ``most_assignments``.
        """
        check_extras(problem)
        sizes = [len(menu) for menu in problem.bytes]
        num_assignments = math.prod(sizes)
        if num_assignments > self.most_assignments:
            raise ValueError(
                f"solver 'brute_force' takes up to {self.most_assignments} assignments, "
                f"got {num_assignments}; use 'dynamic' or 'milp'"
            )
        total_bytes = _totals(problem.bytes)
        losses = _totals(problem.losses)
        fits = total_bytes <= problem.budget_bytes
        for constraint in problem.constraints:
            fits &= _totals(constraint.costs) <= constraint.limit
        choices = np.indices(sizes).reshape(len(sizes), -1) if problem.ties else None
        for group in problem.ties:
            assert choices is not None
            fits &= (choices[list(group)] == choices[group[0]]).all(axis=0)
        feasible = np.flatnonzero(fits)
        if not len(feasible):
            return infeasible()
        best = int(feasible[np.lexsort((total_bytes[feasible], losses[feasible]))[0]])
        loss = float(losses[best])
        return Solution(
            choice=tuple(int(index) for index in np.unravel_index(best, sizes)),
            loss=loss,
            bytes=int(total_bytes[best]),
            lower_bound=loss,
            status=Status.OPTIMAL,
            statistics={"num_assignments": num_assignments},
        )


def _totals(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """For each unit (num_options,) -> (num_assignments,) sums, the last unit varying fastest."""
    totals = values[0]
    for row in values[1:]:
        totals = np.add.outer(totals, row).ravel()
    return totals

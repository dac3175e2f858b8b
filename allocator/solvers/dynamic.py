"""Exact answers to the additive problem, for one budget or many, without rounding a byte.

The problem is a multiple-choice knapsack: one option per unit, least summed loss, one budget. The
convex hulls give a bound (`hull.py`); what lies between the bound and the best known assignment is
searched exactly by dynamic programming over undominated (bytes, loss) states (`core.py`). This
takes milliseconds for hundreds of matrices, so it also serves as the oracle inside searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from allocator.problem import Costs, Losses, Problem, Solution
from allocator.solvers.base import infeasible, refuse_extras
from allocator.solvers.core import search_core
from allocator.solvers.hull import Frontier, HullPath, MenuTable, hull_path, relax


@dataclass(frozen=True)
class DynamicProgram:
    """Exact solver for a byte budget over independent units.

    Equal problems get equal answers. Losses are proved optimal to one part in 1e14 of the summed
    magnitudes.

    Attributes:
        most_states: States kept at most after each unit. Only adversarial problems (losses that
            are all but linear in incommensurable bytes) ever need more; their answer is then the
            best one found, with status ``FEASIBLE`` and a valid lower bound.
    """

    name: ClassVar[str] = "dynamic"
    most_states: int = 50_000

    def __post_init__(self) -> None:
        if self.most_states < 1:
            raise ValueError(f"most_states: expected at least 1, got {self.most_states}")

    def solve(self, problem: Problem) -> Solution:
        """The optimum within ``problem.budget_bytes``.

        Raises:
            ValueError: The problem has constraints or ties.
        """
        return self.solve_many(problem, [problem.budget_bytes])[0]

    def solve_many(self, problem: Problem, budgets: Sequence[int]) -> list[Solution]:
        """The optimum at each of several budgets, sharing all work but the last search.

        Args:
            problem: Its own budget is not used.
            budgets: Bytes.

        Raises:
            ValueError: The problem has constraints or ties.
        """
        return self.sweep(problem, budgets)[0]

    def frontier(self, problem: Problem) -> Frontier:
        """The convex hull of (bytes, least loss) over all budgets.

        Raises:
            ValueError: The problem has constraints or ties.
        """
        return self.sweep(problem, [])[1]

    def sweep(self, problem: Problem, budgets: Sequence[int]) -> tuple[list[Solution], Frontier]:
        """The optimum at each budget, and the hull for all budgets, in one call.

        Args:
            problem: Its own budget is not used.
            budgets: Bytes.

        Raises:
            ValueError: The problem has constraints or ties.
        """
        refuse_extras(problem, self.name)
        oracle = Oracle(problem.bytes, self)
        losses = oracle.table.arrange(problem.losses)
        path = hull_path(oracle.table.weights, losses)
        solutions = [oracle.solve_along(path, losses, budget) for budget in budgets]
        return solutions, Frontier.of(oracle.table, losses, path)


class Oracle:
    """Solves the same menus for many loss tables, as searches that sample losses need it.

    What depends on bytes alone is computed once.

    Args:
        bytes_: For each unit an int64 (num_options,) array of bytes.
        program: Its parameters.
    """

    def __init__(self, bytes_: Sequence[Costs], program: DynamicProgram | None = None) -> None:
        self.table = MenuTable.of(bytes_)
        self._program = program or DynamicProgram()

    def solve(self, losses: Sequence[Losses] | Losses, budget_bytes: int) -> Solution:
        """The optimum for one loss table.

        Args:
            losses: For each unit a float64 (num_options,) array in the order of its menu, or one
                (num_units, num_options) array where all menus are equally long; finite.
            budget_bytes: Most bytes the assignment may use.

        Raises:
            ValueError: Not one finite loss per option.
        """
        arranged = self.table.arrange(losses)
        return self.solve_along(hull_path(self.table.weights, arranged), arranged, budget_bytes)

    def solve_along(self, path: HullPath, losses: Losses, budget_bytes: int) -> Solution:
        """The optimum at one budget.

        Args:
            path: The hull path of the losses.
            losses: (num_units, num_columns) in the table's order.
            budget_bytes: Most bytes the assignment may use.
        """
        table = self.table
        capacity = table.capacity(budget_bytes)
        if capacity < 0:
            return infeasible()
        result = search_core(
            table.weights, losses, relax(path, capacity), most_states=self._program.most_states
        )
        return table.solution(
            result.columns,
            losses,
            gap=result.excess - result.excess_bound,
            statistics={"num_core_units": result.num_units, "num_states": result.num_states},
        )

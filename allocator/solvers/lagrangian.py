"""A bound and a good assignment for millions of units, from one multiplier.

Row-wise allocation makes every row of every matrix a unit; the exact search is then neither
affordable nor needed: the relaxation leaves a gap of less than one hull step of one unit
(`hull.py`), which is nothing among a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from allocator.problem import Losses, Problem, Solution
from allocator.solvers.base import infeasible, refuse_extras
from allocator.solvers.core import improve_once
from allocator.solvers.hull import MenuTable, hull_path, relax


@dataclass(frozen=True)
class Lagrangian:
    """The optimal multiplier's bound, and its assignment improved by a few single changes.

    Attributes:
        most_changes: Units changed at most to use up what the multiplier leaves unspent.
    """

    name: ClassVar[str] = "lagrangian"
    most_changes: int = 16

    def solve(self, problem: Problem) -> Solution:
        """A feasible assignment with its bound; optimal only where the two meet.

        Raises:
            ValueError: The problem has constraints or ties.
        """
        refuse_extras(problem, self.name)
        table = MenuTable.of(problem.bytes)
        return self.solve_table(table, table.arrange(problem.losses), problem.budget_bytes)

    def solve_table(self, table: MenuTable, losses: Losses, budget_bytes: int) -> Solution:
        """The same from arrays, for problems too large to hold one array per unit.

        Args:
            table: The menus.
            losses: (num_units, num_columns) in the table's order, see :meth:`MenuTable.arrange`.
            budget_bytes: Most bytes the assignment may use.
        """
        capacity = table.capacity(budget_bytes)
        if capacity < 0:
            return infeasible()
        path = hull_path(table.weights, losses)
        relaxation = relax(path, capacity)
        extra, reduced = relaxation.reduced(table.weights, losses)
        columns, _ = improve_once(extra, reduced, relaxation)
        index = np.arange(len(columns))
        num_changes = 0
        while num_changes < self.most_changes:
            room = capacity - int(table.weights[index, columns].sum())
            change = losses - losses[index, columns, None]
            width = table.weights - table.weights[index, columns, None]
            unit, column = divmod(
                int(np.where(width <= room, change, np.inf).argmin()), losses.shape[1]
            )
            if change[unit, column] >= 0:
                break
            columns[unit] = column
            num_changes += 1
        room = capacity - int(table.weights[index, columns].sum())
        excess = float(reduced[index, columns].sum()) + relaxation.multiplier * room
        return table.solution(
            columns,
            losses,
            gap=excess,
            statistics={"num_hull_steps": len(path.slopes), "num_changes": num_changes},
        )

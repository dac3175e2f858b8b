from __future__ import annotations

import numpy as np
import pytest
from solver_problems import layered_problem, near_linear_problem, random_problem

from allocator.problem import Problem, Status
from allocator.solvers import DynamicProgram, Lagrangian
from allocator.solvers.hull import MenuTable


@pytest.mark.parametrize("make", [layered_problem, random_problem])
@pytest.mark.parametrize("seed", range(5))
def test_brackets_the_optimum_closely(make, seed):
    problem = make(seed, num_units=80, num_options=8, fraction=0.3)
    exact, relaxed = DynamicProgram().solve(problem), Lagrangian().solve(problem)
    assert relaxed.lower_bound <= exact.loss <= relaxed.loss
    # The gap is below one hull step of one unit.
    assert relaxed.gap <= max(float(np.ptp(loss)) for loss in problem.losses)
    assert relaxed.bytes <= problem.budget_bytes


def test_more_changes_do_not_hurt():
    problem = near_linear_problem(0, num_units=50, num_options=6)
    losses = [Lagrangian(most_changes=n).solve(problem).loss for n in (0, 1, 4, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_hundred_thousand_rows_from_arrays():
    rng = np.random.default_rng(0)
    num_rows = 100_000
    sizes = np.array([0, 5, 9, 14]) * rng.integers(1, 9, (num_rows, 1))
    losses = rng.exponential(size=(num_rows, 1)) * np.array([1.0, 0.4, 0.2, 0.0])
    table = MenuTable.of(sizes)
    budget = int(sizes.max(axis=1).sum()) // 3
    solution = Lagrangian().solve_table(table, table.arrange(losses), budget)
    assert solution.bytes <= budget
    assert solution.gap <= 1e-6 * solution.loss


def test_arrays_and_problem_agree():
    problem = layered_problem(4, num_units=20, num_options=5, fraction=0.4)
    table = MenuTable.of(problem.bytes)
    losses = table.arrange(problem.losses)
    solver = Lagrangian()
    assert solver.solve_table(table, losses, problem.budget_bytes) == solver.solve(problem)


def test_optimal_where_the_budget_is_a_hull_point():
    problem = layered_problem(4, num_units=20, num_options=5, fraction=0.4)
    frontier = DynamicProgram().frontier(problem)
    middle = len(frontier.bytes) // 2
    solution = Lagrangian().solve(
        Problem(problem.bytes, problem.losses, int(frontier.bytes[middle]))
    )
    assert solution.status is Status.OPTIMAL
    assert solution.choice == frontier.choice(middle)

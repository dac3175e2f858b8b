from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import (
    layered_problem,
    magnitude,
    make_problem,
    near_linear_problem,
    problems,
    random_problem,
)

from allocator.problem import Status
from allocator.solvers import BruteForce, DynamicProgram, Lagrangian, MixedInteger, Oracle


@pytest.mark.parametrize("make", [layered_problem, random_problem])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_agrees_with_branch_and_bound_at_medium_size(make, fraction):
    problem = make(3, num_units=60, num_options=8, fraction=fraction)
    exact = DynamicProgram().solve(problem)
    branched = MixedInteger().solve(problem)
    assert exact.status is branched.status is Status.OPTIMAL
    assert exact.loss == pytest.approx(branched.loss, rel=1e-11)


def textbook_optimum(problem):
    """Least loss by the textbook recursion over every number of bytes."""
    room = problem.budget_bytes - problem.least_bytes
    least = np.zeros(room + 1)
    for cost, loss in zip(problem.bytes, problem.losses, strict=True):
        new = np.full(room + 1, np.inf)
        for extra, value in zip((cost - cost.min()).tolist(), loss.tolist(), strict=True):
            if extra <= room:
                new[extra:] = np.minimum(new[extra:], least[: room + 1 - extra] + value)
        least = new
    return least[room]


@pytest.mark.parametrize("losses", ["ties", "unrelated", "falling", "near linear"])
def test_agrees_with_the_textbook_on_many_medium_problems(losses):
    rng = np.random.default_rng(5)
    for _ in range(150):
        menus = []
        for unit in range(int(rng.integers(8, 40))):
            sizes = rng.integers(0, 9, rng.integers(1, 9)) * (3, 1, 8)[unit % 3]
            values = {
                "ties": rng.integers(0, 5, len(sizes)).astype(float),
                "unrelated": rng.normal(size=len(sizes)),
                "falling": rng.exponential() * np.exp(rng.normal(0, 0.1, len(sizes)) - sizes / 8),
                "near linear": rng.normal(0, 0.3, len(sizes)) - sizes,
            }[losses]
            menus.append(list(zip(sizes, values, strict=True)))
        problem = make_problem(menus, rng.random())
        solution = DynamicProgram().solve(problem)
        assert solution.status is Status.OPTIMAL
        rounding = 1e-13 * magnitude(problem)
        assert solution.loss == pytest.approx(textbook_optimum(problem), rel=0, abs=rounding)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(problem=problems(), fractions=st.lists(st.floats(-0.1, 1.2), max_size=6))
def test_many_budgets_equal_single_ones_and_loss_falls_with_budget(problem, fractions):
    room = problem.most_bytes - problem.least_bytes
    budgets = sorted(round(problem.least_bytes + fraction * room) for fraction in fractions)
    solutions = DynamicProgram().solve_many(problem, budgets)
    singly = [DynamicProgram().solve(replace(problem, budget_bytes=b)) for b in budgets]
    assert solutions == singly
    losses = [solution.loss for solution in solutions]
    rounding = 1e-13 * magnitude(problem)
    assert all(later <= earlier + rounding for earlier, later in pairwise(losses))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(problem=problems())
def test_frontier_points_are_exact_optima(problem):
    frontier = DynamicProgram().frontier(problem)
    assert (np.diff(frontier.bytes) > 0).all()
    assert frontier.bytes[0] == problem.least_bytes
    rounding = 1e-13 * magnitude(problem)
    best_of_all = sum(float(loss.min()) for loss in problem.losses)
    assert frontier.losses[-1] == pytest.approx(best_of_all, rel=0, abs=rounding)
    for point, (bytes_, loss) in enumerate(zip(frontier.bytes, frontier.losses, strict=True)):
        choice = frontier.choice(point)
        assert problem.total_bytes(choice) == bytes_
        assert problem.total_loss(choice) == pytest.approx(loss, rel=0, abs=rounding)
        best = BruteForce().solve(replace(problem, budget_bytes=int(bytes_)))
        assert best.loss == pytest.approx(loss, rel=0, abs=rounding)


def test_frontier_is_convex_and_below_the_exact_optima():
    problem = layered_problem(1, num_units=40, num_options=6, fraction=0.0)
    budgets = np.linspace(problem.least_bytes, problem.most_bytes, 9).astype(int).tolist()
    solutions, frontier = DynamicProgram().sweep(problem, budgets)
    slopes = np.diff(frontier.losses) / np.diff(frontier.bytes)
    assert (np.diff(slopes) >= -1e-12 * np.abs(slopes[1:])).all()
    for budget, solution in zip(budgets, solutions, strict=True):
        assert np.interp(budget, frontier.bytes, frontier.losses) <= solution.loss + 1e-12


def test_frontier_refuses_points_it_has_not():
    frontier = DynamicProgram().frontier(
        layered_problem(1, num_units=2, num_options=2, fraction=0.0)
    )
    for point in (-1, len(frontier.bytes)):
        with pytest.raises(ValueError, match=f"points, got index {point}"):
            frontier.choice(point)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(problem=problems(), data=st.data())
def test_oracle_equals_the_solver_for_every_loss_table(problem, data):
    oracle = Oracle(problem.bytes)
    for _ in range(2):
        losses = tuple(
            np.array(data.draw(st.lists(st.floats(-1, 1), min_size=len(b), max_size=len(b))))
            for b in problem.bytes
        )
        expected = DynamicProgram().solve(replace(problem, losses=losses))
        assert oracle.solve(losses, problem.budget_bytes) == expected


def test_oracle_takes_a_matrix_of_losses_and_refuses_others():
    problem = layered_problem(2, num_units=5, num_options=3, fraction=0.5)
    oracle = Oracle(problem.bytes)
    matrix = np.stack(problem.losses)
    expected = DynamicProgram().solve(problem)
    assert oracle.solve(matrix, problem.budget_bytes) == expected
    with pytest.raises(ValueError, match="expected 15 losses of 5 units, got 12 of 4"):
        oracle.solve(matrix[:4], problem.budget_bytes)
    matrix[1, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        oracle.solve(matrix, problem.budget_bytes)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(problem=problems(), most_states=st.integers(1, 4))
def test_too_few_states_never_claim_too_much(problem, most_states):
    best = BruteForce().solve(problem)
    capped = DynamicProgram(most_states=most_states).solve(problem)
    assert (capped.status is Status.INFEASIBLE) == (best.status is Status.INFEASIBLE)
    if best.status is Status.INFEASIBLE:
        return
    rounding = 1e-13 * magnitude(problem)
    assert capped.lower_bound <= best.loss + rounding
    assert best.loss <= capped.loss + rounding
    if capped.status is Status.OPTIMAL:
        assert capped.loss <= best.loss + rounding


def test_adversarial_problem_is_bounded_within_few_states():
    problem = near_linear_problem(0, num_units=30, num_options=6)
    capped = DynamicProgram(most_states=100).solve(problem)
    relaxed = Lagrangian().solve(problem)
    assert capped.status is Status.FEASIBLE
    assert problem.total_bytes(capped.choice) <= problem.budget_bytes
    assert relaxed.lower_bound <= capped.lower_bound < capped.loss <= relaxed.loss
    assert capped.gap < 1e-3 * abs(capped.loss)


def test_no_states_at_all_are_refused():
    with pytest.raises(ValueError, match="most_states: expected at least 1, got 0"):
        DynamicProgram(most_states=0)

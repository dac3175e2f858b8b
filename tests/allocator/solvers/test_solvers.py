"""What every solver must do; a new one joins by its line in the table."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from solver_problems import constrained_problems, layered_problem, magnitude, problems

from allocator.problem import LinearConstraint, Problem, Status
from allocator.solvers import SOLVERS, BruteForce, MixedInteger

every_solver = pytest.mark.parametrize("name", list(SOLVERS))


def check(problem, solution):
    """A solution is consistent with its problem, whatever its quality."""
    if solution.status is Status.INFEASIBLE:
        assert (solution.choice, solution.bytes) == ((), 0)
        assert solution.loss == solution.lower_bound == math.inf
        return
    assert solution.bytes == problem.total_bytes(solution.choice) <= problem.budget_bytes
    assert solution.loss == problem.total_loss(solution.choice)
    assert all(type(index) is int for index in solution.choice)
    assert solution.lower_bound <= solution.loss
    for constraint in problem.constraints:
        used = sum(float(c[i]) for c, i in zip(constraint.costs, solution.choice, strict=True))
        assert used <= constraint.limit
    for tie in problem.ties:
        assert len({solution.choice[unit] for unit in tie}) == 1


@every_solver
@settings(derandomize=True, deadline=None, max_examples=150)
@given(problem=problems())
def test_agrees_with_brute_force(name, problem):
    best = BruteForce().solve(problem)
    solution = SOLVERS[name]().solve(problem)
    check(problem, solution)
    assert (solution.status is Status.INFEASIBLE) == (best.status is Status.INFEASIBLE)
    if best.status is Status.INFEASIBLE:
        return
    rounding = (1e-10 if name == "milp" else 1e-13) * magnitude(problem)
    assert solution.lower_bound <= best.loss + rounding
    assert solution.loss >= best.loss - rounding
    if solution.status is Status.OPTIMAL:
        assert solution.loss <= best.loss + rounding
    else:
        assert name == "lagrangian"


@every_solver
def test_units_without_a_choice(name):
    problem = Problem((np.array([7]), np.array([5])), (np.array([1.0]), np.array([-3.0])), 12)
    solution = SOLVERS[name]().solve(problem)
    assert (solution.choice, solution.loss, solution.bytes) == ((0, 0), -2.0, 12)
    assert solution.status is Status.OPTIMAL
    assert solution.gap == 0.0


@every_solver
def test_budget_at_and_around_the_ends(name):
    problem = layered_problem(0, num_units=4, num_options=4, fraction=0.0)
    solver = SOLVERS[name]()
    least, most = problem.least_bytes, problem.most_bytes
    assert solver.solve(replace(problem, budget_bytes=least - 1)).status is Status.INFEASIBLE
    assert solver.solve(replace(problem, budget_bytes=-1)).status is Status.INFEASIBLE
    at_least = solver.solve(replace(problem, budget_bytes=least))
    assert (at_least.choice, at_least.bytes) == ((0, 0, 0, 0), least)
    for budget in (most, most + 1, 10**30):
        generous = solver.solve(replace(problem, budget_bytes=budget))
        assert generous.loss == sum(float(loss.min()) for loss in problem.losses)
        assert generous.status is Status.OPTIMAL


@every_solver
def test_of_equal_losses_the_answer_is_repeatable(name):
    problem = Problem((np.array([3, 1, 2]),) * 4, (np.zeros(3),) * 4, 9)
    first, second = (SOLVERS[name]().solve(problem) for _ in range(2))
    assert first == second
    assert (first.loss, first.status) == (0.0, Status.OPTIMAL)


@every_solver
def test_is_frozen_and_knows_its_name(name):
    solver = SOLVERS[name]()
    assert solver.name == name
    with pytest.raises(FrozenInstanceError):
        solver.anything = 1


@pytest.mark.parametrize("name", ["dynamic", "lagrangian"])
def test_one_budget_solvers_refuse_the_rest(name):
    plain = layered_problem(0, num_units=3, num_options=2, fraction=0.5)
    limit = LinearConstraint("latency_ms", tuple(np.ones(2) for _ in range(3)), 3.0)
    solver = SOLVERS[name]()
    with pytest.raises(ValueError, match=r"alone, got constraints; use 'milp'"):
        solver.solve(replace(plain, constraints=(limit,)))
    with pytest.raises(ValueError, match=r"alone, got constraints and ties; use 'milp'"):
        solver.solve(replace(plain, constraints=(limit,), ties=((0, 1),)))


@settings(derandomize=True, deadline=None, max_examples=120)
@given(problem=constrained_problems())
def test_constraints_and_ties_agree_with_brute_force(problem):
    best = BruteForce().solve(problem)
    solution = MixedInteger().solve(problem)
    check(problem, best)
    check(problem, solution)
    assert solution.status is best.status
    if best.status is Status.OPTIMAL:
        assert solution.loss == pytest.approx(best.loss, rel=0, abs=1e-10 * magnitude(problem))


@pytest.mark.parametrize("name", ["milp", "brute_force"])
def test_ill_formed_constraints_and_ties_are_refused(name):
    plain = layered_problem(0, num_units=2, num_options=2, fraction=0.5)
    solver = SOLVERS[name]()
    for costs, message in [
        ((np.ones(2),), "one cost per option"),
        ((np.ones(2), np.ones(3)), "one cost per option"),
        ((np.ones(2), np.array([1.0, np.nan])), "finite"),
    ]:
        limit = LinearConstraint("latency_ms", costs, 1.0)
        with pytest.raises(ValueError, match=f"constraint 'latency_ms': .*{message}"):
            solver.solve(replace(plain, constraints=(limit,)))
    for tie in [(), (0, 2), (-1, 0)]:
        with pytest.raises(ValueError, match="expected unit indices from 0 to 1"):
            solver.solve(replace(plain, ties=(tie,)))


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown solver 'dynamics' .*'dynamic'"):
        SOLVERS["dynamics"]

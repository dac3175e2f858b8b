from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from solver_problems import near_linear_problem, random_problem

from allocator.problem import LinearConstraint, Problem, Status
from allocator.solvers import BruteForce, MixedInteger


def test_stopping_at_a_gap_is_not_called_optimal():
    problem = near_linear_problem(1, num_units=12, num_options=4)
    solution = MixedInteger(relative_gap=0.5).solve(problem)
    assert solution.status is Status.FEASIBLE
    assert solution.lower_bound < solution.loss
    assert solution.gap > 0


def test_out_of_time_without_an_answer_says_so():
    problem = random_problem(0, num_units=40, num_options=8, fraction=0.3)
    with pytest.raises(ValueError, match=r"within time_limit_s=0.0; allow more time"):
        MixedInteger(time_limit_s=0.0).solve(problem)


def test_a_limit_broken_by_less_than_the_tolerance_is_still_broken():
    costs = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    limit = LinearConstraint("latency_ms", costs, 2.0 - 1e-9)
    problem = Problem((np.array([0, 1]),) * 2, (np.array([1.0, 0.0]),) * 2, 2, (limit,))
    solution = MixedInteger().solve(problem)
    assert solution.loss == BruteForce().solve(problem).loss == 1.0
    assert solution.statistics["num_cuts"] == 1


def test_ties_chain_and_reach_only_shared_options():
    sizes = (np.array([0, 1, 2]), np.array([0, 1]), np.array([0, 1, 2]))
    losses = (np.array([3.0, 2.0, 0.0]), np.array([1.0, 0.0]), np.array([3.0, 2.0, 0.0]))
    problem = Problem(sizes, losses, 9, ties=((0, 1), (1, 2)))
    assert MixedInteger().solve(problem).choice == (1, 1, 1)
    assert MixedInteger().solve(replace(problem, ties=((0, 2),))).choice == (2, 1, 2)
    assert BruteForce().solve(problem).choice == (1, 1, 1)


def test_brute_force_refuses_what_it_cannot_finish():
    problem = random_problem(0, num_units=8, num_options=6, fraction=0.5)
    with pytest.raises(ValueError, match="up to 1000000 assignments, got 1679616"):
        BruteForce().solve(problem)

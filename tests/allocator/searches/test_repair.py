from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.problem import Problem
from allocator.searches.repair import fill_budget, lower_to_fit

menus = st.lists(
    st.lists(st.integers(0, 30), min_size=1, max_size=5).map(sorted), min_size=1, max_size=7
)


def make_problem(menus, budget):
    costs = tuple(np.array(menu, np.int64) for menu in menus)
    return Problem(costs, tuple(np.zeros(len(cost)) for cost in costs), budget)


@settings(derandomize=True, deadline=None)
@given(menus=menus, budget=st.integers(0, 200), seed=st.integers(0, 99))
def test_lowering_fits_or_says_that_nothing_does(menus, budget, seed):
    problem = make_problem(menus, budget)
    top = tuple(len(menu) - 1 for menu in menus)
    fitted = lower_to_fit(problem, top, np.random.default_rng(seed))
    if problem.least_bytes > budget:
        assert fitted is None
    else:
        assert problem.total_bytes(fitted) <= budget
        if problem.total_bytes(top) <= budget:
            assert fitted == top


@settings(derandomize=True, deadline=None)
@given(menus=menus, extra=st.integers(0, 100), seed=st.integers(0, 99))
def test_filling_leaves_no_step_that_fits(menus, extra, seed):
    problem = make_problem(menus, sum(menu[0] for menu in menus) + extra)
    full = fill_budget(problem, (0,) * len(menus), np.random.default_rng(seed))
    slack = problem.budget_bytes - problem.total_bytes(full)
    assert slack >= 0
    for menu, level in zip(menus, full, strict=True):
        assert level + 1 == len(menu) or menu[level + 1] - menu[level] > slack

"""Ratios become assignments that keep the budget and their order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.problem import Problem
from allocator.ratio_plans import cut_assignment, nearest_assignment

SPARSITIES = np.array([0.9, 0.7, 0.5, 0.3, 0.0])
BYTES = np.array([100, 300, 500, 700, 1000])


def solve(ratios, budget):
    n = len(ratios)
    return nearest_assignment([BYTES] * n, [SPARSITIES] * n, ratios, budget)


def test_ratios_on_the_grid_are_taken_as_they_are():
    assert solve([0.9, 0.5, 0.3, 0.0], 100 + 500 + 700 + 1000) == (0, 2, 3, 4)


def test_shifts_all_ratios_alike_when_the_budget_asks_for_more_or_less():
    assert solve([0.5, 0.5, 0.5], 3 * 300) == (1, 1, 1)
    assert solve([0.5, 0.5, 0.5], 3 * 1000) == (4, 4, 4)


@given(
    st.lists(st.floats(-1, 2), min_size=1, max_size=8),
    st.floats(0.1, 1.2),
)
def test_never_exceeds_the_budget_and_keeps_the_order_of_equal_units(ratios, share):
    budget = int(share * 1000 * len(ratios))
    choice = solve(ratios, budget)
    assert sum(int(BYTES[i]) for i in choice) <= budget
    by_ratio = [choice[i] for i in np.argsort(ratios, kind="stable")]
    levels = sorted(choice, reverse=True)
    # Options are ordered by bytes: who removes more never keeps more, but for ties.
    assert all(abs(a - b) <= 1 for a, b in zip(by_ratio, levels, strict=True))


def test_wastes_less_than_one_step():
    choice = solve([0.61, 0.4, 0.77, 0.2], 2000)
    assert 2000 - sum(int(BYTES[i]) for i in choice) < 300


def test_what_cannot_be_met_says_so():
    with pytest.raises(ValueError, match="no assignment fits 150 bytes"):
        solve([0.5, 0.5], 150)
    with pytest.raises(ValueError, match="expected 2 finite ratios"):
        solve([0.5, float("nan")], 1500)


def test_a_cut_takes_the_smallest_option_under_it():
    sizes = (np.array([1, 2, 4]),) * 3
    losses = (np.array([9.0, 5.0, 0.0]), np.array([4.0, 2.0, 0.0]), np.array([30.0, 6.0, 0.0]))
    assert cut_assignment(Problem(sizes, losses, 12)) == (2, 2, 2)
    assert cut_assignment(Problem(sizes, losses, 9)) == (2, 0, 2)  # the cut is 4
    assert cut_assignment(Problem(sizes, losses, 7)) == (1, 0, 2)  # 5
    assert cut_assignment(Problem(sizes, losses, 5)) == (1, 0, 1)  # 6
    assert cut_assignment(Problem(sizes, losses, 3)) == (0, 0, 0)
    with pytest.raises(ValueError, match="no assignment fits 2 bytes"):
        cut_assignment(Problem(sizes, losses, 2))

"""Dominated options: which they are, and that a search without them looks the same from outside."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.problem import Problem
from allocator.searches import SEARCHES
from allocator.searches.base import SearchSetting
from allocator.searches.thinning import Thinned, thinned_setting, undominated
from allocator.solvers.brute_force import BruteForce
from objectives.evaluation import Evaluation
from objectives.sensitivity import LossTable


def problem_of(sizes, losses, budget):
    return Problem(
        tuple(np.array(s, np.int64) for s in sizes),
        tuple(np.array(x, float) for x in losses),
        budget,
    )


def table_of(name, losses):
    return LossTable(name, "nats", tuple(np.array(row, float) for row in losses))


def test_an_option_must_lose_by_every_table():
    sizes = [[1, 2, 2, 3]]
    first, second = [[4.0, 3.0, 3.5, 1.0]], [[4.0, 3.0, 2.5, 1.0]]
    problem = problem_of(sizes, first, 3)
    assert undominated(problem, [table_of("a", first)], []) == ((0, 1, 3),)
    both = [table_of("a", first), table_of("b", second)]
    assert undominated(problem, both, []) == ((0, 1, 2, 3),)
    assert undominated(problem, [table_of("a", first)], [(2,)]) == ((0, 1, 2, 3),)


def test_of_equal_options_the_first_stays():
    problem = problem_of([[5, 5, 5]], [[1.0, 1.0, 1.0]], 5)
    assert undominated(problem, [table_of("a", [[1.0, 1.0, 1.0]])], []) == ((0,),)


@given(st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_optimum_survives(data):
    rows = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)) for _ in range(rows)]
    losses = [[data.draw(st.integers(0, 9)) for _ in row] for row in sizes]
    budget = data.draw(st.integers(sum(map(min, sizes)), sum(map(max, sizes))))
    problem = problem_of(sizes, losses, budget)
    kept = undominated(problem, [table_of("a", losses)], [])
    setting = SearchSetting(problem, (), (0,) * rows, ("w",) * rows, 1, 1, 0)
    thin = thinned_setting(setting, kept).problem
    assert BruteForce().solve(thin).loss == BruteForce().solve(problem).loss


def test_whatever_is_told_of_options_is_of_those_that_are_left():
    problem = problem_of([[1, 2, 3]] * 2, [[3.0, 2.0, 1.0]] * 2, 4)
    names = (("a", "b", "c"), ("a", "c", "d"))
    other = (np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    setting = SearchSetting(
        problem, (), (0, 0), ("w", "w"), 1, 1, 0, labels=names, tables=(other,), removed=other
    )
    thin = thinned_setting(setting, ((0, 2), (1,)))
    assert thin.labels == (("a", "c"), ("c",))
    for rows in (*thin.tables, thin.removed):
        assert [list(row) for row in rows] == [[1.0, 3.0], [5.0]]
    bare = thinned_setting(replace(setting, labels=(), tables=(), removed=()), ((0, 2), (1,)))
    assert (bare.labels, bare.tables, bare.removed) == ((), (), ())


def test_a_search_over_what_is_left_speaks_in_full_options():
    rng = np.random.default_rng(0)
    sizes = [[1, 2, 3, 4, 5]] * 6
    losses = [sorted(rng.random(5), reverse=True) for _ in range(6)]
    for row in losses:
        row[2] = row[1] + 1.0  # option 2 is larger and worse than option 1
    problem = problem_of(sizes, losses, 18)
    kept = undominated(problem, [table_of("a", losses)], [])
    assert kept == ((0, 1, 3, 4),) * 6
    start = (0, 1, 3, 1, 0, 1)
    setting = SearchSetting(problem, (start,), (0,) * 6, ("w",) * 6, 1, 1, 0)
    search = Thinned(SEARCHES["random"](thinned_setting(setting, kept)), kept)
    seen = []
    for _ in range(40):
        for proposal in search.ask(1, []):
            assert problem.total_bytes(proposal.assignment) <= 18
            seen.append(proposal.assignment)
            loss = problem.total_loss(proposal.assignment)
            search.tell([Evaluation(proposal.assignment, proposal.fidelity, (loss,), (), 1)])
    assert start in seen
    assert all(2 not in assignment for assignment in seen)
    assert search.best == min(seen, key=problem.total_loss)

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import magnitude

from allocator.problem import Problem, Status
from allocator.row_problem import MOST_OPTIONS, RowProblem
from allocator.solvers import BruteForce, DynamicProgram, Lagrangian
from allocator.solvers.hull import MenuTable
from allocator.solvers.rows import solve_rows

_BYTES = st.one_of(
    st.integers(0, 6), st.integers(0, 6).map(lambda n: 512 * n), st.integers(0, 10**9)
)
_LOSSES = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-10, 10, width=32, allow_subnormal=False),
    st.floats(0, 2.0**-20, width=32, allow_subnormal=False),
)


def as_units(problem):
    """The same problem as one unit per row."""
    menus = [
        np.broadcast_to(cost, loss.shape)
        for cost, loss in zip(problem.bytes, problem.losses, strict=True)
    ]
    losses = [loss.astype(np.float64) for loss in problem.losses]
    return Problem(
        tuple(row for menu in menus for row in menu),
        tuple(row for loss in losses for row in loss),
        problem.budget_bytes,
    )


@st.composite
def row_problems(draw, *, most_rows=3, most_options=4):
    """One to three matrices, menus shared or not, unsorted, with ties; some infeasible."""
    bytes_, losses = [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.integers(1, most_rows)), draw(st.integers(1, most_options))
        priced = shape if draw(st.booleans()) else shape[1:]
        prices = draw(st.lists(_BYTES, min_size=math.prod(priced), max_size=math.prod(priced)))
        values = draw(st.lists(_LOSSES, min_size=math.prod(shape), max_size=math.prod(shape)))
        bytes_.append(np.array(prices, dtype=np.int64).reshape(priced))
        dtype = draw(st.sampled_from([np.float32, np.float64]))
        losses.append(np.array(values, dtype=dtype).reshape(shape))
    problem = RowProblem(tuple(bytes_), tuple(losses), 0)
    fraction = draw(st.floats(-0.1, 1.1))
    room = problem.most_bytes - problem.least_bytes
    return replace(problem, budget_bytes=round(problem.least_bytes + fraction * room))


def largest_upgrade(problem):
    return max(int(np.ptp(row)) for row in as_units(problem).bytes)


def falling(seed, shapes, *, num_options=8, own=False, dtype=np.float32, fraction=0.4):
    """Matrices of rows whose losses fall convexly or not, each row at its own scale."""
    rng = np.random.default_rng(seed)
    bytes_, losses = [], []
    for num_rows, columns in shapes:
        kept = (np.linspace(0.1, 0.8, num_options) * columns).astype(np.int64)
        cost = 2 * kept
        if own:
            cost = cost + rng.integers(0, 9, (num_rows, num_options))
        steps = rng.exponential(size=(num_rows, num_options)) * np.exp(
            rng.normal(0, 1, (num_rows, 1))
        )
        bytes_.append(cost)
        losses.append(np.ascontiguousarray(steps[:, ::-1].cumsum(1)[:, ::-1]).astype(dtype))
    problem = RowProblem(tuple(bytes_), tuple(losses), 0)
    room = problem.most_bytes - problem.least_bytes
    return replace(problem, budget_bytes=problem.least_bytes + int(fraction * room))


@settings(derandomize=True, deadline=None, max_examples=400)
@given(problem=row_problems())
def test_brackets_the_optimum_within_the_budget(problem):
    units = as_units(problem)
    best = (BruteForce() if len(units.bytes) < 6 else DynamicProgram()).solve(units)
    solution = solve_rows(problem)
    assert (solution.status is Status.INFEASIBLE) == (best.status is Status.INFEASIBLE)
    if best.status is Status.INFEASIBLE:
        assert (len(solution.choice), solution.bytes, solution.loss) == (0, 0, math.inf)
        return
    assert solution.choice.dtype == np.uint8
    choice = solution.choice.tolist()
    rounding = 1e-13 * magnitude(units)
    assert solution.bytes == units.total_bytes(choice) <= problem.budget_bytes
    assert solution.loss == pytest.approx(units.total_loss(choice), rel=0, abs=rounding)
    assert solution.lower_bound <= best.loss + rounding
    assert solution.loss >= best.loss - rounding
    if solution.status is Status.OPTIMAL:
        assert solution.loss <= best.loss + rounding
    # One step of one row at most, up to the slopes' precision.
    widest = max(float(np.ptp(loss)) for loss in units.losses)
    assert solution.gap <= widest + 1e-6 * magnitude(units)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_rows_are_within_one_upgrade_of_budget_and_bound(own, dtype):
    problem = falling(0, [(700, 64), (900, 576), (50, 1536)], own=own, dtype=dtype)
    exact = DynamicProgram().solve(as_units(problem))
    solution = solve_rows(problem)
    assert 0 <= problem.budget_bytes - solution.bytes < largest_upgrade(problem)
    rounding = 1e-13 * exact.loss
    assert solution.lower_bound <= exact.loss + rounding
    # The few rows that are solved exactly close nearly all of the gap that the multiplier leaves.
    assert exact.loss - rounding <= solution.loss <= exact.loss * (1 + 1e-6)


def test_as_good_as_the_solver_for_units():
    problem = falling(1, [(3000, 256)], dtype=np.float64)
    table = MenuTable.of(np.broadcast_to(problem.bytes[0], problem.losses[0].shape))
    relaxed = Lagrangian().solve_table(
        table, table.arrange(problem.losses[0]), problem.budget_bytes
    )
    solution = solve_rows(problem)
    assert solution.lower_bound == pytest.approx(relaxed.lower_bound, rel=1e-9)
    assert solution.lower_bound <= solution.loss <= relaxed.loss


def test_blocks_do_not_show(monkeypatch):
    problem = falling(2, [(300, 64), (41, 100)], own=True)
    whole = solve_rows(problem)
    monkeypatch.setattr("allocator.solvers.rows._BLOCK_ROWS", 7)
    pieces = solve_rows(problem)
    assert pieces.multiplier == whole.multiplier
    assert pieces.lower_bound == pytest.approx(whole.lower_bound, rel=1e-12)
    assert abs(pieces.bytes - whole.bytes) < largest_upgrade(problem)


def test_equal_problems_get_equal_answers_and_matrices_their_rows():
    problem = falling(3, [(20, 64), (1, 64), (30, 128)])
    first, second = solve_rows(problem), solve_rows(problem)
    assert np.array_equal(first.choice, second.choice)
    assert (first.loss, first.bytes, first.lower_bound) == (
        second.loss,
        second.bytes,
        second.lower_bound,
    )
    parts = problem.split(first.choice)
    assert [len(part) for part in parts] == [20, 1, 30]
    bytes_ = sum(int(cost[part].sum()) for cost, part in zip(problem.bytes, parts, strict=True))
    assert bytes_ == first.bytes


def test_of_equal_rows_the_first_are_upgraded():
    problem = RowProblem((np.array([0, 3]),), (np.tile(np.float32([1, 0]), (5, 1)),), 10)
    solution = solve_rows(problem)
    assert solution.choice.tolist() == [1, 1, 1, 0, 0]
    assert (solution.bytes, solution.loss, solution.status) == (9, 2.0, Status.OPTIMAL)


def test_many_equal_rows_share_the_budget():
    losses = np.tile(np.float32([4, 2, 1, 0.5]), (100_000, 1))
    problem = RowProblem((np.array([10, 20, 30, 40]),), (losses,), 2_500_000)
    solution = solve_rows(problem)
    assert solution.status is Status.OPTIMAL
    assert np.bincount(solution.choice).tolist() == [0, 50_000, 50_000]


def test_budget_at_and_around_the_ends():
    problem = falling(4, [(9, 64)])
    least, most = problem.least_bytes, problem.most_bytes
    assert solve_rows(replace(problem, budget_bytes=least - 1)).status is Status.INFEASIBLE
    at_least = solve_rows(replace(problem, budget_bytes=least))
    assert (at_least.bytes, at_least.choice.max(), at_least.status) == (least, 0, Status.OPTIMAL)
    for budget in (most, most + 1, 10**30):
        generous = solve_rows(replace(problem, budget_bytes=budget))
        assert (generous.bytes, generous.choice.min()) == (most, 7)
        assert (generous.status, generous.multiplier) == (Status.OPTIMAL, 0.0)


def test_an_upgrade_that_saves_nothing_is_not_bought():
    problem = RowProblem((np.array([0, 5, 9]),), (np.array([[1.0, 0.5, 0.5]]),), 100)
    assert solve_rows(problem).bytes == 5


@pytest.mark.parametrize("scale", [1e-30, 1e-44, 1e30])
def test_scale_of_float32_losses_does_not_matter(scale):
    # 1e-44 is a subnormal float32 of few bits, so compare with the same numbers in float64.
    problem = falling(5, [(200, 64)])
    small = (problem.losses[0].astype(np.float64) * scale).astype(np.float32)
    solution = solve_rows(replace(problem, losses=(small,)))
    wide = solve_rows(replace(problem, losses=(small.astype(np.float64),)))
    assert solution.loss == pytest.approx(wide.loss, rel=1e-4)
    assert solution.gap <= 1e-2 * solution.loss


@pytest.mark.parametrize(
    ("bytes_", "losses", "message"),
    [
        ([], [], "0 matrices priced, 0 with losses"),
        ([np.arange(2)], [], "1 matrices priced, 0 with losses"),
        ([np.arange(2)], [np.zeros(2)], r"losses must be \(rows, 1 to 256 options\), got \(2,\)"),
        ([np.arange(2)], [np.zeros((0, 2))], r"got \(0, 2\)"),
        ([np.arange(MOST_OPTIONS + 1)], [np.zeros((1, MOST_OPTIONS + 1))], "1 to 256 options"),
        ([np.arange(2)], [np.zeros((1, 2), np.float16)], "got int64 and float16"),
        ([np.arange(2.0)], [np.zeros((1, 2))], "got float64 and float64"),
        ([np.arange(3)], [np.zeros((4, 2))], r"matrix 0: \(3,\) bytes but \(4, 2\) losses"),
        ([np.array([-1, 2])], [np.zeros((4, 2))], "bytes must not be negative"),
        ([np.arange(2)], [np.array([[0.0, np.nan]])], "losses must be finite"),
        ([np.arange(2)], [np.array([[0.0, -np.inf]])], "losses must be finite"),
    ],
)
def test_ill_formed_problems_are_refused(bytes_, losses, message):
    with pytest.raises(ValueError, match=message):
        RowProblem(tuple(bytes_), tuple(losses), 10)

"""Problems for the solvers' tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from allocator.problem import LinearConstraint, Problem

_BYTES = st.one_of(
    st.integers(0, 12),  # ties and zeros
    st.integers(0, 6).map(lambda n: 4096 * n),  # whole quanta
    st.integers(0, 10**9),
)
_LOSSES = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.floats(-10, 10, allow_subnormal=False),
    st.floats(0, 1e-6, allow_subnormal=False),
)


@st.composite
def problems(draw, *, most_units=5, most_options=5):
    """Small ragged problems, dominated and single options included, some of them infeasible."""
    menus = draw(
        st.lists(
            st.lists(st.tuples(_BYTES, _LOSSES), min_size=1, max_size=most_options),
            min_size=1,
            max_size=most_units,
        )
    )
    return make_problem(menus, draw(st.floats(-0.1, 1.1)))


def make_problem(menus, fraction):
    """Menus of (bytes, loss) and a budget at a fraction of the way from least to most bytes."""
    bytes_ = tuple(np.array([b for b, _ in menu], dtype=np.int64) for menu in menus)
    losses = tuple(np.array([loss for _, loss in menu], dtype=np.float64) for menu in menus)
    least, most = (sum(int(f(b)) for b in bytes_) for f in (np.min, np.max))
    return Problem(bytes_, losses, round(least + fraction * (most - least)))


@st.composite
def constrained_problems(draw):
    """Small problems with a latency limit and tied units."""
    problem = draw(problems(most_units=4, most_options=4))
    costs = tuple(
        np.array(draw(st.lists(st.integers(0, 9), min_size=len(b), max_size=len(b))), dtype=float)
        for b in problem.bytes
    )
    limit = float(draw(st.integers(0, 9 * len(costs))))
    unit = st.integers(0, len(costs) - 1)
    ties = draw(st.lists(st.lists(unit, min_size=1, max_size=3).map(tuple), max_size=2))
    constraint = LinearConstraint("latency_ms", costs, limit)
    return Problem(problem.bytes, problem.losses, problem.budget_bytes, (constraint,), tuple(ties))


def layered_problem(seed, *, num_units, num_options, fraction):
    """Losses that fall steeply and noisily with bytes, few matrix shapes: what solvers see."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, num_options)
    menus = []
    for unit in range(num_units):
        num_weights = (576 * 576, 192 * 576, 1536 * 576)[unit % 3]
        sizes = (num_weights * bits).astype(np.int64) // 8 + num_weights // 16
        scale = np.exp(rng.normal(-4, 1.2))
        losses = scale * 4.0 ** (2 - bits) * np.exp(rng.normal(0, 0.2, num_options))
        menus.append(list(zip(sizes, losses, strict=True)))
    return make_problem(menus, fraction)


def random_problem(seed, *, num_units, num_options, fraction):
    """Bytes up to 1e9 and losses without any structure."""
    rng = np.random.default_rng(seed)
    shape = (num_units, num_options)
    rows = zip(rng.integers(0, 10**9, shape), rng.normal(size=shape), strict=True)
    return make_problem([list(zip(b, loss, strict=True)) for b, loss in rows], fraction)


def near_linear_problem(seed, *, num_units, num_options):
    """Losses all but linear in incommensurable bytes: the bound says almost nothing."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 10**9, (num_units, num_options))
    return make_problem([[(b, -float(b)) for b in row] for row in sizes], 0.5)


def magnitude(problem):
    """What rounding is relative to: the summed largest losses."""
    return sum(float(np.abs(loss).max()) for loss in problem.losses)

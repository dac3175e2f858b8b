from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.searches.pareto import hypervolume, nondominated

SIDE = 6  # points lie on a small grid, whose cells can be counted


@st.composite
def grids(draw):
    num_objectives = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, SIDE), min_size=num_objectives, max_size=num_objectives)
    return np.array(draw(st.lists(row, min_size=1, max_size=8)), float)


@given(grids())
def test_hypervolume_counts_the_dominated_cells(points):
    cells = product(range(SIDE), repeat=points.shape[1])
    num = sum(bool((points <= np.array(cell)).all(axis=1).any()) for cell in cells)
    assert hypervolume(points, np.full(points.shape[1], float(SIDE))) == num


@given(grids())
def test_front_is_what_no_other_point_beats(points):
    beaten = [
        any((other <= point).all() and (other < point).any() for other in points)
        for point in points
    ]
    expected = {tuple(p) for p, b in zip(points, beaten, strict=True) if not b}
    rows = nondominated(points)
    assert {tuple(points[row]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert [tuple(points[row]) for row in rows] == sorted(expected)


def test_a_point_outside_the_reference_adds_nothing():
    points = np.array([[1.0, 1.0], [0.0, 5.0]])
    assert hypervolume(points, np.array([3.0, 3.0])) == pytest.approx(4.0)

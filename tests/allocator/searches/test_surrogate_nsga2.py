"""AMQ's loop: its parts, both modes, and that the predictions are worth something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.problem import Problem
from allocator.searches.population import Population, crowding, fronts, selection_order
from allocator.searches.surrogate_nsga2 import SurrogateNSGA2, SurrogateNSGA2Options

from .zoo import drive, get_animal

WHOLE = SurrogateNSGA2Options(
    num_initial=70,
    num_candidates=10,
    population=60,
    mutation=0.1,
    mutated_units=None,
    whole_front=True,
)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
@settings(derandomize=True, deadline=None)
def test_fronts_peel_what_nothing_left_dominates(rows):
    points = np.array(rows, float)
    ranks = fronts(points)

    def beaten(i, by):
        return any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in by)

    for rank in range(ranks.max() + 1):
        inside = np.flatnonzero(ranks == rank)
        assert not any(beaten(i, np.flatnonzero(ranks >= rank)) for i in inside)
        if rank:
            assert all(beaten(i, np.flatnonzero(ranks == rank - 1)) for i in inside)
    assert sorted(ranks[selection_order(points)]) == ranks[selection_order(points)].tolist()


def test_crowding_is_the_cuboid_between_neighbours_and_infinite_at_the_ends():
    points = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 2.0], [4.0, 0.0]])
    found = crowding(points, fronts(points))
    assert np.isinf(found[[0, 3]]).all()
    assert found[1:3].tolist() == [3 / 4 + 2 / 4, 3 / 4 + 3 / 4]
    assert selection_order(points).tolist() == [0, 3, 2, 1]


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_moving_to_the_budget_fills_it_and_keeps_the_floors(data):
    units = data.draw(st.integers(1, 5))
    costs = [
        np.cumsum(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
        for _ in range(units)
    ]
    floors = np.array([data.draw(st.integers(0, len(cost) - 1)) for cost in costs])
    least = sum(int(cost[f]) for cost, f in zip(costs, floors, strict=True))
    budget = least + data.draw(st.integers(0, 20))
    problem = Problem(tuple(costs), tuple(np.zeros(len(c)) for c in costs), budget)
    population = Population(problem, floors)
    draws = [[data.draw(st.integers(f, t)) for f, t in zip(floors, population.tops, strict=True)]]
    moved = population.move_to_budget(np.array(draws * 3), np.random.default_rng(0))
    for row in moved.tolist():
        assert population.bytes(np.array([row]))[0] == problem.total_bytes(row) <= budget
        assert (np.array(row) >= floors).all()
        steps = [
            int(cost[level + 1] - cost[level])
            for cost, level in zip(costs, row, strict=True)
            if level + 1 < len(cost)
        ]
        assert all(problem.total_bytes(row) + step > budget for step in steps)


def test_default_concentrates_on_the_budget():
    animal = get_animal("plain")
    problem = animal.setting.problem
    history = drive(SurrogateNSGA2(animal.setting), animal.measure, 80, 4)
    sizes = [problem.total_bytes(e.assignment) for e in history[2:]]
    assert min(sizes) > 0.97 * problem.budget_bytes
    assert max(sizes) <= problem.budget_bytes


def test_whole_front_is_searched_and_best_is_within_the_budget():
    animal = get_animal("whole")
    problem = animal.setting.problem
    search = SurrogateNSGA2(animal.setting, WHOLE)
    history = drive(search, animal.measure, 200, 4)
    sizes = [problem.total_bytes(e.assignment) for e in history]
    assert min(sizes) < 0.8 * problem.budget_bytes
    assert max(sizes) > 1.3 * problem.budget_bytes
    assert problem.total_bytes(search.best) <= problem.budget_bytes
    front = search.front
    assert [p.bytes for p in front] == sorted(p.bytes for p in front)
    assert [p.loss_nats for p in front] == sorted((p.loss_nats for p in front), reverse=True)
    assert len(front) > 15
    measured = {e.assignment for e in history}
    assert all(p.assignment in measured for p in front)
    # Beyond the design the loop finds better points than the design held.
    design = drive(early := SurrogateNSGA2(animal.setting, WHOLE), animal.measure, 72, 4)
    assert len(design) == 72
    dominated = [
        any(q.bytes <= p.bytes and q.loss_nats < p.loss_nats for q in front) for p in early.front
    ]
    assert np.mean(dominated) > 0.5


def test_whole_front_fills_gaps():
    animal = get_animal("whole")
    search = SurrogateNSGA2(animal.setting, WHOLE)
    drive(search, animal.measure, 200, 4)
    sizes = np.array([p.bytes for p in search.front])
    assert np.diff(sizes).max() < 0.25 * (sizes[-1] - sizes[0])


def test_sensitive_units_are_pinned_to_their_largest_option():
    animal = get_animal("plain")
    problem = animal.setting.problem
    worst = np.array([losses[0] for losses in problem.losses])
    multiple = float(np.sort(worst)[-3] / np.median(worst))  # two are above
    pinned = np.flatnonzero(worst > multiple * np.median(worst))
    assert len(pinned) == 2
    options = SurrogateNSGA2Options(pin_multiple=multiple)
    history = drive(SurrogateNSGA2(animal.setting, options), animal.measure, 70, 4)
    others = [e.assignment for e in history if e.assignment not in animal.setting.starts]
    assert len(others) > 50
    for unit in pinned:
        assert {assignment[unit] for assignment in others} == {len(problem.bytes[unit]) - 1}
    tight = replace(problem, budget_bytes=problem.least_bytes)
    setting = replace(animal.setting, problem=tight, starts=((0,) * len(worst),))
    with pytest.raises(ValueError, match="raise pin_multiple"):
        SurrogateNSGA2(setting, options)


def test_published_loop_has_the_published_size():
    options = SurrogateNSGA2Options.published()
    assert options.num_initial + 200 * options.num_candidates == 10_250
    assert options.whole_front
    assert options.pin_multiple == 2.0


def test_one_search_equals_another_of_the_same_seed_with_pins_in_place():
    animal = get_animal("ragged")
    runs = [drive(SurrogateNSGA2(animal.seeded(1), WHOLE), animal.measure, 90, 4) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 0}, "at least one candidate"),
        ({"mutated_units": 0}, "at least one candidate"),
        ({"crossover": 1.5}, "chances"),
        ({"pin_multiple": 0.0}, "positive multiple"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SurrogateNSGA2Options(**changes)

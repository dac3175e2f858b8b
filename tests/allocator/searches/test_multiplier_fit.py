"""From an assignment back to a point of the reduced space, and what samplers make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocator.searches import SEARCHES
from allocator.searches.evolution import Evolution
from allocator.searches.nsga import FrontSpace, NSGAOptions
from allocator.searches.random_search import RandomSearch
from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.warm import WarmStarted

from .zoo import drive, get_animal

SAMPLERS = [*(pytest.param(name) for name in ("cma", "nsga2", "nsga3", "tpe"))]
SAMPLERS.append(pytest.param("gp", marks=pytest.mark.slow))


def moved_share(problem, one, other):
    """Share of the bytes that lie elsewhere."""
    pairs = zip(problem.bytes, one, other, strict=True)
    moved = sum(abs(int(cost[i]) - int(cost[j])) for cost, i, j in pairs) / 2
    return moved / problem.total_bytes(one)


@pytest.mark.parametrize("name", ["plain", "ragged"])
def test_what_was_decoded_is_encoded_to_the_same_assignment_or_nearly(name):
    animal = get_animal(name)
    problem = animal.setting.problem
    space = ReducedSpace.from_setting(animal.setting, ReducedOptions())
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        assignment = space.decode(rng.uniform(-1.5, 1.5, len(space.axes)))
        point = space.encode(assignment)
        assert point == space.encode(assignment)
        assert max(np.abs(point)) <= 1.5
        shares.append(moved_share(problem, assignment, space.decode(np.array(point))))
    assert np.median(shares) < 0.01


def test_what_no_multipliers_give_has_no_point():
    animal = get_animal("plain")
    space = ReducedSpace.from_setting(animal.setting, ReducedOptions())
    history = drive(RandomSearch(animal.seeded(1)), animal.measure, 20)
    drawn = [e.assignment for e in history if e.assignment not in animal.setting.starts]
    assert all(space.encode(assignment) is None for assignment in drawn)


def test_an_unused_budget_is_the_points_share_of_it():
    animal = get_animal("plain")
    problem = animal.setting.problem
    space = FrontSpace.from_setting(animal.setting, NSGAOptions())
    wanted = np.array([0.5, *[0.0] * (len(space.axes) - 2), -0.3])
    assignment = space.decode(wanted)
    point = space.encode(assignment)
    assert point[-1] == pytest.approx(-0.3, abs=0.02)
    assert moved_share(problem, assignment, space.decode(np.array(point))) < 0.02
    assert space.reduced.encode(assignment) is None
    dearest = tuple(len(cost) - 1 for cost in problem.bytes)
    assert space.encode(dearest) is None  # over the budget


def test_options_without_a_price_are_left_to_the_others():
    """A unit whose table says that smaller is better, and one that loses nothing."""
    animal = get_animal("plain")
    losses = list(animal.setting.problem.losses)
    losses[0] = losses[0][::-1].copy()
    losses[1] = np.zeros_like(losses[1])
    problem = replace(animal.setting.problem, losses=tuple(losses))
    space = ReducedSpace.from_setting(replace(animal.setting, problem=problem), ReducedOptions())
    point = np.zeros(len(space.axes))
    point[0] = 1.0
    found = space.encode(space.decode(point))
    assert found is not None
    assert np.isfinite(found).all()


def proposals_after(name, animal, known, count=20):
    """What a search proposes by itself, at nearly the whole budget."""
    search = WarmStarted(SEARCHES[name](animal.seeded(0)), animal.setting, known)
    history = drive(search, animal.measure, count, 4)
    strange = {e.assignment for e in known} | set(animal.setting.starts)
    problem = animal.setting.problem
    return [
        e.assignment
        for e in history
        if e.assignment not in strange
        and problem.total_bytes(e.assignment) > 0.97 * problem.budget_bytes
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_learn_from_what_others_measured(name):
    animal = get_animal("plain")
    known = drive(Evolution(animal.seeded(7)), animal.measure, 80, 4)
    cold, warm = (proposals_after(name, animal, told) for told in ([], known))
    assert set(warm) != set(cold)
    losses = [min(map(animal.true_loss, found)) for found in (cold, warm)]
    assert losses[1] < losses[0]
    assert np.median([animal.true_loss(a) for a in warm]) < np.median(
        [animal.true_loss(a) for a in cold]
    )
    assert proposals_after(name, animal, known) == warm


@pytest.mark.parametrize("name", ["cma", "nsga2", "tpe"])
def test_samplers_learn_in_the_middle_of_a_run_too(name):
    animal = get_animal("plain")
    known = drive(Evolution(animal.seeded(7)), animal.measure, 80, 4)
    search, alone = (SEARCHES[name](animal.seeded(0)) for _ in range(2))
    assert drive(search, animal.measure, 14) == drive(alone, animal.measure, 14)
    search.tell(known)
    later, without = (drive(s, animal.measure, 40) for s in (search, alone))
    assert later != without
    best = [min(animal.true_loss(e.assignment) for e in found) for found in (later, without)]
    assert best[0] <= best[1]

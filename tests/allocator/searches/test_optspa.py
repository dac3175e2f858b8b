from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from allocator.problem import Problem
from allocator.ratio_plans import nearest_assignment
from allocator.searches.base import SearchSetting
from allocator.searches.optspa import GroupSpace, Optspa, OptspaOptions

from .zoo import drive, get_animal

LEVELS = np.linspace(0.75, 0, 31)  # steps of the space's own size


def make_setting(num_layers, share, *, num_groups_of_caches=0, seed=0):
    """Two matrices in each layer, one twice the other; caches in the first layers."""
    sizes = np.tile([1_000, 2_000], num_layers)
    costs = [np.rint(size * (1 - LEVELS)).astype(np.int64) for size in sizes]
    depths = np.repeat(np.arange(num_layers), 2).tolist()
    kinds = ["attention", "mlp"] * num_layers
    for layer in range(num_groups_of_caches):
        costs.append(np.array([60, 120, 240], np.int64))
        depths.append(layer)
        kinds.append("cache")
    most = sum(int(cost[-1]) for cost in costs)
    losses = tuple(np.linspace(1, 0, len(cost)) for cost in costs)
    problem = Problem(tuple(costs), losses, int(most * share))
    start = (0,) * len(costs)
    return SearchSetting(problem, (start,), tuple(depths), tuple(kinds), 8, 8, seed)


def test_groups_are_contiguous_and_leftovers_go_to_the_first():
    space = GroupSpace.from_setting(make_setting(19, 0.5), OptspaOptions())
    assert [len(units) // 2 for units in space.members] == [3, 3, 3, 2, 2, 2, 2, 2]
    assert [unit for units in space.members for unit in units] == list(range(38))
    assert {(axis.low, axis.high, axis.step) for axis in space.axes} == {(-0.05, 0.05, 0.025)}


def test_fine_mode_has_one_ratio_per_group_and_projection():
    setting = get_animal("ragged").setting
    space = GroupSpace.from_setting(setting, OptspaOptions(num_groups=3, fine=True))
    assert len(space.axes) == 3 * 5
    pinned = next(u for u, cost in enumerate(setting.problem.bytes) if len(cost) == 1)
    steered = {unit for units in space.members for unit in units}
    embedding = setting.depths.index(-1)
    assert steered == set(range(len(setting.kinds))) - {pinned, embedding}


def test_a_point_is_its_ratios_moved_onto_the_budget():
    setting = make_setting(16, 0.5)
    space = GroupSpace.from_setting(setting, OptspaOptions())
    point = np.array([0.05, 0.05, 0.025, 0.0, 0.0, -0.025, -0.05, -0.05])
    found = space.decode(point)
    problem = setting.problem
    expected = nearest_assignment(
        problem.bytes, [LEVELS] * 32, np.repeat(point, 4), problem.budget_bytes
    )
    assert found == expected
    spent = problem.total_bytes(found)
    assert problem.budget_bytes - 50 < spent <= problem.budget_bytes
    removed = [float(LEVELS[[found[u] for u in units]].mean()) for units in space.members]
    assert removed[0] > removed[-1]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(removed))


def test_given_ratios_replace_shares_of_bytes():
    setting = make_setting(8, 0.5)
    space = GroupSpace.from_setting(setting, OptspaOptions())
    backwards = replace(setting, removed=(LEVELS[::-1].copy(),) * 16)
    other = GroupSpace.from_setting(backwards, OptspaOptions())
    point = np.linspace(-0.05, 0.05, 8)
    assert space.decode(point) != other.decode(point)


def test_caches_have_a_level_per_group_and_weights_take_the_rest():
    setting = make_setting(8, 0.5, num_groups_of_caches=8)
    problem = setting.problem
    space = GroupSpace.from_setting(setting, OptspaOptions(num_groups=4))
    cache_axes = [axis for axis in space.axes if "cache" in axis.name]
    assert [(axis.low, axis.high, axis.step) for axis in cache_axes] == [(0.0, 2.0, 1.0)] * 4
    point = np.array([0.0, 0.0] * 4)
    levels = dict(zip(cache_axes, (0.0, 1.0, 2.0, 1.0), strict=True))
    point = np.array([levels.get(axis, 0.0) for axis in space.axes])
    found = space.decode(point)
    assert found[16:] == (0, 0, 1, 1, 2, 2, 1, 1)
    assert problem.budget_bytes - 50 < problem.total_bytes(found) <= problem.budget_bytes


def test_caches_are_lowered_where_weights_would_not_fit():
    setting = make_setting(8, 0.27, num_groups_of_caches=8)
    problem = setting.problem
    space = GroupSpace.from_setting(setting, OptspaOptions(num_groups=4))
    found = space.decode(np.array([axis.high for axis in space.axes]))
    assert problem.total_bytes(found) <= problem.budget_bytes
    assert 0 < sum(found[16:]) < 16


def test_caches_alone_can_be_searched():
    setting = make_setting(8, 0.5, num_groups_of_caches=8)
    problem = Problem(setting.problem.bytes[16:], setting.problem.losses[16:], 1_000)
    setting = replace(
        setting,
        problem=problem,
        starts=((0,) * 8,),
        depths=setting.depths[16:],
        kinds=setting.kinds[16:],
    )
    space = GroupSpace.from_setting(setting, OptspaOptions())
    for point in np.random.default_rng(0).integers(0, 3, (20, 8)):
        assert problem.total_bytes(space.decode(point.astype(float))) <= 1_000


def test_no_trial_is_wasted():
    animal = get_animal("plain")
    problem = animal.setting.problem
    history = drive(Optspa(animal.setting, OptspaOptions(remeasure_every=0)), animal.measure, 30)
    steps = [int(np.diff(cost).max()) for cost in problem.bytes]
    for evaluation in history[2:]:
        spent = problem.total_bytes(evaluation.assignment)
        assert problem.budget_bytes - max(steps) < spent <= problem.budget_bytes
    assert len({e.assignment for e in history}) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 0}, "at least one group"),
        ({"step": 0.0}, "positive step"),
        ({"radius": 0.01}, "positive step"),
        ({"remeasure_every": -1}, "must not be negative"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptspaOptions(**changes)

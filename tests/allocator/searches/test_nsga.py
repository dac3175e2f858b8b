from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocator.searches.nsga import NSGA2, NSGA3, FrontSpace, NSGAOptions, ScaledLedger
from allocator.searches.pareto import nondominated
from allocator.solvers.dynamic import DynamicProgram

from .zoo import drive, get_animal

SEARCHES = pytest.mark.parametrize("make", [NSGA2, NSGA3])


@SEARCHES
def test_dp_plans_at_several_budgets_come_first(make):
    animal = get_animal("plain")
    problem = animal.setting.problem
    history = drive(make(animal.setting, NSGAOptions(num_seeds=5)), animal.measure, 12)
    budgets = np.geomspace(problem.budget_bytes, problem.least_bytes, 5).round().astype(int)
    plans = {s.choice for s in DynamicProgram().solve_many(problem, budgets.tolist())}
    assert len(plans) == 5
    assert plans <= {evaluation.assignment for evaluation in history}


@SEARCHES
def test_front_is_nondominated_measured_and_better_than_the_dp_plans(make):
    animal = get_animal("ragged")
    problem = animal.setting.problem
    search = make(animal.setting)
    assert search.front == []
    assert search.notes() == {"num_front": 0.0, "hypervolume_nats": 0.0}
    history = drive(search, animal.measure, 250, 4)
    front = search.front
    sizes = [point.bytes for point in front]
    losses = [point.loss_nats for point in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert {point.assignment for point in front} <= {e.assignment for e in history}
    assert all(problem.total_bytes(point.assignment) == point.bytes for point in front)
    upper = [p for p in front if 0.5 < p.bytes / problem.budget_bytes < 0.95]
    plans = DynamicProgram().solve_many(problem, [point.bytes for point in upper])
    gains = [
        animal.true_loss(plan.choice) / animal.true_loss(point.assignment)
        for plan, point in zip(plans, upper, strict=True)
    ]
    assert len(upper) >= 5
    assert np.mean(gains) > 1.02


def test_hypervolume_grows_and_is_the_area_above_the_front():
    animal = get_animal("plain")
    problem = animal.setting.problem
    search = NSGA2(animal.setting)
    drive(search, animal.measure, 20)
    early = search.notes()["hypervolume_nats"]
    drive(search, animal.measure, 120)
    notes, front = search.notes(), search.front
    assert notes["num_front"] == len(front)
    assert notes["hypervolume_nats"] > early > 0
    span = problem.budget_bytes - problem.least_bytes
    ends = [point.bytes for point in front[1:]] + [problem.budget_bytes + 0.1 * span]
    area = sum(
        (front[0].loss_nats - point.loss_nats) * (end - point.bytes) / span
        for point, end in zip(front, ends, strict=True)
    )
    assert notes["hypervolume_nats"] == pytest.approx(area)


def test_the_hypervolumes_reference_stays_as_the_front_grows():
    """Nothing that is added makes it smaller, and better points make it greater."""
    animal = replace(get_animal("plain"), noise=0.0, effects=np.zeros(32))
    problem = animal.setting.problem
    cheapest = DynamicProgram().solve(replace(problem, budget_bytes=problem.least_bytes)).choice
    text = animal.setting.fidelity(0)
    ladder = DynamicProgram().solve_many(
        problem, np.linspace(problem.least_bytes, problem.budget_bytes, 6).astype(int).tolist()[1:]
    )
    worse = [plan.choice for plan in ladder]
    true = replace(problem, losses=animal.truth)
    better = [
        DynamicProgram().solve(replace(true, budget_bytes=problem.total_bytes(plan))).choice
        for plan in worse
    ]
    search, other = NSGA2(animal.setting), NSGA2(animal.setting)
    volumes = []
    for assignment in (cheapest, *worse, *better):
        search.tell([animal.measure(assignment, text)])
        volumes.append(search.notes()["hypervolume_nats"])
    assert volumes[0] == 0
    assert (np.diff(volumes) > -1e-3 * volumes[-1]).all()
    assert volumes[-1] > volumes[len(worse)] > 0
    other.tell([animal.measure(assignment, text) for assignment in (cheapest, *better)])
    # another way to the same front; dear points that came first took nothing from it
    assert other.notes()["hypervolume_nats"] == pytest.approx(volumes[-1], rel=0.01)


def test_before_the_cheapest_was_measured_a_start_is_the_reference():
    animal = get_animal("plain")
    search = NSGA2(animal.setting)
    plan, uniform = animal.setting.starts
    search.tell([animal.measure(uniform, animal.setting.fidelity(0))])
    assert search.notes() == {"num_front": 1.0, "hypervolume_nats": 0.0}
    search.tell([animal.measure(plan, animal.setting.fidelity(0))])
    assert search.notes()["hypervolume_nats"] >= 0


@SEARCHES
def test_what_is_tried_at_the_whole_budget_is_bred_from_and_the_dp_plans_are_not(make):
    """Optuna counts an enqueued trial to a generation only where it was asked to draw."""
    animal = get_animal("plain")
    search = make(animal.setting, NSGAOptions(num_seeds=5))
    drive(search, animal.measure, 30)
    key = f"{type(search._study.sampler).__name__}:generation"
    generations = [trial.system_attrs.get(key) for trial in search._study.trials]
    enqueued = ["fixed_params" in trial.system_attrs for trial in search._study.trials]
    assert generations[:5] == [None] * 5
    assert None not in generations[5:]
    assert any(enqueued[5:])


def test_latency_is_a_third_objective():
    animal = get_animal("plain")
    problem = animal.setting.problem
    # the largest option is the fastest, so that latency pulls another way than bytes
    latency = tuple(1.0 / cost for cost in problem.bytes)
    search = NSGA3(replace(animal.setting, latency=latency))
    drive(search, animal.measure, 80, 4)
    spent = [
        sum(float(row[i]) for row, i in zip(latency, p.assignment, strict=True))
        for p in search.front
    ]
    points = np.array([[p.loss_nats, p.bytes, t] for p, t in zip(search.front, spent, strict=True)])
    assert len(nondominated(points)) == len(points)
    assert len(nondominated(points[:, :2])) < len(points)
    assert search.notes()["hypervolume_nats"] > 0
    with pytest.raises(ValueError, match="latency per option"):
        NSGA2(replace(animal.setting, latency=latency[1:]))


def test_a_budget_of_the_cheapest_assignment_has_no_share():
    animal = get_animal("plain")
    problem = replace(animal.setting.problem, budget_bytes=animal.setting.problem.least_bytes)
    setting = replace(animal.setting, problem=problem, starts=((0,) * len(problem.bytes),))
    space = FrontSpace.from_setting(setting, NSGAOptions())
    assert "log budget share" not in [axis.name for axis in space.axes]
    assert space.decode(np.zeros(len(space.axes))) == setting.starts[0]


def test_share_of_the_budget_is_kept_and_one_is_the_whole():
    animal = get_animal("ragged")
    problem = animal.setting.problem
    space = FrontSpace.from_setting(animal.setting, NSGAOptions())
    point = np.zeros(len(space.axes))
    assert space.decode(point) == animal.dp
    for point[-1] in np.linspace(space.lowest, 0, 7):
        spent = problem.total_bytes(space.decode(point))
        assert spent <= max(problem.budget_bytes * np.exp(point[-1]) + 1, problem.least_bytes)
    point[-1] = space.lowest
    assert problem.total_bytes(space.decode(point)) == problem.least_bytes


def test_noise_of_cheap_assignments_does_not_decide_among_dear_ones():
    """Cheap ones lose a hundred times more, and so vary more from sequence to sequence."""
    animal = get_animal("plain")
    setting = animal.setting
    ledger = ScaledLedger(setting)
    rng = np.random.default_rng(0)
    cheap = (0,) * len(setting.depths)
    uniform = setting.starts[1]
    for assignment, mean in ((cheap, 30.0), (uniform, 1.1), (animal.dp, 1.0)):
        for window in range(4 if assignment != animal.dp else 1):
            fidelity = setting.fidelity(window)
            told = animal.measure(assignment, fidelity)
            values = mean * (1 + 0.02 * rng.normal(size=len(told.sequence_nats)))
            ledger.add(replace(told, sequence_nats=tuple(values.tolist())))
    assert ledger.best() == animal.dp
    assert ledger.adjusted(animal.dp)[0] == pytest.approx(1.0, rel=0.05)
    assert ledger.adjusted(cheap)[0] == pytest.approx(30.0, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 1}, "population and seeds"),
        ({"num_seeds": 1}, "population and seeds"),
        ({"transfer_every": -1}, "must not be negative"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NSGAOptions(**changes)

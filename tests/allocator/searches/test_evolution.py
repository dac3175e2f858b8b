from __future__ import annotations

from dataclasses import replace

import pytest

from allocator.searches.evolution import Evolution, EvolutionOptions
from objectives.evaluation import Evaluation, Fidelity

from .zoo import drive, get_animal


def split_into_stages(history):
    """Runs of equal fidelity."""
    stages: list[list[Evaluation]] = []
    for evaluation in history:
        if not stages or stages[-1][0].fidelity != evaluation.fidelity:
            stages.append([])
        stages[-1].append(evaluation)
    return stages


def test_generation_follows_the_published_stages():
    animal = get_animal("plain")
    options = EvolutionOptions(num_offspring=6, survivors=(2, 1), batches=(1, 2))
    history = drive(Evolution(animal.setting, options), animal.measure, 2 + 2 * (6 + 3))
    starts, offspring, finals, second, _ = split_into_stages(history)
    parent = min(starts, key=lambda e: e.loss_nats).assignment
    assert [len(stage) for stage in (starts, offspring, finals, second)] == [2, 6, 3, 6]
    assert len({e.assignment for e in offspring} | {parent}) == 7
    # Minibatches follow each other in the split: fresh for every stage, the same within one.
    assert [stage[0].fidelity for stage in (starts, offspring, finals, second)] == [
        Fidelity("search", 0, 16),
        Fidelity("search", 16, 8),
        Fidelity("search", 24, 16),
        Fidelity("search", 8, 8),
    ]
    best_two = sorted(offspring, key=lambda e: e.loss_nats)[:2]
    assert [e.assignment for e in finals] == [parent, *(e.assignment for e in best_two)]


def test_history_is_the_same_for_any_window():
    animal = get_animal("plain")
    histories = [drive(Evolution(animal.setting), animal.measure, 60, w) for w in (1, 5, 64)]
    assert histories[0] == histories[1] == histories[2]


def test_ask_waits_for_the_stage_and_opens_the_next():
    animal = get_animal("plain")
    search = Evolution(animal.setting)
    starts = search.ask(100, [])
    assert len(starts) == 2
    assert search.ask(100, [p.assignment for p in starts]) == []
    evaluations = [animal.measure(p.assignment, p.fidelity) for p in starts]
    search.tell(evaluations[:1])
    assert search.ask(1, [starts[1].assignment]) == []
    search.tell(evaluations[1:])
    assert len(search.ask(100, [])) == EvolutionOptions().num_offspring


def test_parent_stays_where_no_offspring_is_better():
    animal = get_animal("whole")
    dp = animal.dp

    def only_parent_is_good(assignment, fidelity):
        value = 1.0 if assignment == dp else 2.0
        return Evaluation(assignment, fidelity, (value,) * fidelity.count)

    search = Evolution(animal.setting)
    drive(search, only_parent_is_good, 100)
    assert search.best == dp


def test_failed_parent_is_replaced():
    animal = get_animal("plain")

    def starts_fail(assignment, fidelity):
        if assignment in animal.setting.starts:
            return Evaluation(assignment, fidelity, error="nan")
        return animal.measure(assignment, fidelity)

    search = Evolution(animal.setting)
    drive(search, starts_fail, 60)
    assert search.best is not None
    assert search.best not in animal.setting.starts


def test_whole_split_measures_nothing_twice():
    animal = get_animal("whole")
    history = drive(Evolution(animal.setting), animal.measure, 100)
    assert len({evaluation.key for evaluation in history}) == len(history) == 100


def test_same_size_only_moves_levels_inside_size_groups():
    animal = get_animal("plain")
    problem = animal.setting.problem
    search = Evolution(animal.setting, EvolutionOptions(same_size_only=True))
    history = drive(search, animal.measure, 80)
    groups: dict[tuple[int, ...], list[int]] = {}
    for unit, cost in enumerate(problem.bytes):
        groups.setdefault(tuple(cost), []).append(unit)
    allowed = {
        tuple(sum(start[u] for u in units) for units in groups.values())
        for start in animal.setting.starts
    }
    sums = {
        tuple(sum(e.assignment[u] for u in units) for units in groups.values()) for e in history
    }
    assert len({e.assignment for e in history}) > 40
    assert sums <= allowed


def test_size_free_moves_bytes_between_size_groups():
    animal = get_animal("plain")
    history = drive(Evolution(animal.setting), animal.measure, 80)
    sizes = [cost[0] for cost in animal.setting.problem.bytes]
    small = [u for u, size in enumerate(sizes) if size == min(sizes)]
    assert len({sum(e.assignment[u] for u in small) for e in history}) > 2


def test_small_space_is_exhausted():
    animal = get_animal("whole")
    problem = animal.setting.problem
    small = replace(
        problem,
        bytes=tuple(c[: 2 if u < 3 else 1] for u, c in enumerate(problem.bytes)),
        losses=tuple(t[: 2 if u < 3 else 1] for u, t in enumerate(problem.losses)),
    )
    setting = replace(animal.setting, problem=small, starts=((0,) * len(small.bytes),))
    history = drive(Evolution(setting), animal.measure, 1000)
    assert 4 <= len(history) <= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_offspring": 0}, "at least one offspring"),
        ({"survivors": (4, 2)}, "ending in 1"),
        ({"survivors": (1,)}, "for each stage"),
        ({"batches": (0, 1)}, "positive"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvolutionOptions(**changes)

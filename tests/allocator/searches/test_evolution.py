from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocator.problem import Problem
from allocator.searches.evolution import Evolution, EvolutionOptions
from allocator.solvers.dynamic import DynamicProgram
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
        ({"rounds": 0}, "one round"),
        ({"num_generations": 0}, "one round and generation"),
        ({"num_initial": -1}, "0 or more"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvolutionOptions(**changes)


@pytest.mark.parametrize(
    ("kind", "num_tokens", "num_evaluations"),
    [("bits", 176_947_200, 22_350), ("sparsity", 183_500_800, 30_000), ("drop", 26_345_472, 5664)],
)
def test_published_schedules_cost_what_they_are_known_to_cost(kind, num_tokens, num_evaluations):
    options = EvolutionOptions.published(kind)
    assert options.same_size_only
    batches = options.num_generations * options.generation_batches
    batches += options.num_initial * options.initial_batches
    assert batches * 2048 == num_tokens
    entering = (options.num_offspring, *options.survivors[:-1])
    evaluations = options.num_generations * (sum(entering) + 1) + options.num_initial
    assert evaluations == num_evaluations


def test_published_schedule_in_longer_batches_keeps_its_tokens():
    options = EvolutionOptions.published("bits", tokens_per_batch=4096)
    assert options.batches == (1, 4, 32)


@pytest.mark.parametrize("share", [2, 4, 8, 16, 100])
@pytest.mark.parametrize("kind", ["bits", "sparsity", "drop"])
def test_rescaled_schedule_fits_and_shrinks_everything(kind, share):
    options = EvolutionOptions.published(kind)
    whole = options.num_generations * options.generation_batches
    whole += options.num_initial * options.initial_batches
    small = options.rescaled(whole // share)
    spent = small.num_generations * small.generation_batches
    spent += small.num_initial * small.initial_batches
    assert 0.8 * (whole // share) <= spent <= whole // share
    assert small.num_offspring < options.num_offspring
    assert small.num_generations < options.num_generations
    assert len(small.survivors) == len(options.survivors)
    assert options.rescaled(whole) == options


def test_rescaling_needs_an_end_and_a_generation():
    with pytest.raises(ValueError, match="so many generations"):
        EvolutionOptions().rescaled(100)
    with pytest.raises(ValueError, match="do not hold one generation"):
        EvolutionOptions.published("bits").rescaled(3)


def test_search_ends_after_its_generations():
    animal = get_animal("plain")
    options = EvolutionOptions(num_offspring=6, num_generations=3)
    search = Evolution(animal.setting, options)
    history = drive(search, animal.measure, 1000)
    assert len(history) == 2 + 3 * (6 + 3)
    assert search.ask(5, []) == []
    assert search.best is not None


def test_random_first_parents_fill_the_budget_and_share_their_text():
    animal = get_animal("plain")
    problem = animal.setting.problem
    options = EvolutionOptions(num_initial=10, initial_batches=1)
    history = drive(Evolution(animal.setting, options), animal.measure, 12)
    assert tuple(e.assignment for e in history[:2]) == animal.setting.starts
    assert {e.fidelity for e in history} == {Fidelity("search", 0, 8)}
    drawn = {e.assignment for e in history[2:]}
    assert len(drawn) == 10
    for assignment in drawn:
        assert problem.budget_bytes * 0.95 < problem.total_bytes(assignment) <= problem.budget_bytes
        assert max(assignment) - min(assignment) >= 1


def test_rounds_step_coarsely_first_and_finer_later():
    animal = get_animal("whole")
    options = EvolutionOptions(
        num_offspring=4, survivors=(1,), batches=(1,), rounds=2, round_generations=4
    )
    search = Evolution(animal.setting, options)
    drive(search, animal.measure, 2)
    strides = []
    for _ in range(16):
        parent = search.best
        children = [p.assignment for p in search.ask(100, [])]
        steps = {abs(a - b) for c in children for a, b in zip(c, parent, strict=True)} - {0}
        strides.append(steps)
        search.tell([animal.measure(child, animal.setting.fidelity(0)) for child in children])
    assert set().union(*strides[:4]) in ({2}, {2, 4})
    assert 1 in set().union(*strides[4:])
    drive(search, animal.measure, 200)
    assert animal.true_loss(search.best) < 1


def dropping(num_blocks, num_dropped):
    """Blocks whose attention and feed-forward halves are there or not, all of one price each."""
    animal = get_animal("plain")
    units = [kind for _ in range(num_blocks) for kind in ("attention", "mlp")]
    sizes = {"attention": 300, "mlp": 700}
    truth = np.random.default_rng(0).lognormal(size=len(units))
    problem = Problem(
        tuple(np.array([8, sizes[kind]]) for kind in units),
        tuple(np.array([1.0, 0.0]) for _ in units),
        num_blocks * 1000 - num_dropped * (1000 - 16),
    )
    start = tuple(int(i >= 2 * num_dropped) for i in range(len(units)))
    depths = tuple(i // 2 for i in range(len(units)))
    setting = replace(
        animal.setting,
        problem=problem,
        starts=(start,),
        depths=depths,
        kinds=tuple(units),
        importances=(),
        removed=(),
    )

    def measure(assignment, fidelity):
        loss = float(sum(t for t, kept in zip(truth, assignment, strict=True) if not kept))
        return Evaluation(assignment, fidelity, (loss,) * fidelity.count)

    return setting, truth, measure


def test_dropping_layers_swaps_what_is_dropped_and_finds_the_least_needed():
    setting, truth, measure = dropping(12, 4)
    options = replace(
        EvolutionOptions.published("drop"), num_initial=0, num_offspring=8, num_generations=150
    )
    search = Evolution(setting, options)
    history = drive(search, measure, 5000)
    for evaluation in history:  # as published: so many of each half
        assert sum(evaluation.assignment[::2]) == sum(evaluation.assignment[1::2]) == 8
    for half in (0, 1):
        dropped = {i for i, kept in enumerate(search.best[half::2]) if not kept}
        assert dropped == set(np.argsort(truth[half::2])[:4].tolist())


def test_what_others_measured_can_become_the_parent():
    animal = get_animal("whole")
    ideal = replace(animal.setting.problem, losses=animal.truth)
    good = DynamicProgram().solve(ideal).choice
    search = Evolution(animal.setting)
    drive(search, animal.measure, 10)
    search.tell([animal.measure(good, Fidelity("search", 0, 8))])
    history = drive(search, animal.measure, 20)
    assert good not in {e.assignment for e in history}  # known on all text: not measured again
    assert animal.true_loss(search.best) <= animal.true_loss(good)

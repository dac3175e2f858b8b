"""What every search promises, checked on every search and every animal of the zoo.

A new search joins by its line in ``SEARCHES``.
"""

from __future__ import annotations

import random
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest

from allocator.searches import SEARCHES
from objectives.evaluation import Evaluation

from .zoo import ZOO, drive, get_animal

NUM_EVALUATIONS = 150
WINDOWS = (1, 16)


SLOW = {"gp"}  # its proposals take a third of a second; test_sampled.py has it in small
BASELINES = {"optspa", "random"}  # they do not use the loss table


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in sorted(SEARCHES)
    ]
)
def make(request):
    return SEARCHES[request.param]


@pytest.fixture(params=ZOO)
def animal(request):
    return get_animal(request.param)


def fail(assignment, fidelity):
    return Evaluation(assignment, fidelity, error="ValueError: no")


def test_search_is_registered_under_its_own_name():
    setting = get_animal("plain").setting
    for name in SEARCHES:
        assert SEARCHES[name](setting).name == name


@pytest.mark.parametrize("window", WINDOWS)
def test_proposals_fit_budget_and_split_for_any_window(make, animal, window):
    history = drive(make(animal.seeded(0)), animal.measure, 40, window)
    problem = animal.setting.problem
    assert len(history) == 40
    for evaluation in history:
        assert problem.total_bytes(evaluation.assignment) <= problem.budget_bytes
        assert all(
            0 <= level < len(cost)
            for level, cost in zip(evaluation.assignment, problem.bytes, strict=True)
        )
        assert evaluation.fidelity.split == "search"
        assert evaluation.fidelity.indices(animal.setting.num_sequences)


@pytest.mark.parametrize("window", WINDOWS)
def test_starts_are_measured_first_and_on_the_same_text(make, animal, window):
    history = drive(make(animal.seeded(0)), animal.measure, 2, window)
    assert tuple(e.assignment for e in history) == animal.setting.starts
    first, second = (replace(e.fidelity, slopes=False) for e in history)
    assert first == second


def test_asking_for_many_gives_at_most_many(make, animal):
    search = make(animal.seeded(0))
    assert 1 <= len(search.ask(7, [])) <= 7


@pytest.mark.parametrize("window", WINDOWS)
def test_history_is_a_function_of_seed_and_results(make, animal, window):
    """Neither global randomness nor another search at work in between changes a proposal."""
    first = drive(make(animal.seeded(3)), animal.measure, 24, window)
    other = make(animal.seeded(4))
    others: list[Evaluation] = []

    def distracted(assignment, fidelity):
        others.extend(drive(other, animal.measure, 1))
        random.seed(1)
        np.random.seed(1)
        return animal.measure(assignment, fidelity)

    assert drive(make(animal.seeded(3)), distracted, 24, window) == first
    assert {e.assignment for e in others} != {e.assignment for e in first}


@pytest.mark.parametrize("num_done", [1, 17])
def test_replaying_a_history_resumes_it(make, animal, num_done):
    undisturbed = make(animal.seeded(0))
    whole = drive(undisturbed, animal.measure, 30, 4)
    journal = {evaluation.key: evaluation for evaluation in whole[:num_done]}
    num_measured = 0

    def recall(assignment, fidelity):
        nonlocal num_measured
        fresh = animal.measure(assignment, fidelity)
        if fresh.key in journal:
            return journal[fresh.key]
        num_measured += 1
        return fresh

    search = make(animal.seeded(0))
    assert drive(search, recall, 30, 4) == whole
    assert num_measured <= 30 - num_done
    assert search.best == undisturbed.best


def test_nothing_succeeded_means_no_best(make, animal):
    search = make(animal.seeded(0))
    assert search.best is None
    history = drive(search, fail, 40, 4)
    assert history
    assert search.best is None


def test_first_success_becomes_best_after_failures(make):
    """Only the second start can be measured at first; afterwards everything can."""
    animal = get_animal("plain")
    search = make(animal.seeded(0))
    healthy = animal.setting.starts[1]
    drive(search, lambda a, f: animal.measure(a, f) if a == healthy else fail(a, f), 2)
    assert search.best == healthy


@pytest.mark.parametrize("window", WINDOWS)
def test_failed_is_never_best(make, window):
    """A third of all assignments fail, whatever a search proposes."""
    animal = get_animal("broken")
    search = make(animal.seeded(0))

    def is_bad(assignment):
        return assignment != animal.dp and crc32(repr(assignment).encode()) % 3 == 0

    num_failed = 0
    for _ in range(15):
        history = drive(
            search, lambda a, f: fail(a, f) if is_bad(a) else animal.measure(a, f), 4, window
        )
        num_failed += sum(not evaluation.ok for evaluation in history)
        assert search.best is None or not is_bad(search.best)
    assert num_failed > 3
    assert search.best is not None


def test_pinned_units_stay(make):
    animal = get_animal("ragged")
    pinned = [u for u, cost in enumerate(animal.setting.problem.bytes) if len(cost) == 1]
    history = drive(make(animal.seeded(0)), animal.measure, 40, 4)
    assert pinned
    assert all(evaluation.assignment[u] == 0 for evaluation in history for u in pinned)


def test_search_without_choice_finishes_with_the_only_assignment(make):
    animal = get_animal("plain")
    problem = animal.setting.problem
    only = replace(
        problem,
        bytes=tuple(cost[:1] for cost in problem.bytes),
        losses=tuple(loss[:1] for loss in problem.losses),
    )
    setting = replace(animal.setting, problem=only, starts=((0,) * len(only.bytes),))
    search = make(setting)
    history = drive(search, animal.measure, 100, 4)
    assert 1 <= len(history) < 100
    assert search.best == setting.starts[0]


def test_every_proposal_is_within_a_budget_that_only_the_cheapest_meets(make):
    animal = get_animal("plain")
    problem = replace(animal.setting.problem, budget_bytes=animal.setting.problem.least_bytes)
    setting = replace(animal.setting, problem=problem, starts=((0,) * len(problem.bytes),))
    history = drive(make(setting), animal.measure, 12, 4)
    assert {evaluation.assignment for evaluation in history} == {setting.starts[0]}


def test_search_improves_on_the_plan_it_started_from(make, animal):
    """The baselines promise only not to return anything much worse."""
    ratios = []
    for seed in range(2):
        search = make(animal.seeded(seed))
        drive(search, animal.measure, NUM_EVALUATIONS, 4)
        problem = animal.setting.problem
        assert problem.total_bytes(search.best) <= problem.budget_bytes
        ratios.append(animal.true_loss(search.best) / animal.true_loss(animal.dp))
    is_baseline = any(make is SEARCHES[name] for name in BASELINES)
    assert max(ratios) <= (1.02 if is_baseline else 0.98)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, starts=()), "at least one start"),
        (lambda s: replace(s, starts=((4,) * len(s.kinds),)), "over the budget"),
        (lambda s: replace(s, kinds=s.kinds[1:]), "a depth and a kind"),
        (lambda s: replace(s, batch_sequences=s.num_sequences + 1), "sequences in a batch"),
        (lambda s: replace(s, problem=replace(s.problem, ties=((0, 1),))), "without constraints"),
        (
            lambda s: replace(
                s, problem=replace(s.problem, bytes=tuple(c[::-1] for c in s.problem.bytes))
            ),
            "ordered by bytes",
        ),
    ],
)
def test_impossible_settings_are_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(change(get_animal("plain").setting))

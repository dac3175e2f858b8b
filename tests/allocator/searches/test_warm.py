"""Every search takes in what it did not ask for, and starts from what is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allocator.searches import SEARCHES
from allocator.searches.random_search import RandomSearch
from allocator.searches.thinning import Thinned, thinned_setting
from allocator.searches.warm import WarmStarted
from allocator.solvers.dynamic import DynamicProgram
from objectives.evaluation import Evaluation, Fidelity

from .test_conformance import SLOW
from .zoo import drive, get_animal

ALL = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in sorted(SEARCHES)]


def ideal_of(animal):
    """The best plan of the true separable losses: far better than the searches' start."""
    problem = replace(animal.setting.problem, losses=animal.truth)
    return DynamicProgram().solve(problem).choice


def earlier_run(animal, ideal):
    """A random search's history, in which the ideal and the DP plan meet all text."""
    history = drive(RandomSearch(animal.seeded(9)), animal.measure, 12, 4)
    whole = [animal.measure(a, Fidelity("search", 0, 32)) for a in (ideal, animal.dp)]
    return [*history, *whole]


@pytest.mark.parametrize("name", ALL)
def test_best_is_never_worse_than_the_best_known(name):
    animal = get_animal("plain")
    ideal = ideal_of(animal)
    cold = SEARCHES[name](animal.seeded(0))
    drive(cold, animal.measure, 3, 4)
    assert animal.true_loss(cold.best) > 1.15 * animal.true_loss(ideal)
    search = WarmStarted(
        SEARCHES[name](animal.seeded(0)), animal.setting, earlier_run(animal, ideal)
    )
    assert search.best == ideal
    for _ in range(6):
        drive(search, animal.measure, 6, 4)
        assert animal.true_loss(search.best) <= 1.03 * animal.true_loss(ideal)


@pytest.mark.parametrize("name", ALL)
def test_evaluations_that_were_not_asked_for_do_no_harm(name):
    """Another search's results arrive all the time; some failed, some twice."""
    animal = get_animal("ragged")
    search, other = SEARCHES[name](animal.seeded(0)), RandomSearch(animal.seeded(5))

    def distracted(assignment, fidelity):
        for strange in drive(other, animal.measure, 1):
            failed = Evaluation(strange.assignment, Fidelity("search", 1, 2), error="ValueError: n")
            search.tell([strange, failed, strange])
        return animal.measure(assignment, fidelity)

    history = drive(search, distracted, 40, 4)
    assert len(history) == 40
    problem = animal.setting.problem
    assert all(problem.total_bytes(e.assignment) <= problem.budget_bytes for e in history)
    assert problem.total_bytes(search.best) <= problem.budget_bytes
    assert animal.true_loss(search.best) <= 1.05


def test_only_what_the_setting_can_hold_is_told():
    animal = get_animal("plain")
    told: list[Evaluation] = []

    class Listener(RandomSearch):
        def tell(self, evaluations):
            told.extend(evaluations)
            super().tell(evaluations)

    good = animal.measure(animal.dp, Fidelity("search", 0, 8))
    dearest = tuple(len(cost) - 1 for cost in animal.setting.problem.bytes)
    known = [
        good,
        replace(good, assignment=dearest),
        replace(good, assignment=(9, *animal.dp[1:])),
        replace(good, fidelity=Fidelity("guard", 0, 8)),
        replace(good, fidelity=Fidelity("search", 0, 64)),
        replace(good, error="ValueError: no", sequence_nats=()),
        good,
    ]
    WarmStarted(Listener(animal.setting), animal.setting, known)
    assert told == [good]


def test_another_space_is_refused():
    animal = get_animal("plain")
    known = [animal.measure(animal.dp, Fidelity("search", 0, 8))]
    known = [replace(e, assignment=e.assignment[1:]) for e in known]
    with pytest.raises(ValueError, match="need a run on the same space"):
        WarmStarted(RandomSearch(animal.setting), animal.setting, known)


def test_thinned_search_is_told_what_it_has_words_for():
    animal = get_animal("plain")
    sizes = animal.setting.problem.bytes
    kept = tuple(
        (0, *range(2, len(cost))) if u == 0 else tuple(range(len(cost)))
        for u, cost in enumerate(sizes)
    )
    setting = replace(animal.setting, starts=((0,) * len(sizes),))
    search = Thinned(RandomSearch(thinned_setting(setting, kept)), kept)
    left_out, inside = (1, *(0,) * (len(sizes) - 1)), (2, *(0,) * (len(sizes) - 1))
    fidelity = Fidelity("search", 0, 8)
    lucky = Evaluation(left_out, fidelity, (0.1,) * 8)
    known = [lucky, animal.measure(inside, fidelity)]
    assert WarmStarted(search, setting, known).best == inside

"""Searches that share a budget: turns, shared results, resuming, and what cannot be one."""

from __future__ import annotations

import pytest

from allocator.searches import SEARCHES, make_search
from allocator.searches.portfolio import Portfolio
from objectives.evaluation import Evaluation

from .zoo import drive, get_animal

NAMES = "model_guided,evolution,tpe,surrogate_nsga2"


class Scripted:
    """Proposes a fixed list and remembers what it was told."""

    name = "scripted"

    def __init__(self, proposals):
        self.left = list(proposals)
        self.told: list[Evaluation] = []

    def ask(self, count, pending):
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def tell(self, evaluations):
        self.told.extend(evaluations)

    @property
    def best(self):
        return None


def proposals_of(animal, count):
    return make_search("random", animal.seeded(1)).ask(count, [])


def test_searches_take_turns_and_hear_everything():
    animal = get_animal("plain")
    a, b, c, d = proposals_of(animal, 4)
    first, second = Scripted([a, b]), Scripted([c, d])
    search = Portfolio([first, second], 32)
    assert search.ask(3, []) == [a, c, b]
    assert search.ask(3, []) == [d]
    evaluations = [animal.measure(p.assignment, p.fidelity) for p in (a, c, b, d)]
    search.tell(evaluations)
    assert first.told == second.told == evaluations
    assert search.best in {e.assignment for e in evaluations}


def test_what_is_known_or_under_way_is_not_measured_again():
    animal = get_animal("plain")
    a, b, c, _ = proposals_of(animal, 4)
    first, second = Scripted([a, b]), Scripted([a, a, c, b])
    search = Portfolio([first, second], 32)
    assert search.ask(2, []) == [a, c]  # both further wishes for a wait with the first
    result = animal.measure(a.assignment, a.fidelity)
    search.tell([result])
    assert first.told == [result]
    assert second.told == [result, result]
    assert search.ask(1, []) == [b]
    other = animal.measure(b.assignment, b.fidelity)
    search.tell([other])
    assert search.ask(1, []) == []
    assert second.told == [result, result, other, other]


@pytest.mark.parametrize("window", [1, 8])
def test_portfolio_keeps_the_budget_repeats_nothing_and_improves(window):
    animal = get_animal("plain")
    history = drive(search := make_search(NAMES, animal.seeded(0)), animal.measure, 120, window)
    problem = animal.setting.problem
    assert len({e.key for e in history}) == len(history) == 120
    assert all(problem.total_bytes(e.assignment) <= problem.budget_bytes for e in history)
    assert animal.true_loss(search.best) < 0.95


def test_replaying_a_portfolio_resumes_it():
    animal = get_animal("broken")
    whole = drive(make_search(NAMES, animal.seeded(0)), animal.measure, 40, 4)
    assert drive(make_search(NAMES, animal.seeded(0)), animal.measure, 40, 4) == whole
    assert drive(make_search(NAMES, animal.seeded(1)), animal.measure, 40, 4) != whole


def test_a_search_that_has_finished_leaves_the_others_their_turns():
    animal = get_animal("plain")
    (only,) = proposals_of(animal, 1)
    search = Portfolio([Scripted([only]), make_search("random", animal.seeded(0))], 32)
    assert len(drive(search, animal.measure, 30, 4)) == 30


def test_make_search_knows_single_names_and_lists():
    setting = get_animal("plain").setting
    assert isinstance(make_search("evolution", setting), SEARCHES["evolution"])
    assert isinstance(make_search("evolution, random", setting), Portfolio)
    with pytest.raises(ValueError, match="different searches"):
        make_search("random,random", setting)
    with pytest.raises(ValueError, match="unknown search 'evolutoin'"):
        make_search("random,evolutoin", setting)
    with pytest.raises(ValueError, match="at least one"):
        Portfolio([], 32)

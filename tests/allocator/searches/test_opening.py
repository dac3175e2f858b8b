"""The race of starts: who is dropped when, and whose table goes on."""

from dataclasses import replace

import numpy as np
import pytest

from allocator.problem import Problem
from allocator.searches.base import SearchSetting
from allocator.searches.model_guided import ModelGuided
from allocator.searches.opening import Opening, OpeningOptions
from allocator.solvers.dynamic import DynamicProgram
from objectives.evaluation import Evaluation, Fidelity

from .zoo import get_animal

GOOD, BAD, ODD = (0, 1), (1, 0), (0, 0)
SIZES = (np.array([1, 2]), np.array([1, 2]))
MISLED = (np.array([2.0, 0.0]), np.array([1.0, 0.0]))  # says BAD
RIGHT = (np.array([1.0, 0.0]), np.array([2.0, 0.0]))  # says GOOD
TEXT = np.array([3.0, 1.0, 2.0, 4.0, 1.5, 2.5, 3.5, 1.0, 2.0, 3.0, 1.0, 2.0])


def setting(*starts, tables=(RIGHT,), num_sequences=12, batch=1):
    problem = Problem(SIZES, MISLED, 3)
    return SearchSetting(
        problem, starts, (0, 0), ("w", "w"), num_sequences, batch, seed=0, tables=tables
    )


def race(opening, losses):
    """Run it to its end: ``losses`` gives each start's excess over the text's own; what it read."""
    read = {}
    while opening.winner is None:
        while (proposal := opening.ask()) is not None:
            assignment, fidelity = proposal.assignment, proposal.fidelity
            indices = fidelity.indices(len(TEXT))
            read.setdefault(assignment, []).extend(indices)
            nats = tuple(float(TEXT[i] + losses[assignment](i)) for i in indices)
            opening.tell(Evaluation(assignment, fidelity, nats))
    return read


def always(value):
    return lambda index: value + 1e-3 * (index % 2)


def test_who_is_clearly_worse_is_dropped_and_the_others_read_on():
    opening = Opening(setting(BAD, GOOD, ODD), OpeningOptions(most_sequences=8))
    close = {BAD: lambda i: 0.2 * (-1) ** i, GOOD: lambda i: -0.01, ODD: always(0.09)}
    read = race(opening, close)
    assert {start: len(indices) for start, indices in read.items()} == {BAD: 8, GOOD: 8, ODD: 4}
    assert read[BAD] == read[GOOD]  # the same text
    assert opening.winner == GOOD


def test_it_ends_where_all_but_one_are_dropped():
    opening = Opening(setting(BAD, GOOD))
    read = race(opening, {BAD: always(1.0), GOOD: always(0.0)})  # at least a quarter worse
    assert len(read[GOOD]) == 2
    assert opening.winner == GOOD
    assert opening.ask() is None


def test_where_losses_may_be_below_zero_only_the_test_decides():
    opening = Opening(setting(BAD, GOOD))
    below = {BAD: lambda i: -TEXT[i] - 0.1, GOOD: lambda i: -TEXT[i] - 0.2 - 0.01 * (i % 2)}
    assert len(race(opening, below)[GOOD]) == 4
    assert opening.winner == GOOD


def test_a_single_start_is_not_measured():
    opening = Opening(setting(BAD))
    assert opening.winner == BAD
    assert opening.ask() is None


@pytest.mark.parametrize(("num_sequences", "batch"), [(1, 1), (3, 2), (7, 4), (12, 12)])
def test_little_text_and_large_windows_are_enough(num_sequences, batch):
    opening = Opening(setting(BAD, GOOD, num_sequences=num_sequences, batch=batch))
    read = race(opening, {BAD: always(0.0), GOOD: always(0.0)})
    assert opening.winner == BAD  # the earliest wins ties
    assert read[BAD] == read[GOOD]


def test_a_failed_start_does_not_win():
    opening = Opening(setting(BAD, GOOD))
    while (proposal := opening.ask()) is not None:
        told = Evaluation(proposal.assignment, proposal.fidelity, error="OutOfMemoryError")
        if proposal.assignment == GOOD:
            told = Evaluation(proposal.assignment, proposal.fidelity, (9.0,))
        opening.tell(told)
    assert opening.winner == GOOD


def test_where_all_fail_the_first_goes_on():
    opening = Opening(setting(BAD, GOOD))
    while opening.winner is None:
        proposal = opening.ask()
        opening.tell(Evaluation(proposal.assignment, proposal.fidelity, error="OutOfMemoryError"))
    assert opening.winner == BAD


def test_what_it_did_not_ask_for_is_ignored():
    opening = Opening(setting(BAD, GOOD))
    opening.tell(Evaluation(ODD, Fidelity("search", 0, 1), (0.0,)))
    opening.tell(Evaluation(GOOD, Fidelity("search", 11, 1), (0.0,)))
    race(opening, {BAD: always(0.0), GOOD: always(1.0)})
    assert opening.winner == BAD


@pytest.mark.parametrize(("winner", "table"), [(GOOD, RIGHT), (BAD, MISLED), (ODD, MISLED)])
def test_the_winners_table_goes_on(winner, table):
    opening = Opening(setting(BAD, GOOD, ODD))
    race(opening, {start: always(float(start != winner)) for start in (BAD, GOOD, ODD)})
    own = opening.own
    assert own.starts[0] == winner
    assert set(own.starts) == {BAD, GOOD, ODD}
    assert own.problem.losses is table
    assert own.problem.budget_bytes == 3


def test_a_misled_table_is_left_for_a_better_one():
    animal = get_animal("plain")
    full = replace(animal.setting, batch_sequences=1)
    problem = full.problem
    rng = np.random.default_rng(0)
    misled = replace(problem, losses=tuple(rng.permutation(row) for row in problem.losses))
    wrong, right = DynamicProgram().solve(misled).choice, DynamicProgram().solve(problem).choice
    assert animal.true_loss(wrong) > 1.2 * animal.true_loss(right)
    told = replace(full, problem=misled, starts=(wrong, right), tables=(problem.losses,))
    search = ModelGuided(told)
    for _ in range(60):
        (proposal,) = search.ask(1, [])
        search.tell([animal.measure(proposal.assignment, proposal.fidelity)])
    assert animal.true_loss(search.best) <= 1.02 * animal.true_loss(right)


def test_options_have_to_make_sense():
    with pytest.raises(ValueError, match="1 <= first_sequences <= most_sequences, got 0 and 4"):
        OpeningOptions(first_sequences=0)
    with pytest.raises(ValueError, match="hopeless must be above 1"):
        OpeningOptions(hopeless=1.0)
    with pytest.raises(ValueError, match="level must be 0 to below"):
        OpeningOptions(level=0.5)

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator.searches.ledger import Ledger
from objectives.evaluation import Evaluation, Fidelity, mean, standard_error


def evaluation(index, first, values):
    return Evaluation((index,), Fidelity("search", first, len(values)), tuple(map(float, values)))


def test_empty_ledger_has_no_best():
    ledger = Ledger(4)
    assert ledger.best() is None
    with pytest.raises(KeyError):
        ledger.adjusted((0,))


def test_failed_evaluations_leave_no_trace():
    ledger = Ledger(4)
    ledger.add(Evaluation((0,), Fidelity("search", 0, 2), error="nan"))
    assert ledger.best() is None
    assert len(ledger) == 0


def test_single_evaluation_is_its_mean_and_standard_error():
    ledger = Ledger(4)
    values = (1.0, 2.0, 4.0)
    ledger.add(evaluation(0, 0, values))
    assert ledger.adjusted((0,)) == pytest.approx((mean(values), standard_error(values)))
    single = Ledger(4)
    single.add(evaluation(0, 0, [2.0]))
    assert single.adjusted((0,)) == pytest.approx((2.0, 0.0))


def test_whole_split_gives_plain_means():
    rng = np.random.default_rng(0)
    ledger = Ledger(6)
    table = rng.normal(1, 0.3, (9, 6))
    for index, row in enumerate(table):
        ledger.add(evaluation(index, 0, row))
    for index, row in enumerate(table):
        assert ledger.adjusted((index,))[0] == pytest.approx(row.mean())
    assert ledger.best() == (int(table.mean(1).argmin()),)


def test_easy_text_does_not_make_an_assignment_better():
    """Assignment 1 is worse than 0 on the text they share, but was measured on easy text too."""
    ledger = Ledger(4)
    ledger.add(evaluation(0, 0, [2.0, 2.1]))
    ledger.add(evaluation(1, 1, [2.3, 1.0]))
    ledger.add(evaluation(2, 1, [2.2, 0.9]))
    assert mean([2.0, 2.1]) > mean([2.3, 1.0])
    assert ledger.adjusted((0,))[0] < ledger.adjusted((1,))[0]
    assert ledger.best() == (0,)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), linked=st.booleans())
def test_recovers_order_under_sequence_effects(seed, linked):
    """Effects ten times the noise; each assignment on one of four windows."""
    rng = np.random.default_rng(seed)
    losses = rng.permutation(np.linspace(1.0, 1.6, 40))
    effects = rng.normal(0, 0.3, 16)
    ledger = Ledger(16)
    for index, loss in enumerate(losses):
        windows = range(4) if index == 0 and linked else [index % 4]
        for window in windows:
            at = slice(4 * window, 4 * window + 4)
            values = loss + effects[at] + rng.normal(0, 0.03, 4)
            ledger.add(evaluation(index, 4 * window, values))
    adjusted = np.array([ledger.adjusted((i,))[0] for i in range(40)])
    correlation = np.corrcoef(adjusted, losses)[0, 1]
    assert correlation > (0.97 if linked else 0.7)
    if linked:
        assert losses[ledger.best()[0]] < 1.1


def test_an_outlier_does_not_make_its_text_look_hard():
    """One bad start on a window that nothing links to another leaves the others as measured."""
    ledger = Ledger(8)
    shape = np.array([1.3, 0.8, 1.1, 0.8])
    for index, loss in enumerate([0.76, 0.066, 0.07, 0.08, 0.065]):
        ledger.add(evaluation(index, 0, loss * shape))
    ledger.add(evaluation(5, 4, [0.0864, 0.0404, 0.071, 0.0371]))
    found = [ledger.adjusted((index,))[0] for index in range(6)]
    assert found == pytest.approx([0.76, 0.066, 0.07, 0.08, 0.065, 0.0587], abs=0.003)
    assert ledger.best() == (5,)


def test_assignments_alike_tell_hard_text_from_easy_where_nothing_links():
    """Losses of 3 and of 1 for the same assignments: it is the text."""
    ledger = Ledger(12)
    rng = np.random.default_rng(1)
    hard, easy = rng.normal(3.0, 0.4, 6), rng.normal(1.0, 0.4, 6)
    offsets = np.linspace(-0.05, 0.05, 5)
    for index, offset in enumerate(offsets):
        ledger.add(evaluation(index, 0, hard + offset))
        ledger.add(evaluation(5 + index, 6, easy + offset))
    found = np.array([ledger.adjusted((index,))[0] for index in range(10)])
    assert found[:5] - found[5:] == pytest.approx(np.zeros(5), abs=0.1)


def test_standard_error_covers_the_truth():
    """About 95 % of adjusted losses lie within two standard errors, relative to their mean."""
    covered = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        losses = rng.normal(1.0, 0.1, 20)
        effects = rng.normal(0, 0.3, 12)
        ledger = Ledger(12)
        for index, loss in enumerate(losses):
            first = int(rng.integers(12))
            at = [(first + k) % 12 for k in range(4)]
            ledger.add(evaluation(index, first, loss + effects[at] + rng.normal(0, 0.05, 4)))
        pairs = [ledger.adjusted((i,)) for i in range(20)]
        error = np.array([pair[0] for pair in pairs]) - losses
        error -= error.mean()
        covered += list(np.abs(error) < 2 * np.array([pair[1] for pair in pairs]))
    assert 0.9 < np.mean(covered) < 1.0


def test_lightly_measured_has_to_look_better_by_more():
    rng = np.random.default_rng(0)
    ledger = Ledger(32)
    ledger.add(evaluation(0, 0, 1.0 + rng.normal(0, 0.1, 32)))
    ledger.add(evaluation(1, 0, 1.3 + rng.normal(0, 0.1, 32)))
    known = ledger.adjusted((0,))
    offset = ledger.adjusted((0,))[0] - 0.02
    ledger.add(evaluation(2, 0, [offset]))
    assert ledger.adjusted((2,))[1] > 2 * known[1]
    assert ledger.best() == (0,)


def test_measuring_again_changes_nothing_and_order_does_not_matter():
    table = np.random.default_rng(0).normal(1, 0.2, (4, 5))
    evaluations = [evaluation(i, f, table[i, f : f + 3]) for i in range(4) for f in (0, 2)]
    forward, backward = Ledger(5), Ledger(5)
    for item in evaluations:
        forward.add(item)
        forward.add(item)
    for item in reversed(evaluations):
        backward.add(item)
    for i in range(4):
        assert forward.adjusted((i,)) == pytest.approx(backward.adjusted((i,)))
        assert math.isfinite(forward.adjusted((i,))[1])

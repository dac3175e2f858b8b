"""Measurements on parts of a text, compared with the reference on the same sequences."""

from dataclasses import replace

import numpy as np
import pytest

from allocator.search_build import refit
from allocator.searches.corrected_table import CorrectedTable
from allocator.searches.surrogate import Spreads
from objectives.evaluation import Evaluation, Fidelity

from .zoo import get_animal

FEW = 4


@pytest.fixture
def setting():
    return get_animal("plain").setting


def table(setting, num_reference=FEW):
    return CorrectedTable(setting, Spreads(), num_reference=num_reference)


def evaluation(assignment, first, nats, error=None):
    return Evaluation(assignment, Fidelity("search", first, len(nats)), tuple(nats), error=error)


def test_what_has_no_reference_waits(setting):
    first, other = setting.starts[:2]
    corrected = table(setting)
    early = evaluation(other, 8, [2.0])
    assert corrected.tell([early]) == []
    assert corrected.surrogate is None
    assert corrected.best() == other
    assert corrected.losses() is None
    reference = evaluation(first, 0, [3.0, 1.0, 2.0, 2.0])
    assert corrected.tell([reference]) == [reference]
    assert corrected.surrogate is not None
    late = evaluation(first, 8, [4.0])
    assert corrected.tell([late]) == [early, late]


def test_hard_text_says_nothing_about_an_assignment(setting):
    """A third of the reference's loss stays a third, on easy sequences and on hard ones."""
    first, other = setting.starts[:2]
    nats = [3.0, 0.6, 2.0, 2.4]
    found = []
    for index in range(FEW):
        corrected = table(setting)
        corrected.tell([evaluation(first, 0, nats), evaluation(other, index, [nats[index] / 3])])
        found.append(corrected.surrogate.best())
    assert {best[0] for best in found} == {other}
    assert np.ptp([best[1] for best in found]) < 1e-9


def test_differences_where_ratios_mean_nothing(setting):
    """A loss that can be negative on a sequence is compared by differences."""
    first, other = setting.starts[:2]
    corrected = table(replace(setting, batch_sequences=1))
    corrected.tell([evaluation(first, 0, [1.0, -0.9, 0.5, 0.1])])
    corrected.tell([evaluation(other, 1, [-1.9])])  # as a ratio it would be twice the loss
    assert corrected.surrogate.best()[0] == other


def test_failures_and_repetitions_teach_nothing(setting):
    first, other = setting.starts[:2]
    corrected = table(setting)
    told = [evaluation(first, 0, [1.0] * FEW), evaluation(other, 0, [0.5])]
    corrected.tell(told)
    count = corrected.surrogate.num_observations
    broken = Evaluation(other, Fidelity("search", 1, 1), error="non-finite loss")
    assert corrected.tell([*told, broken]) == []
    assert corrected.surrogate.num_observations == count == 2


def test_refit_is_in_nats_of_the_text_read(setting):
    first = setting.starts[0]
    told = [evaluation(first, i, [2.0]) for i in range(8)]
    told += [evaluation(first, i, [4.0]) for i in range(8, 32)]
    losses = refit(setting, told)
    at_first = sum(float(row[i]) for row, i in zip(losses, first, strict=True))
    assert at_first == pytest.approx(3.5, rel=0.02)
    assert refit(setting, []) is None


def test_refit_is_around_what_was_measured_on_most_text(setting):
    """Not the first start, which a race may have dropped after little of it."""
    first, other = setting.starts[:2]
    told = [evaluation(first, 0, [0.44] * 4), evaluation(other, 0, [2.0] * 8)]
    losses = refit(setting, told)
    at_other = sum(float(row[i]) for row, i in zip(losses, other, strict=True))
    assert at_other == pytest.approx(2.0, rel=0.02)
    assert refit(setting, told[:1]) is None


def test_where_the_reference_loses_nothing_differences_are_compared(setting):
    first, other = setting.starts[:2]
    corrected = table(setting)
    corrected.tell([evaluation(first, 0, [3.0, 1.0, 2.0, 2.0]), evaluation(first, 8, [0.0])])
    corrected.tell([evaluation(other, 8, [-0.5])])
    assert corrected.surrogate.best()[0] == other
    assert all(np.isfinite(row).all() and row.max() < 20 for row in corrected.losses())


def test_a_failed_measurement_of_the_reference_does_not_hold_the_surrogate_up(setting):
    first, other = setting.starts[:2]
    corrected = table(setting)
    corrected.tell([evaluation(first, 0, [3.0, 1.0, 2.0])])
    assert corrected.surrogate is None
    failed = Evaluation(first, Fidelity("search", 3, 1), error="OutOfMemoryError")
    assert len(corrected.tell([failed])) == 1
    assert corrected.surrogate is not None
    assert corrected.tell([evaluation(other, 3, [1.0])]) == []  # compared with nothing
    assert len(corrected.tell([evaluation(other, 1, [1.0])])) == 1


def test_a_reference_that_always_fails_is_none(setting):
    corrected = table(setting)
    failed = (
        Evaluation(setting.starts[0], Fidelity("search", i, 1), error="OutOfMemoryError")
        for i in range(2 * FEW)
    )
    assert corrected.tell(list(failed)) == []
    assert corrected.surrogate is None

"""Scorers that measure: one unit at a time, from dense or a plan, and noise in every unit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from language import trained
from scoring import cells_of, make_context, table

from objectives.bank import Bank
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.sensitivity import SCORERS
from objectives.sensitivity.noise_injection import LEVELS
from objectives.task import TokenMeter
from search_spaces.operators import Keep, RoundToNearest

MENU = (RoundToNearest(2, 32), RoundToNearest(4, 32), Keep())
FIRST = Fidelity("statistics", 0, 4)


@pytest.fixture(scope="module")
def context():
    model, calibration = trained()
    return make_context(model, calibration, MENU, needs=(), num_sequences=4)


def measured(context, assignment):
    context.bank.restore()
    bank = Bank(context.model, context.space)
    plain = Evaluator(context.model, context.task, bank, TokenMeter(), prefix_bytes=0)
    found = plain(assignment, FIRST)
    bank.restore()
    return found


def test_one_at_a_time_is_the_measured_loss_of_each_unit_alone(context):
    dense = (2,) * 42
    reference = measured(context, dense).loss_nats
    rows = table("one_at_a_time", context)
    for unit in (0, 5, 20, 41):
        for option in (0, 1):
            changed = (*dense[:unit], option, *dense[unit + 1 :])
            expected = measured(context, changed).loss_nats - reference
            assert rows[unit][option] == pytest.approx(expected, abs=1e-12)
    assert all(row[2] == 0.0 for row in rows)


def test_measuring_in_the_order_of_depth_runs_about_half_of_the_blocks():
    model, calibration = trained()
    context = make_context(model, calibration, MENU, needs=(), num_sequences=4)
    context.meter.num_blocks = 6
    table("one_at_a_time", context)
    tokens, blocks = context.meter.counts["statistics"], context.meter.block_counts["statistics"]
    assert tokens == (1 + 42 * 2) * 4 * 64  # dense, then every option but the dense one
    assert blocks < 0.65 * 6 * tokens
    table("marginal_perplexity", context)  # the same measurements, read another way
    assert context.meter.counts["statistics"] == tokens


def test_incumbent_moves_the_point_that_changes_are_measured_from(context):
    incumbent = tuple(unit % 2 for unit in range(42))
    from_there = replace(context, incumbent=incumbent)
    scorer = SCORERS["one_at_a_time_incumbent"]()
    losses = dict(zip(cells_of(context), scorer.losses(from_there, cells_of(context)), strict=True))
    reference = measured(context, incumbent).loss_nats
    for unit in (0, 7, 30):
        assert losses[unit, incumbent[unit]] == 0.0
        changed = (*incumbent[:unit], 2, *incumbent[unit + 1 :])
        expected = measured(context, changed).loss_nats - reference
        assert losses[unit, 2] == pytest.approx(expected, abs=1e-12)
    assert min(losses.values()) < 0 < max(losses.values())


def test_without_an_incumbent_says_what_to_do(context):
    scorer = SCORERS["one_at_a_time_incumbent"]()
    with pytest.raises(ValueError, match="expected an incumbent plan"):
        list(scorer.losses(replace(context, incumbent=None), [(0, 0)]))


def test_marginal_perplexity_reads_the_cross_entropy(context):
    dense = (2,) * 42
    reference = np.mean(measured(context, dense).sequence_cross_entropy_nats)
    (loss,) = SCORERS["marginal_perplexity"]().losses(context, [(3, 0)])
    changed = measured(context, (*dense[:3], 0, *dense[4:]))
    assert loss == pytest.approx(np.mean(changed.sequence_cross_entropy_nats) - reference)


def test_noise_is_fitted_per_unit_and_prices_every_option(context):
    """The same alpha for all options of a unit, and nats that measured ones resemble."""
    context.bank.restore()
    ours, errors = table("noise_injection", context), table("relative_error", context)
    alphas = np.array(ours)[:, :2] / np.array(errors)[:, :2]
    assert alphas[:, 0] == pytest.approx(alphas[:, 1])
    assert (alphas >= 0).all()
    assert len(set(alphas[:, 0])) > 30
    context.bank.restore()
    measured_rows = np.array(table("one_at_a_time", context))[:, 1]
    ranks = [np.argsort(np.argsort(values)) for values in (np.array(ours)[:, 1], measured_rows)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert 1 / 3 < np.array(ours)[:, 1].sum() / measured_rows.sum() < 3


def test_noise_has_the_error_it_says(context):
    from objectives.sensitivity.noise_injection import _error, _noisy

    noisy = _noisy(context)
    for index, level in enumerate(LEVELS):
        assert _error(noisy, (4, index)) == pytest.approx(level, rel=1e-3)
    first = noisy.bank.compressed(4, 0)[0]
    assert torch.equal(first, noisy.bank.compressed(4, 0)[0])
    assert not torch.equal(first, noisy.bank.compressed(4, 1)[0])

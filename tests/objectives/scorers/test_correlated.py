"""Estimates over weights, times how much of a matrix's error arrives at its outputs."""

from dataclasses import replace

import numpy as np
import pytest
from dense_gradients import change, storable_model, with_caches
from language import random_tokens, trained
from scoring import make_context, table

from objectives import statistics
from objectives.sensitivity import SCORERS
from search_spaces.operators import GPTQ, Keep, RoundToNearest, SparseGPT
from search_spaces.operators.members import logical

MENU = (RoundToNearest(2, 16), GPTQ(2, 16), GPTQ(3, 16), Keep())


def served(model, calibration, menu, **request):
    """A context whose operators get the statistics that they need."""
    context = make_context(model, calibration, menu, **request)
    context.bank.use_statistics(context.statistics)
    return context


bases = pytest.mark.parametrize("base", ["blend", "fisher"])


@bases
@pytest.mark.parametrize(("family", "ties"), [("llama", "vllm"), ("gpt2", "none")])
def test_is_the_base_times_what_arrives_of_the_error(family, ties, base):
    """By moments of the weighted inputs, in double precision; rounding has the base's loss."""
    context = served(storable_model(family), random_tokens(), MENU, ties=ties)
    plain = table(base, context)
    for unit, row in enumerate(table(f"correlated_{base}", context)):
        assert row[3] == 0.0
        for option, found in enumerate(context.space.menus[unit]):
            if not isinstance(found.operator, GPTQ):
                assert row[option] == plain[unit][option]
                continue
            errors, arriving, independent = change(context, unit, option), 0.0, 0.0
            for member in context.space.units[unit].members:
                error = logical(errors[member.name], member)[0]
                inputs = context.statistics[member.name].weighted_inputs.double()
                moments = inputs.T @ inputs
                arriving += float((error @ moments @ error.T).trace())
                independent += float((error.square() * moments.diagonal()).sum())
            expected = plain[unit][option] * arriving / independent
            assert row[option] == pytest.approx(expected, rel=1e-4)


@bases
def test_is_the_base_where_no_hook_sees_the_inputs(base):
    context = served(storable_model("llama"), random_tokens(), (GPTQ(2, 16),))
    blind = {
        name: replace(stats, weighted_inputs=None) for name, stats in context.statistics.items()
    }
    assert table(f"correlated_{base}", replace(context, statistics=blind)) == table(base, context)
    assert table(f"correlated_{base}", context) != table(base, context)


@bases
def test_inputs_are_asked_for_only_where_an_operator_solves_for_outputs(base):
    scorer = SCORERS[f"correlated_{base}"]()
    for menu, inputs in (((RoundToNearest(4, 16), Keep()), False), (MENU, True)):
        space = make_context(storable_model("llama"), random_tokens(), menu).space
        assert ("weighted_inputs" in scorer.needs_for(space)) is inputs
        assert scorer.needs_for(space) >= SCORERS[base].needs


@bases
def test_caches_have_the_bases_loss(base):
    context = with_caches(storable_model("llama"), random_tokens(), RoundToNearest(2, 16), Keep())
    plain = make_context(context.model, random_tokens(), (Keep(),))
    context = replace(context, statistics=plain.statistics)
    assert any(unit.is_cache for unit in context.space.units)
    assert table(f"correlated_{base}", context) == table(base, context)


def test_the_second_of_two_correlated_tables_reads_no_outputs():
    context = served(storable_model("llama"), random_tokens(), MENU)
    table("correlated_blend", context)
    assert len(context.arriving) == sum(map(len, context.space.menus))
    alone = table("correlated_fisher", replace(context))
    blind = {
        name: replace(stats, weighted_inputs=None) for name, stats in context.statistics.items()
    }
    context.statistics.clear()
    context.statistics.update(blind)
    assert table("correlated_fisher", context) == alone


def test_a_sample_of_the_tokens_stands_for_all(monkeypatch):
    model, calibration = trained()
    sequences, length = calibration.splits["statistics"].shape
    total = sequences // 4 * length  # as much of the search split is read

    def sampling(tokens):
        monkeypatch.setattr(statistics, "SAMPLED_TOKENS", tokens)
        context = served(model, calibration, (GPTQ(3, 32),))
        assert {len(found.weighted_inputs) for found in context.statistics.values()} == {tokens}
        return context

    whole, sampled = sampling(total), sampling(total // 4)
    ratios = np.array(table("correlated_blend", sampled)) / table("correlated_blend", whole)
    assert ratios.min() > 0.8
    assert ratios.max() < 1.25
    assert not np.allclose(ratios, 1)


def test_operators_that_solve_for_outputs_get_their_due():
    """Beside rounding, a table over weights takes the care of GPTQ and SparseGPT for damage."""
    model, calibration = trained()
    menu = (RoundToNearest(4, 32), GPTQ(4, 32), GPTQ(3, 32), SparseGPT(0.5), Keep())
    context = served(model, calibration, menu)
    measured, blend, correlated = (
        np.array(table(name, context))[:, :-1].mean(0)
        for name in ("one_at_a_time", "blend", "correlated_blend")
    )
    assert np.ptp(np.log(measured / correlated)) < 0.5 * np.ptp(np.log(measured / blend))

"""Caches in the bank, the evaluator and the scorers, on the trained model."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from language import assert_same_weights, random_model, random_tokens, snapshot, trained
from scoring import context_of, table

from objectives.bank import Bank
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.kv_cache import NUM_SEQUENCES, CacheLosses, CacheSwitch
from objectives.language_task import LanguageTask
from objectives.quantized_layer import quantized_cache
from objectives.sensitivity.blend import FISHER_WEIGHT
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models.kv_layers import cache_units
from search_spaces.operators import Keep, KVQuantize, RoundToNearest
from search_spaces.space import Member, SearchSpace, Unit, build_menu

BITS = (2, 3, 4, 6, 8)
MENU = (*(KVQuantize(bits, bits, 16) for bits in BITS), Keep())
SEARCH = Fidelity("search", 0, 8)


def space_of(model, *, apart=False, weights=()):
    """Caches for 64 tokens, and weights if they have a menu."""
    units = cache_units(model, 64, apart=apart)
    menus = tuple(build_menu(unit, MENU) for unit in units)
    if weights:
        space = build_space(model, SpaceRequest())
        menus = tuple(build_menu(unit, weights) for unit in space.units) + menus
        return SearchSpace("both", space.units + units, menus, space.fixed)
    return SearchSpace("caches", units, menus, ())


def bench(model, calibration, space):
    bank, meter = Bank(model, space), TokenMeter()
    task = LanguageTask(calibration, top_k=0)
    return bank, Evaluator(model, task, bank, meter), task, meter


@pytest.mark.parametrize("apart", [False, True])
def test_more_bits_of_all_caches_lose_less(apart):
    model, calibration = trained()
    space = space_of(model, apart=apart)
    bank, evaluate, *_ = bench(model, calibration, space)
    losses = [evaluate((i,) * len(space.units), SEARCH).loss_nats for i in range(len(MENU))]
    bank.restore()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.01
    assert all(cheap > 2 * dear for cheap, dear in pairwise(losses)), losses
    assert losses[-1] < 1e-6


def test_dense_caches_leave_no_trace():
    model, calibration = trained()
    before, space = snapshot(model), space_of(model)
    bank, evaluate, task, _ = bench(model, calibration, space)
    evaluate.prepare("search")
    plain = task.sequence_losses(model, "search", range(8))
    tokens = calibration.splits["search"][:2]
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
        bank.swap((0,) * 6)
        assert len(model._forward_pre_hooks) == 1
        assert not torch.equal(model(input_ids=tokens).logits, logits)
        bank.swap((len(MENU) - 1,) * 6)
        assert not model._forward_pre_hooks
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, logits)
    kept = evaluate((len(MENU) - 1,) * 6, SEARCH)
    assert kept.sequence_nats == tuple(float(f"{x:.6g}") for x in plain.nats)
    bank.swap((0,) * 6)
    bank.restore()
    assert not model._forward_pre_hooks
    assert_same_weights(model, before)


def test_a_lone_quantized_cache_among_dense_ones_is_all_that_differs():
    """The rest of the model runs as without a cache, bit by bit."""
    model, calibration = trained()
    space = space_of(model)
    bank, *_ = bench(model, calibration, space)
    tokens = calibration.splits["search"][:2]
    entered = []
    handle = model.model.layers[3].register_forward_pre_hook(
        lambda module, args: entered.append(args[0].clone())
    )
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
        for layer in (3, 2):
            bank.swap(tuple(0 if i == layer else len(MENU) - 1 for i in range(6)))
            model(input_ids=tokens, use_cache=False)
    handle.remove()
    bank.restore()
    assert torch.equal(entered[0], entered[1])
    assert not torch.equal(entered[0], entered[2])


def test_keys_and_values_apart_add_up_to_both():
    model, calibration = trained()
    tied, apart = space_of(model), space_of(model, apart=True)
    bank, evaluate, *_ = bench(model, calibration, tied)
    both = evaluate((1,) * 6, SEARCH).sequence_nats
    bank.restore()
    bank, evaluate, *_ = bench(model, calibration, apart)
    assert evaluate((1,) * 12, SEARCH).sequence_nats == both
    assert evaluate((1, 5) * 6, SEARCH).sequence_nats != both
    bank.restore()


def test_weights_and_caches_are_swapped_together():
    model, calibration = trained()
    space = space_of(model, weights=(RoundToNearest(3, 16), Keep()))
    bank, evaluate, *_ = bench(model, calibration, space)
    dearest = tuple(len(menu) - 1 for menu in space.menus)
    cheap = {
        is_cache: tuple(
            0 if unit.is_cache == is_cache else most
            for unit, most in zip(space.units, dearest, strict=True)
        )
        for is_cache in (False, True)
    }
    losses = {name: evaluate(chosen, SEARCH).loss_nats for name, chosen in cheap.items()}
    everything = evaluate((0,) * len(dearest), SEARCH).loss_nats
    bank.restore()
    assert min(losses.values()) > 0.01
    assert everything > max(losses.values())


def test_text_read_token_by_token_loses_as_much_as_in_one_pass():
    """The measured loss speaks for generation, where groups close one after the other."""
    model, calibration = trained()
    tokens = calibration.splits["search"]
    layers = {layer: dict.fromkeys(("keys", "values"), MENU[0]) for layer in range(6)}
    with torch.inference_mode():
        dense = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits, -1)

        def loss(*parts):
            cache = quantized_cache(model.config, layers)
            logits = torch.cat(
                [model(input_ids=part, past_key_values=cache).logits for part in parts], 1
            )
            student = torch.log_softmax(logits, -1)
            return (dense.exp() * (dense - student)).sum(-1).mean().item()

        at_once, stepwise = loss(tokens), loss(*tokens.split(1, 1))
    assert at_once > 0.01
    assert 0.5 < stepwise / at_once < 1.2  # a group that is still short has a finer grid


def test_single_caches_are_measured_once_and_counted():
    model, calibration = trained()
    before, space = snapshot(model), space_of(model)
    bank, _, task, meter = bench(model, calibration, space)
    bank.swap((0,) * 6)  # which the measurement must not see
    losses = CacheLosses(model, task, space, bank=bank, meter=meter)
    found = [[losses(unit, option) for option in range(len(MENU))] for unit in range(6)]
    spent = meter.counts["statistics_caches"]
    assert spent == 24 * 64 + 6 * len(BITS) * NUM_SEQUENCES * 64  # the dense model, then each cell
    assert losses(2, 1) is found[2][1]
    assert meter.counts["statistics_caches"] == spent
    for row in found:
        for values in ([cell.nats for cell in row], [cell.relative_error for cell in row]):
            assert values == sorted(values, reverse=True)
            assert values[-1] == 0.0
        assert row[0].nats > 0
        assert 0.05 < row[0].relative_error < 1
    assert not model._forward_pre_hooks
    assert_same_weights(model, before)
    bank.swap((0, *[len(MENU) - 1] * 5))
    direct = task.sequence_losses(model, "statistics", range(NUM_SEQUENCES)).nats
    bank.restore()
    assert found[0][0].nats == pytest.approx(sum(direct) / NUM_SEQUENCES)


def test_single_losses_add_up_to_the_measured_one():
    model, calibration = trained()
    space = space_of(model)
    bank, evaluate, task, meter = bench(model, calibration, space)
    losses = CacheLosses(model, task, space, bank=bank, meter=meter)
    together = evaluate((2,) * 6, SEARCH).loss_nats
    bank.restore()
    assert 0.5 < sum(losses(unit, 2).nats for unit in range(6)) / together < 2


# What a cache's losses become on the scale of a scorer of weights.
SCALES = {
    "fisher": lambda loss: loss.nats,
    "relative_error": lambda loss: loss.relative_error,
    "reconstruction": lambda loss: loss.relative_error,
    "blend": lambda loss: loss.nats**FISHER_WEIGHT * loss.relative_error ** (1 - FISHER_WEIGHT),
    "correlated_fisher": lambda loss: loss.nats,
    "correlated_blend": lambda loss: (
        loss.nats**FISHER_WEIGHT * loss.relative_error ** (1 - FISHER_WEIGHT)
    ),
}


@pytest.fixture(scope="module")
def joint():
    """(space, table of each scorer) of weights and caches, and what the caches lose alone."""
    model, calibration = trained()
    space = space_of(model, weights=(RoundToNearest(3, 16), RoundToNearest(4, 16), Keep()))
    bank, _, task, meter = bench(model, calibration, space)
    losses = CacheLosses(model, task, space, bank=bank, meter=meter)
    context = replace(context_of(model, space, task), bank=bank, caches=losses)
    statistics = context.statistics
    assert not any(unit.members[0].name in statistics for unit in space.units if unit.is_cache)
    tables = {name: table(name, context) for name in SCALES}
    return space, tables, losses


@pytest.mark.parametrize("name", list(SCALES))
def test_scorers_put_caches_on_their_own_scale(name, joint):
    space, tables, losses = joint
    expected = SCALES[name]
    caches = [unit for unit, found in enumerate(space.units) if found.is_cache]
    assert len(caches) == 6
    for unit in caches:
        row = tables[name][unit]
        assert row == [expected(losses(unit, option)) for option in range(len(MENU))]
        assert row == sorted(row, reverse=True)
        assert row[-1] == 0.0
    # Three bits cost a matrix and a cache alike within two orders of magnitude.
    weights = [row[0] for unit, row in enumerate(tables[name]) if unit not in caches]
    ratio = sum(tables[name][unit][1] for unit in caches) / 6 / (sum(weights) / len(weights))
    assert 0.01 < ratio < 100


def test_weights_of_a_cache_are_not_asked_for():
    model = random_model("llama")
    space = space_of(model)
    context = context_of(model, space, LanguageTask(random_tokens()), needs=())
    with pytest.raises(ValueError, match=r"self_attn\.cache is a cache, which has no weights"):
        context.errors(0, 0)


def test_a_cache_of_another_width_than_priced_is_refused():
    model = random_model("llama")
    member = Member("model.layers.0.self_attn", "keys", (1, 10, 99), cache=True)
    switch = CacheSwitch(model)
    switch.choose(Unit("c", (member,), 0, "cache"), MENU[0])
    with pytest.raises(ValueError, match="prices 99 channels, the model caches 16"):
        model(input_ids=random_tokens().splits["search"])
    switch.clear()
    model(input_ids=random_tokens().splits["search"])


def test_another_cache_beside_those_that_are_swapped_in_is_refused():
    model = random_model("llama")
    switch = CacheSwitch(model)
    switch.choose(cache_units(model, 10)[0], MENU[0])
    with pytest.raises(ValueError, match="takes no other cache"):
        model.generate(random_tokens().splits["search"], max_new_tokens=2)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gpt_neox", "gemma3_text", "gpt_oss"])
def test_caches_of_other_families_are_measured_too(name):
    model, calibration = random_model(name), random_tokens()
    space = space_of(model)
    bank, evaluate, *_ = bench(model, calibration, space)
    losses = [evaluate((i, i), Fidelity("search", 0, 4)).loss_nats for i in (0, 4, 5)]
    bank.restore()
    assert losses[0] > losses[1] > abs(losses[2])

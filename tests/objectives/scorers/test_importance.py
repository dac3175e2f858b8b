"""Importance scorers: their promises in common, the direction of each, and blocks that are run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import random_model, random_tokens, trained
from scoring import cells_of, context_of, make_context, table
from toys import MENU, normal, toy_context, with_spectrum

from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from objectives.sensitivity.arithmetic_progression import ArithmeticProgression
from objectives.sensitivity.block_influence import BlockInfluence
from objectives.sensitivity.erdos_renyi import ErdosRenyi, density
from objectives.sensitivity.importance import ImportanceScorer, proportional_ratios, unit_sizes
from objectives.sensitivity.outlier_ratio import OutlierRatio
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import RoundToNearest

OURS = [name for name in SCORERS if issubclass(SCORERS[name], ImportanceScorer)]
PER_MATRIX = ("erdos_renyi", "spectrum_energy")
GLOBAL_CUTS = ("lamp", "magnitude")  # with losses of their own
PER_BLOCK = ("arithmetic_progression", "block_influence", "outlier_ratio", "spectral_tail")

every_scorer = pytest.mark.parametrize("name", OURS)


@pytest.fixture(scope="module")
def context():
    model, calibration = trained()
    return make_context(model, calibration, MENU, num_sequences=4)


def test_all_of_them_are_here():
    assert set(OURS) >= {*PER_BLOCK, *PER_MATRIX, *GLOBAL_CUTS}


@every_scorer
def test_ratios_meet_their_weighted_mean_and_stay_in_the_box(name, context):
    scorer, sizes = SCORERS[name](), unit_sizes(context.space)
    importances = scorer.importances(context)
    for removed in (0.0, 0.3, 0.6, 0.86, 1.0):
        ratios = scorer.ratios(importances, context.space, removed)
        assert sizes @ ratios == pytest.approx(removed * sizes.sum(), abs=1e-9 * sizes.sum())
        assert ((ratios >= 0) & (ratios <= 1)).all()


@pytest.mark.parametrize("name", PER_BLOCK)
def test_blocks_lose_as_one(name, context):
    scorer = SCORERS[name]()
    importances = scorer.importances(context)
    ratios = scorer.ratios(importances, context.space, 0.5)
    blocks = np.array([unit.depth for unit in context.space.units])
    for numbers in (importances, ratios):
        per_block = [set(numbers[blocks == depth]) for depth in range(6)]
        assert all(len(found) == 1 for found in per_block)
        assert len(set.union(*per_block)) > 4  # two may be at a cap


@every_scorer
def test_importances_are_measured_once_per_table(name, context):
    calls = []

    class Counting(SCORERS[name]):
        def measure(self, context):
            calls.append(context)
            return super().measure(context)

    assert len(list(Counting().losses(context, cells_of(context)))) == 42 * 3
    assert len(calls) == 1


@pytest.mark.parametrize("name", PER_BLOCK + PER_MATRIX)
def test_table_is_importance_times_relative_error(name, context):
    importances = SCORERS[name]().importances(context)
    for mine, errors, importance in zip(
        table(name, context), table("relative_error", context), importances, strict=True
    ):
        assert mine == pytest.approx([importance * error for error in errors])


@every_scorer
def test_caches_are_refused(name):
    model, calibration = random_model("llama"), random_tokens()
    space = build_space(model, SpaceRequest(space="kv", context=16))
    caches = context_of(model, space, LanguageTask(calibration), needs=())
    scorer = SCORERS[name]()
    for refused in (
        lambda: scorer.importances(caches),
        lambda: scorer.ratios(np.ones(len(space.units)), space, 0.5),
        lambda: list(scorer.losses(caches, [(0, 0)])),
    ):
        with pytest.raises(ValueError, match=f"scorer {name}: .* is a cache"):
            refused()


@pytest.mark.parametrize("name", ["arithmetic_progression", "outlier_ratio", "spectral_tail"])
def test_units_outside_blocks_get_the_mean_of_both(name):
    outlying = normal(16, 16, seed=3)
    outlying[0, :8] = 20
    blocks = [[outlying], [normal(16, 16, seed=1)], [normal(16, 48, seed=2)]]
    context = toy_context(blocks, outside=[normal(16, 16, seed=4)])
    assert [unit.depth for unit in context.space.units] == [0, 1, 2, None]
    scorer = SCORERS[name]()
    importances = scorer.importances(context)
    assert importances[3] == pytest.approx(importances[:3].mean())
    ratios = scorer.map_ratios(importances, context.space, 0.4)
    assert ratios[3] == 0.4
    assert len(set(ratios[:3])) > 1


@pytest.mark.parametrize("name", PER_BLOCK)
def test_without_blocks_there_is_nothing_to_say(name):
    context = toy_context([], outside=[normal(8, 8), normal(8, 8)])
    with pytest.raises(ValueError, match=f"scorer {name}: none of the 2 units sits in a block"):
        SCORERS[name]().importances(context)


def test_wrong_numbers_are_refused():
    context = toy_context([[normal(8, 8)], [normal(8, 8)]])
    scorer = ErdosRenyi()
    with pytest.raises(ValueError, match=r"expected 2 importances, got shape \(3,\)"):
        scorer.ratios([1, 1, 1], context.space, 0.5)
    with pytest.raises(ValueError, match=r"removed share of 0 to 1, got 1\.5"):
        scorer.ratios([1, 1], context.space, 1.5)
    broken = toy_context([[normal(8, 8) * float("nan")], [normal(8, 8)]])
    with pytest.raises(ValueError, match=r"importance of blocks\.0\.0 is nan"):
        SCORERS["magnitude"]().importances(broken)


# The first block is worth keeping, for the reason that each of them looks for.
FLAT = torch.full((16, 16), 0.1)
SPIKED = normal(16, 16)
SPIKED[0, :4] = 30
WORTHY = {
    "arithmetic_progression": ([SPIKED], [SPIKED]),
    "outlier_ratio": ([SPIKED], [normal(16, 16)]),
    "spectral_tail": (
        [with_spectrum((1 - torch.arange(32) / 32) ** -1.0)],
        [with_spectrum((1 - torch.arange(32) / 32) ** -0.2)],
    ),
    "erdos_renyi": ([normal(8, 16)], [normal(32, 32)]),
    "lamp": ([FLAT], [SPIKED]),
    "magnitude": ([3 * normal(16, 16)], [normal(16, 16)]),
    "spectrum_energy": ([with_spectrum([1.0] * 16)], [with_spectrum([1.0] + [0.01] * 15)]),
}


@pytest.mark.parametrize("name", WORTHY)
def test_what_is_worth_keeping_is_important_and_loses_less(name):
    context = toy_context(WORTHY[name])
    scorer = SCORERS[name]()
    first, second = scorer.importances(context)
    assert first > second > 0
    first, second = scorer.ratios([first, second], context.space, 0.5)
    assert first < 0.5 < second


@pytest.mark.parametrize("beta", [0.002, 0.01])
def test_arithmetic_progression_as_published(beta):
    context = toy_context([[normal(8, 8)]] * 32)
    scorer = ArithmeticProgression(beta)
    ratios = scorer.ratios(scorer.importances(context), context.space, 0.7)
    assert ratios == pytest.approx([0.7 - beta * 31 / 2 + i * beta for i in range(32)])


def test_a_beta_beyond_the_published_range_is_lowered_aloud(caplog):
    context = toy_context([[normal(8, 8)]] * 32)
    scorer = ArithmeticProgression(0.5)
    ratios = scorer.ratios(scorer.importances(context), context.space, 0.7)
    assert np.diff(ratios) == pytest.approx([0.6 / 31] * 31)  # 0.01935
    assert ratios[-1] == pytest.approx(1.0)
    assert "beta 0.5 is lowered to 0.0193548" in caplog.text
    one = toy_context([[normal(8, 8)]])
    assert scorer.ratios([1.0], one.space, 0.5) == pytest.approx([0.5])


@pytest.mark.parametrize("multiple", [1.0, 2.0, 5.0])
def test_outlier_ratio_by_its_definition(multiple):
    blocks = [[normal(6, 4, seed=s), normal(5, 8, seed=s + 9) ** 3] for s in range(3)]
    moments = [
        normal(w.shape[1], seed=40 + i) ** 2
        for i, w in enumerate(w for block in blocks for w in block)
    ]
    context = toy_context(blocks, moments=moments)
    found = OutlierRatio(multiple).importances(context)
    by_matrix = iter(moments)
    for block, importance in zip(blocks, found[::2], strict=True):
        scores = []
        for weight in block:
            moment = next(by_matrix).tolist()
            for row in weight.tolist():
                scores += [abs(w) * m**0.5 for w, m in zip(row, moment, strict=True)]
        mean = sum(scores) / len(scores)
        count = sum(score > multiple * mean for score in scores)
        assert importance == pytest.approx(max(count, 1) / len(scores))
    ratios = OutlierRatio(multiple, spread=0.1).ratios(found, context.space, 0.6)
    shares = found[::2]
    keeps = (shares - shares.min()) / np.ptp(shares) * 0.2
    # All blocks have the same size, so that the plain mean is the weighted one.
    assert ratios[::2] == pytest.approx(1 - (keeps - keeps.mean() + 0.4))


def test_outlier_ratio_of_hidden_inputs_says_what_to_do():
    context = make_context(random_model("mixtral"), random_tokens(), MENU)
    with pytest.raises(ValueError, match=r"inputs of .*experts.* exclude it"):
        OutlierRatio().importances(context)


def test_densities_of_matrices_and_kernels():
    assert density((30, 20)) == pytest.approx(50 / 600)
    assert density((64, 3, 5, 7)) == pytest.approx((64 + 3 + 5 + 7) / (64 * 3 * 5 * 7))


def test_erdos_renyi_counts_each_matrix_of_ties_and_stacks():
    model = random_model("mixtral")
    context = make_context(model, random_tokens(), MENU, needs=(), ties="vllm")
    found = dict(zip(context.space.units, ErdosRenyi().importances(context), strict=True))
    assert any(len(unit.members) > 1 for unit in found)
    assert any(member.num_matrices > 1 for unit in found for member in unit.members)
    for unit, importance in found.items():
        kept = sum(sum(m.matrix_shape) * m.num_matrices for m in unit.members)
        assert importance == pytest.approx(kept / unit.num_weights)


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0, 0.99),
)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_proportional_ratios_cap_at_dense_and_scale_the_rest(pairs, removed):
    shares, sizes = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    kept = 1 - proportional_ratios(shares, sizes, removed)
    low, high = 0.0, 1 / shares.min()
    for _ in range(200):
        factor = (low + high) / 2
        fits = sizes @ np.minimum(factor * shares, 1) < (1 - removed) * sizes.sum()
        low, high = (factor, high) if fits else (low, factor)
    assert kept == pytest.approx(np.minimum(high * shares, 1), abs=1e-9)


def influence(model, tokens):
    """Each block's influence, from the states that the model itself reports."""
    last = []
    norm = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    cosines = [[] for _ in model.model.layers]
    with torch.no_grad():
        for row in tokens:
            states = model(input_ids=row[None], output_hidden_states=True).hidden_states
            states = [*states[:-1], last.pop()]
            for place, found in enumerate(cosines):
                for a, b in zip(states[place][0], states[place + 1][0], strict=True):
                    a, b = a.double(), b.double()
                    found.append(float(a @ b / (a.norm() * b.norm())))
    norm.remove()
    return [1 - sum(found) / len(found) for found in cosines]


def test_block_influence_by_its_definition():
    model, calibration = trained()
    context = make_context(model, calibration, MENU, needs=(), num_sequences=3)
    expected = influence(model, calibration.splits["statistics"][:3])
    context.bank.swap((0,) * 42)  # it must find its way back to the dense model
    before = dict(context.meter.counts)
    found = BlockInfluence().importances(context)
    spent = context.meter.counts["statistics"] - before.get("statistics", 0)
    assert spent == 3 * 64
    assert found[::7] == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_neox", "bloom", "opt", "gemma2"])
def test_block_influence_sees_the_stream_of_every_family(family):
    context = make_context(random_model(family), random_tokens(), MENU, needs=(), num_sequences=1)
    found = BlockInfluence().importances(context)
    assert (found > 1e-3).all()
    assert (found < 2).all()


def test_a_block_that_does_nothing_has_no_influence_and_loses_most():
    model = random_model("llama")
    idle = model.model.layers[1]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    context = make_context(model, random_tokens(), MENU, needs=())
    scorer = BlockInfluence(epsilon=0.2)
    importances = scorer.importances(context)
    assert importances[0] > 0.1 > 1e-9 > importances[7] >= 0
    ratios = scorer.ratios(importances, context.space, 0.3)
    shares = np.exp(-importances[[0, 7]] / 0.2)
    assert ratios[[0, 7]] == pytest.approx(0.6 * shares / shares.sum())
    assert ratios[7] > 0.3 > ratios[0]


def test_a_mean_beyond_the_cap_lifts_it_aloud(caplog):
    space = toy_context([[normal(8, 8)]] * 4).space
    importances = [0.0, 0.1, 0.2, 0.3]
    assert BlockInfluence().ratios(importances, space, 0.5).max() == pytest.approx(0.8)
    assert "cap" not in caplog.text
    assert BlockInfluence().ratios(importances, space, 0.9).max() == pytest.approx(0.95)
    assert "cap of 0.8 is lifted to 0.95" in caplog.text


def test_block_influence_of_what_is_no_stack_of_blocks():
    context = toy_context([[normal(8, 8)], [normal(8, 8)]])
    loose = replace(context, space=replace(context.space, units=shuffled(context.space.units)))
    with pytest.raises(ValueError, match="block_influence: expected all units in one stack"):
        BlockInfluence().importances(loose)


def shuffled(units):
    """The same units as if some were in another stack."""
    moved = replace(units[1], members=(replace(units[1].members[0], module="others.1.0"),))
    return (units[0], moved)


@pytest.mark.parametrize("wrong", [{"epsilon": 0}, {"cap": 0.0}, {"cap": 1.1}])
def test_block_influence_refuses_wrong_fields(wrong):
    with pytest.raises(ValueError, match=f"block_influence: {next(iter(wrong))} must be"):
        BlockInfluence(**wrong)


def test_transposed_matrices_meet_their_own_inputs():
    """GPT-2 stores (columns, rows), and its statistics are of the columns."""
    model, calibration = random_model("gpt2"), random_tokens()
    context = make_context(model, calibration, (RoundToNearest(2, 16),))
    total, scores = 0.0, []
    for unit in context.space.units[:4]:
        member = unit.members[0]
        weight = model.get_parameter(member.name).detach().T.abs().double()
        moment = context.statistics[member.name].second_moment.double()
        scores.append((weight * moment.sqrt()).flatten())
    total = torch.cat(scores)
    share = (total > 2 * total.mean()).double().mean()
    assert OutlierRatio(2.0).importances(context)[:4] == pytest.approx([float(share)] * 4)

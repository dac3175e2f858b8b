"""Learned row thresholds and ratios: gradients, exact budgets, and what they are good for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from language import offering, random_model, random_tokens, trained
from scoring import context_of, make_context
from torch import nn
from torch.func import functional_call

from objectives.function_task import FunctionTask
from objectives.row_masks import exact_survivors, least_share, row_ranks
from objectives.sensitivity.learned_ratios import LearnedRatios
from objectives.sensitivity.learned_thresholds import LearnedThresholds, _Training
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest, RowPrune, Statistics
from search_spaces.operators.members import logical, physical
from search_spaces.operators.prune import num_pruned
from search_spaces.space import Member

MENU = (RoundToNearest(2, 16), Keep())
NEEDS = {"second_moment"}


@pytest.fixture(scope="module")
def context():
    model, calibration = trained()
    menu = (RoundToNearest(2, 32), Keep())
    return make_context(model, calibration, menu, NEEDS, num_sequences=8)


def random_context(family="llama", **wishes):
    return make_context(random_model(family), random_tokens(), MENU, NEEDS, **wishes)


def pruned_nats(context, counts):
    """Cross-entropy on text never seen, each row keeping its highest Wanda scores."""
    context.bank.restore()
    nats = 0.0
    try:
        for index, unit in enumerate(context.space.units):
            for member, dense in zip(unit.members, context.bank.dense(index), strict=True):
                weight = logical(dense, member)
                ranks = row_ranks(weight, member, context.statistics[member.name], "test")
                kept = torch.from_numpy(np.asarray(counts[member.name])).reshape(weight.shape[:2])
                masked = weight * (ranks > weight.shape[-1] - kept[..., None])
                context.model.get_parameter(member.name).data = physical(masked, member)
        with torch.no_grad():
            for index in range(8):
                nats += float(context.task.likelihood_loss(context.model, "search", index)) / 8
    finally:
        context.bank.restore()
    return nats


def even_counts(context, shares):
    """By member name, (rows,) counts of a share per unit."""
    return {
        member.name: np.full(member.shape[:-1], round(share * member.shape[-1]))
        for unit, share in zip(context.space.units, shares, strict=True)
        for member in unit.members
    }


@pytest.mark.parametrize(("columns", "dtype"), [(40, torch.int16), (40_000, torch.int32)])
def test_ranks_count_the_scores_below(columns, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, columns, generator=generator)
    moment = torch.rand(columns, generator=generator)
    member = Member("m", "w", (2, 3, columns))
    ranks = row_ranks(weight, member, Statistics(second_moment=moment), "test")
    assert ranks.dtype == dtype
    scores = weight.abs() * moment.sqrt()
    for matrix, row, place in ((0, 0, 5), (1, 2, 17), (0, 1, columns - 1)):
        below = (scores[matrix, row] < scores[matrix, row, place]).sum() + 1
        assert ranks[matrix, row, place] == below


@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.sampled_from([3, 8, 20, 33])), min_size=1),
    st.floats(0.0, 0.9),
    st.floats(0.0, 0.3),
)
@example([(0.0, 8), (1.0, 3), (1.5248437379257346e-264, 8)], 0.25, 0.0)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_survivors_meet_the_total_to_the_weight(rows, removed, floor):
    keep, columns = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    least = least_share(columns, floor)
    total = columns.sum() - num_pruned(int(columns.sum()), removed)
    if total < least * columns.sum():
        with pytest.raises(ValueError, match="outside"):
            exact_survivors(keep, columns, removed, least)
        return
    counts = exact_survivors(keep, columns, removed, least)
    assert counts.sum() == total
    assert (counts <= columns).all()
    assert (counts >= np.maximum(1, np.ceil(floor * columns - 1e-9))).all()
    for width in set(columns.tolist()):
        own = columns == width
        order = np.lexsort((counts[own], keep[own]))
        assert (np.diff(counts[own][order]) >= 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_thresholds_follow_the_gradient_of_loss_and_penalty(family):
    """Autograd through the masks, and the penalty's by its definition, against the hand-made."""
    context = random_context(family)
    wish = LearnedThresholds(removed=0.4, penalty=3.0)
    training = _Training(wish, context)
    generator = torch.Generator().manual_seed(0)
    for rows in training._rows.values():
        rows.thresholds.copy_(0.2 + 0.5 * torch.rand(rows.thresholds.shape, generator=generator))
    training._differentiate(1)
    context.bank.restore()
    thresholds, weights, soft_kept, hard_kept = {}, {}, 0.0, 0
    for name, rows in training._rows.items():
        thresholds[name] = rows.thresholds.clone().requires_grad_()
        columns = rows.dense.shape[-1]
        mask = torch.sigmoid((rows.ranks / columns - thresholds[name][..., None]) * columns)
        weights[name] = physical(rows.dense * mask, rows.member)
        soft_kept, hard_kept = soft_kept + mask.sum(), hard_kept + int((mask > 0.5).sum())

    def model(**inputs):
        return functional_call(context.model, weights, kwargs=inputs)

    model.parameters = context.model.parameters
    kept = soft_kept + (hard_kept - soft_kept).detach()
    penalty = (kept / context.space.num_weights / 0.6).log().abs()
    assert penalty > 0.01
    loss = context.task.likelihood_loss(model, "statistics", 1) + 3.0 * penalty
    for name, gradient in zip(
        thresholds, torch.autograd.grad(loss, list(thresholds.values())), strict=True
    ):
        found = training._rows[name].thresholds.grad
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_learned_rows_beat_even_ones_on_unseen_text_at_the_same_count(context):
    survivors = LearnedThresholds(removed=0.7).survivors(context)
    total = sum(int(counts.sum()) for counts in survivors.values())
    assert total == context.space.num_weights - num_pruned(context.space.num_weights, 0.7)
    even = even_counts(context, [0.3] * 42)
    assert pruned_nats(context, survivors) < pruned_nats(context, even) - 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_is_the_share_of_survivors_and_row_prune_takes_their_total(family):
    context = random_context(family)
    scorer = LearnedThresholds(removed=0.4, floor=0.1)
    survivors, shares = scorer.survivors(context), scorer.importances(context)
    assert list(survivors) == [m.name for unit in context.space.units for m in unit.members]
    for unit, share in zip(context.space.units, shares, strict=True):
        counts = survivors[unit.members[0].name]
        assert counts.shape == unit.members[0].shape[:-1]
        assert counts.min() >= math.ceil(0.1 * unit.members[0].shape[-1])
        assert counts.sum() == pytest.approx(share * unit.num_weights)
        operator = RowPrune(float(1 - share), keep_exactly=int(counts.sum()))
        assert operator.num_kept(unit.members[0].shape) == counts.sum()
        assert unit.unfit(operator) == ""
    total = context.space.num_weights
    assert sum(int(c.sum()) for c in survivors.values()) == total - num_pruned(total, 0.4)
    ratios = scorer.ratios(shares, context.space, 0.4)
    assert ratios == pytest.approx(1 - shares, abs=1 / total)


def test_hard_masks_never_lose_to_even_rows_on_their_own_text(context):
    """A rate that ruins every step leaves the start."""
    wish = LearnedThresholds(learning_rate=1e6, epochs=1)
    survivors = wish.survivors(replace(context, num_sequences=2))
    for counts in survivors.values():
        assert counts.max() - counts.min() <= 1


def test_steps_are_counted():
    context = random_context()
    tokens = context.task.tokens_per_sequence
    for scorer, forward, backward in (
        (LearnedThresholds(epochs=3), (3 + 4) * 3, 3 * 3),
        (LearnedRatios(), 2 * 3, 3),
    ):
        before = context.meter.counts.copy()
        scorer.importances(context)
        assert context.meter.counts["statistics"] - before["statistics"] == forward * tokens
        spent = context.meter.counts["statistics_backward"] - before["statistics_backward"]
        assert spent == 2 * backward * tokens


@pytest.mark.parametrize("scorer", [LearnedThresholds(), LearnedRatios()], ids=lambda s: s.name)
def test_seeds_decide_the_order_of_the_text_and_nothing_else_does(scorer):
    first, again, other = (
        scorer.importances(replace(random_context(), seed=seed)) for seed in (0, 0, 5)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_learned_ratios_beat_even_ones_on_unseen_text(context):
    removed = 0.7
    scorer = LearnedRatios(removed=removed)
    ratios = scorer.ratios(scorer.importances(context), context.space, removed)
    sizes = np.array([unit.num_weights for unit in context.space.units])
    assert ratios @ sizes == pytest.approx(removed * sizes.sum())
    even = even_counts(context, [1 - removed] * 42)
    assert (
        pruned_nats(context, even_counts(context, 1 - ratios)) < pruned_nats(context, even) - 0.05
    )


def test_matrices_that_do_not_matter_are_pruned_most():
    """Where attention's output is dropped, its queries, keys and values do nothing."""
    model = random_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    context = make_context(model, random_tokens(statistics=12), MENU, NEEDS)
    kept = LearnedRatios(penalty=5.0).importances(context)
    for depth in range(2):
        own = [
            (u.kind, k) for u, k in zip(context.space.units, kept, strict=True) if u.depth == depth
        ]
        useless = [k for kind, k in own if kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
        assert max(useless) < min(k for kind, k in own if kind in ("gate_proj", "up_proj"))


def test_units_that_share_a_choice_are_learned_together_and_ends_keep_the_target():
    context = random_context(ties="vllm", open_units=("head",))
    kept = LearnedRatios(removed=0.3).importances(context)
    names = [unit.name for unit in context.space.units]
    assert kept[names.index("lm_head")] == pytest.approx(0.7)
    tied = [len(unit.members) for unit in context.space.units]
    assert max(tied) == 3
    assert LearnedThresholds(removed=0.3).importances(context).shape == kept.shape


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_rows_are_learned_without_blocks_and_ratios_are_not():
    torch.manual_seed(0)
    model = Bare()
    batches = list(torch.randn(4, 5, 8))
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda net, batch: net(batch).square().mean(), splits)
    context = context_of(model, offering(build_space(model, SpaceRequest()), *MENU), task)
    survivors = LearnedThresholds().survivors(context)
    assert {name: counts.shape for name, counts in survivors.items()} == {
        "first.weight": (8,),
        "second.weight": (4,),
    }
    assert sum(int(counts.sum()) for counts in survivors.values()) == 48
    with pytest.raises(ValueError, match="one stack of blocks, found none or several"):
        LearnedRatios().importances(context)


def test_what_they_cannot_do_they_say():
    for kind in (LearnedThresholds, LearnedRatios):
        with pytest.raises(ValueError, match=f"{kind.name}: removed must be between 0 and 1"):
            kind(removed=1.0)
        with pytest.raises(ValueError, match=r"inputs of .*experts.* cannot be observed"):
            kind().importances(random_context("mixtral"))
        caches = random_context(space="kv", context=8)
        with pytest.raises(ValueError, match=rf"scorer {kind.name}: .* is a cache"):
            kind().importances(caches)
    with pytest.raises(ValueError, match=r"floor must be 0 to 0\.2, the share that is kept"):
        LearnedThresholds(removed=0.8, floor=0.3)
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        LearnedThresholds(epochs=0)

"""LayerIF against dense linear algebra, both ways to its inner products, and its mappings."""

import numpy as np
import pytest
import torch
from language import random_model, random_tokens
from scoring import make_context
from torch import nn

from objectives.calibration import Calibration
from objectives.function_task import FunctionTask
from objectives.influence import (
    VARIANTS,
    GradientFactors,
    _products_by_slices,
    _products_by_tokens,
    block_score,
    collect_factors,
    datainf,
    experts,
    inner_products,
)
from objectives.language_task import LanguageTask
from objectives.mappers import minmax, range_map, smooth
from objectives.sensitivity.influence import Influence
from objectives.statistics import gradient_hooks
from objectives.task import TokenMeter
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.space import Member

MENU = (RoundToNearest(2, 16), Keep())


def context_of(model, num_statistics=6, **wishes):
    return make_context(model, random_tokens(statistics=num_statistics), MENU, (), **wishes)


def materialised(model, task, names, indices):
    """By parameter name, (samples, weights) gradients."""
    found = {name: [] for name in names}
    with gradient_hooks(model, found, lambda n, g: found[n].append(g.flatten().clone())):
        for index in indices:
            task.likelihood_loss(model, "statistics", index).backward()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def dense_influences(gradients, validation):
    """(samples,) by the inverse Hessian of DataInf, written out as a matrix."""
    count, size = gradients.shape
    damping = 0.1 * gradients.square().mean(1).mean()
    inverse = torch.zeros(size, size, dtype=torch.float64)
    for gradient in gradients:
        outer = gradient[:, None] * gradient
        inverse += torch.eye(size) - outer / (damping + gradient @ gradient)
    inverse /= count * damping
    return -gradients @ (inverse @ validation)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_agree_with_the_explicit_inverse(family):
    model = random_model(family, intermediate_size=40, n_inner=40).double()
    context = context_of(model)
    scores = {variant: Influence(variant=variant).scores(context) for variant in VARIANTS}
    for depth in range(2):
        members = [m for u in context.space.units if u.depth == depth for m in u.members]
        found = materialised(model, context.task, [m.name for m in members], range(6))
        influences = torch.zeros(3, dtype=torch.float64)
        for gradients in found.values():
            influences += dense_influences(gradients[:3], gradients[3:].mean(0))
        helps = -influences
        assert scores["positive"][depth] == pytest.approx(float(helps[helps > 0].sum()), rel=1e-6)
        assert scores["all"][depth] == pytest.approx(float(helps.sum()), rel=1e-6)
        assert scores["top"][depth] == pytest.approx(float(helps.max()), rel=1e-6)  # of three
        assert scores["all"][depth] != 0


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (1, 7, 3, 2)])
def test_both_ways_give_the_products_of_the_gradients(lengths):
    generator = torch.Generator().manual_seed(0)
    samples = [
        GradientFactors(
            torch.randn(length, 6, generator=generator, dtype=torch.float64),
            torch.randn(length, 4, generator=generator, dtype=torch.float64),
        )
        for length in lengths
    ]
    flat = torch.stack([(s.output_gradients.T @ s.inputs).flatten() for s in samples])
    expected = flat[:3] @ flat.T
    for way in (_products_by_tokens, _products_by_slices):
        assert torch.allclose(way(samples, 3), expected, rtol=1e-12)
    assert torch.allclose(inner_products(samples[:3], samples[3:]), expected, rtol=1e-12)


def test_slices_of_many_rows_add_up(monkeypatch):
    monkeypatch.setattr("objectives.influence._MOST_SLICED", 24)  # two rows of two samples of six
    generator = torch.Generator().manual_seed(0)
    samples = [
        GradientFactors(
            torch.randn(3, 6, generator=generator), torch.randn(3, 5, generator=generator)
        )
        for _ in range(2)
    ]
    assert torch.allclose(
        _products_by_slices(samples, 2), _products_by_tokens(samples, 2), rtol=1e-5
    )


class Twice(nn.Module):
    """One layer called twice, one that overwrites its input's output, and one never called."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.overwrites = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.shared(self.overwrites(self.shared(x)))


def test_layers_called_twice_or_never():
    torch.manual_seed(0)
    model = Twice()
    batches = list(torch.randn(5, 3, 4))
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda net, batch: net(batch).square().mean(), splits)
    members = [Member("shared", "weight", (4, 4)), Member("idle", "weight", (4, 4))]
    meter = TokenMeter()
    found = collect_factors(model, task, members, range(5), meter=meter)
    expected = materialised(model, task, ["shared.weight"], range(5))["shared.weight"]
    products = inner_products(found["shared.weight"])
    assert torch.allclose(products, (expected @ expected.T).double(), rtol=1e-5)
    assert torch.equal(inner_products(found["idle.weight"]), torch.zeros(5, 5).double())
    assert meter.counts == {"statistics": 5, "statistics_backward": 10}
    zeros = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(datainf(torch.zeros(5, 5).double(), zeros, 16), zeros)


def test_memory_for_one_block_gives_the_same_scores_for_more_passes():
    wide, narrow = (context_of(random_model("llama")) for _ in range(2))
    scores = Influence().scores(wide)
    assert Influence(most_bytes=1).scores(narrow) == pytest.approx(scores, rel=1e-9)
    # One sequence to see how large activations are, then six for all or for each block.
    assert wide.meter.counts["statistics"] == 12 * (1 + 6)
    assert narrow.meter.counts["statistics"] == 12 * (1 + 2 * 6)
    assert narrow.meter.counts["statistics_backward"] == 2 * narrow.meter.counts["statistics"]


def test_validation_may_be_another_task():
    model, calibration = random_model("llama"), random_tokens(statistics=6)
    halves = make_context(model, calibration, MENU, ())
    tokens = dict(calibration.splits)
    tokens["statistics"] = tokens["statistics"][3:]
    second = LanguageTask(Calibration.from_tensors(tokens))
    tokens["statistics"] = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(9))
    other = LanguageTask(Calibration.from_tensors(tokens))
    first = make_context(model, calibration, MENU, (), num_sequences=3)
    scores = Influence().scores(halves)
    assert Influence(validation=second).scores(first) == pytest.approx(scores, rel=1e-9)
    assert Influence(validation=other).scores(first) != pytest.approx(scores, rel=1e-2)


def test_a_higher_score_prunes_more_unless_reversed():
    context = context_of(random_model("llama", num_hidden_layers=3))
    score = Influence().scores(context)
    blocks = [u.depth for u in context.space.units]
    sizes = [sum(u.num_weights for u in context.space.units if u.depth == d) for d in range(3)]
    expected = range_map(minmax(score), sizes, 0.5, 0.2)
    for reverse in (False, True):
        scorer = Influence(epsilon=0.2, reverse=reverse)
        importances = scorer.importances(context)
        ratios = scorer.ratios(importances, context.space, 0.5)
        by_block = np.array([ratios[blocks.index(depth)] for depth in range(3)])
        assert by_block @ sizes == pytest.approx(0.5 * sum(sizes))
        assert (importances.min(), importances.max()) == pytest.approx((0.8, 1.2))
        order = np.argsort(score)
        assert list(np.argsort(by_block)) == list(order[::-1] if reverse else order)
        if not reverse:
            assert by_block == pytest.approx(expected, abs=1e-9)


def test_seven_blocks_are_smoothed():
    context = context_of(random_model("llama", num_hidden_layers=7), num_statistics=2)
    scorer = Influence()
    blocks = [u.depth for u in context.space.units]
    importances = scorer.importances(context)
    by_block = np.array([importances[blocks.index(depth)] for depth in range(7)])
    scaled = minmax(scorer.scores(context))
    assert by_block == pytest.approx(1.3 - 0.6 * minmax(smooth(scaled)), abs=1e-9)
    assert by_block != pytest.approx(1.3 - 0.6 * scaled, abs=1e-2)


def test_variants_of_a_score():
    influences = torch.tensor([-3.0, 1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    assert [block_score(influences, v) for v in ("positive", "all", "top")] == [6.0, 4.5, 5.0]


def test_experts_follow_the_scores():
    assert experts([1.0, 2.0, 1.0], 9, beta=1.0).tolist() == [3, 4, 2]  # 1.5, 3, 1.5 besides one
    assert experts([1.0, -2.0], 11, beta=3.0).tolist() == [2, 9]
    assert experts([0.0, 0.0], 5).tolist() == [3, 2]
    scores = np.random.default_rng(0).random(32)
    counts = experts(scores, 160)
    assert counts.sum() == 160
    assert counts.min() >= 1
    assert np.all(np.diff(counts[np.argsort(scores)]) >= 0)
    with pytest.raises(ValueError, match="expert for each of 3 blocks, got 2"):
        experts([1, 2, 3], 2)
    with pytest.raises(ValueError, match="inf or NaN"):
        experts([1, float("nan")], 2)


def test_what_it_cannot_do_it_says():
    with pytest.raises(ValueError, match="variant must be positive, all, top, got 'best'"):
        Influence(variant="best")
    with pytest.raises(ValueError, match=r"epsilon must be 0 to 1, got 1\.5"):
        Influence(epsilon=1.5)
    with pytest.raises(ValueError, match="2 statistics sequences or more"):
        Influence().scores(context_of(random_model("llama"), num_statistics=1))
    with pytest.raises(ValueError, match=r"inputs of .*experts.* cannot be observed; exclude it"):
        Influence().scores(context_of(random_model("mixtral")))
    caches = context_of(random_model("llama"), space="kv", context=8)
    with pytest.raises(ValueError, match=r"scorer influence: .* is a cache"):
        Influence().scores(caches)

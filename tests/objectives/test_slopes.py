"""Slopes against gradients by hand, on every layout of parameters; what a measurement costs."""

import json

import numpy as np
import pytest
import torch
from language import MENU, assert_same_weights, offering, random_model, random_tokens, snapshot

from objectives.bank import Bank
from objectives.evaluation import Evaluation, Fidelity, evaluation_key
from objectives.evaluator import Evaluator
from objectives.function_task import FunctionTask
from objectives.language_task import LanguageTask
from objectives.multi_task import MultiTask
from objectives.representation_task import RepresentationTask
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space

OPEN = SpaceRequest(open_units=("embeddings",))
MODELS = {
    "llama": lambda: (random_model("llama"), SpaceRequest()),
    "tied": lambda: (random_model("llama", tie_word_embeddings=True), OPEN),
    "gpt2": lambda: (random_model("gpt2"), OPEN),
    "mixtral": lambda: (random_model("mixtral"), SpaceRequest()),
}
PLAIN = Fidelity("search", 1, 2)
SLOPED = Fidelity("search", 1, 2, slopes=True)


def bench(model, request, task=None):
    space = offering(build_space(model, request), *MENU)
    bank, meter = Bank(model, space), TokenMeter(num_blocks=2)
    task = task or LanguageTask(random_tokens(), top_k=0)
    return space, bank, Evaluator(model, task, bank, meter), meter


def some_assignment(space):
    rng = np.random.default_rng(5)
    return tuple(int(rng.integers(len(menu))) for menu in space.menus)


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def test_slopes_are_the_gradient_times_the_difference(case):
    model, request = case
    space, bank, evaluator, _ = bench(model, request)
    assignment = some_assignment(space)
    found = evaluator(assignment, SLOPED)
    bank.swap(assignment)
    task = LanguageTask(random_tokens(), top_k=0)
    with torch.no_grad():
        bank.restore()
        task.prepare(model, "search")
        bank.swap(assignment)
    loss = (task.loss(model, "search", 1) + task.loss(model, "search", 2)) / 2
    for unit, menu in enumerate(space.menus):
        gradients = torch.autograd.grad(loss, bank.parameters(unit), retain_graph=True)
        for option in range(len(menu)):
            expected = sum(
                float((g * (made - p.data)).sum())
                for g, made, p in zip(
                    gradients, bank.compressed(unit, option), bank.parameters(unit), strict=True
                )
            )
            assert found.slopes.nats[unit][option] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all(row[i] == 0 for row, i in zip(found.slopes.nats, assignment, strict=True))


def test_moves_compare_with_the_larger_error(case):
    model, request = case
    space, bank, evaluator, _ = bench(model, request)
    assignment = some_assignment(space)
    moves = evaluator(assignment, SLOPED).slopes.moves
    for unit, current in enumerate(assignment):
        dense = torch.cat([t.flatten() for t in bank.dense(unit)])
        made = [
            torch.cat([t.flatten() for t in bank.compressed(unit, o)])
            for o in range(len(space.menus[unit]))
        ]
        errors = [float((w - dense).square().sum()) for w in made]
        for option, weights in enumerate(made):
            square = float((weights - made[current]).square().sum())
            larger = max(errors[option], errors[current])
            expected = square / larger if larger else 0.0
            assert moves[unit][option] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        kept = len(made) - 1  # all but dense: 16 bits
        assert moves[unit][kept] == (0 if current == kept else pytest.approx(1, rel=0.05))


def test_losses_are_those_of_a_plain_measurement():
    calibration = random_tokens()
    tasks = {
        "kl": LanguageTask(calibration, top_k=0),
        "top": LanguageTask(calibration, top_k=8),
        "cross_entropy": LanguageTask(calibration, objective="cross_entropy"),
        "hidden_state": RepresentationTask(calibration),
        "several": MultiTask([LanguageTask(calibration), RepresentationTask(calibration)]),
    }
    for name, task in tasks.items():
        model, request = MODELS["llama"]()
        space, _, evaluator, _ = bench(model, request, task)
        assignment = some_assignment(space)
        plain, sloped = (evaluator(assignment, fidelity) for fidelity in (PLAIN, SLOPED))
        assert task.has_slopes, name
        assert sloped.sequence_nats == pytest.approx(plain.sequence_nats, rel=1e-4), name
        assert plain.slopes is None


def test_the_model_is_left_as_it_was_and_tokens_are_counted():
    model, request = MODELS["llama"]()
    before = snapshot(model)
    space, bank, evaluator, meter = bench(model, request)
    evaluator.prepare("search")
    evaluation = evaluator(some_assignment(space), SLOPED)
    bank.restore()
    assert_same_weights(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert meter.counts["search"] == 2 * 12
    assert meter.counts["search_backward"] == 4 * 12
    assert meter.block_counts["search_backward"] == 2 * 4 * 12
    assert evaluation.num_tokens == SLOPED.num_passes * 12 == 6 * 12


def test_compressing_anew_forgets_what_was_learned_of_distances():
    model, request = MODELS["llama"]()
    space, bank, evaluator, _ = bench(model, request)
    assignment = some_assignment(space)
    first = evaluator(assignment, SLOPED)
    bank.use_statistics({})
    assert evaluator(assignment, SLOPED) == first


def test_losses_without_a_gradient_are_refused():
    model, request = MODELS["llama"]()
    splits = {name: [0, 1, 2] for name in ("statistics", "search", "guard", "heldout")}
    constant = FunctionTask(lambda model, batch: torch.zeros(()), splits)
    space, _, evaluator, _ = bench(model, request, constant)
    with pytest.raises(ValueError, match="no gradient"):
        evaluator(some_assignment(space), SLOPED)
    constant.has_slopes = False
    space, _, evaluator, _ = bench(model, request, constant)
    with pytest.raises(ValueError, match="has no slopes"):
        evaluator(some_assignment(space), SLOPED)


def test_caches_are_refused():
    model = random_model("llama")
    space = build_space(model, SpaceRequest(space="kv", context=64))
    evaluator = Evaluator(
        model, LanguageTask(random_tokens()), Bank(model, space), TokenMeter(num_blocks=2)
    )
    with pytest.raises(ValueError, match="caches"):
        evaluator((0,) * len(space.units), SLOPED)


def test_the_journal_keeps_slopes_and_old_keys_stay():
    model, request = MODELS["llama"]()
    space, _, evaluator, _ = bench(model, request)
    evaluation = evaluator(some_assignment(space), SLOPED)
    written = json.loads(json.dumps(evaluation.to_json()))
    assert Evaluation.from_json(written) == evaluation
    plain = evaluator(some_assignment(space), PLAIN)
    assert "slopes" not in plain.to_json()
    assert plain.to_json()["fidelity"] == {"split": "search", "first": 1, "count": 2}
    assert plain.key != evaluation.key
    known = "4681d23d5946"  # of a journal written before there were slopes
    assert evaluation_key((0, 1), Fidelity("search", 0, 4))[:12] == known


def test_kept_options():
    model, request = MODELS["llama"]()
    space, _, evaluator, _ = bench(model, request)
    slopes = evaluator(some_assignment(space), SLOPED).slopes
    kept = slopes.kept([(0, 3)] * len(space.units))
    assert kept.nats[4] == (slopes.nats[4][0], slopes.nats[4][3])
    assert kept.moves[4] == (slopes.moves[4][0], slopes.moves[4][3])


def test_slopes_that_are_no_numbers_are_a_failed_measurement():
    """The square root of a norm of nothing has a loss and no gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)).eval()
    rows = [torch.randn(4, 32), torch.cat([torch.zeros(1, 32), torch.randn(3, 32)])]
    splits = ("statistics", "search", "guard", "heldout")
    task = FunctionTask(
        lambda m, x: m(x).square().sum(dim=1).sqrt().mean(), dict.fromkeys(splits, rows)
    )
    evaluate = bench(model, SpaceRequest(space="bits-g32"), task)[2]
    found = [evaluate((0,), Fidelity("search", i, 1, slopes=True)) for i in range(2)]
    assert found[0].ok
    assert found[1].error == "non-finite slope nan"
    assert not found[1].sequence_nats
    assert found[1].slopes is None
    json.dumps(found[1].to_json(), allow_nan=False)

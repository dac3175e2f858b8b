"""Language modelling as a task: what is measured, and that it does not depend on how."""

import pytest
import torch
from language import random_model, random_tokens, snapshot, trained

from objectives.language_task import LanguageTask
from search_spaces.operators import RoundToNearest

EVERY = (0, 1, 2, 3)
OBJECTIVES = pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
TOP_K = pytest.mark.parametrize("top_k", [0, 8])


def damage(model, bits=3):
    """Round every projection of a random Llama in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(RoundToNearest(bits, 16).apply(parameter, None))


@pytest.fixture
def model():
    return random_model("llama")


def prepared(model, calibration, **options):
    task = LanguageTask(calibration, **options)
    assert task.prepare(model, "search") == calibration.splits["search"].numel()
    return task


def cross_entropies(model, tokens):
    """What transformers itself says of each sequence."""
    with torch.no_grad():
        return [model(input_ids=row[None], labels=row[None]).loss.item() for row in tokens]


@OBJECTIVES
def test_losses_do_not_depend_on_batch_size_or_company(model, objective):
    calibration = random_tokens()
    tasks = [
        prepared(model, calibration, objective=objective, top_k=8, batch_size=size)
        for size in (1, 3, 16)
    ]
    damage(model)
    one, *others = [task.sequence_losses(model, "search", EVERY) for task in tasks]
    for other in others:
        assert other.nats == pytest.approx(one.nats, rel=1e-4, abs=2e-6)
        assert other.cross_entropy_nats == pytest.approx(one.cross_entropy_nats, rel=1e-5)
    part = tasks[1].sequence_losses(model, "search", (3, 1))
    assert part.nats == pytest.approx([one.nats[3], one.nats[1]], rel=1e-4, abs=2e-6)
    assert len(set(one.nats)) == 4
    assert max(one.nats) > 1e-3


@TOP_K
def test_dense_model_has_no_kl_and_a_damaged_one_has(model, top_k):
    task = prepared(model, random_tokens(), top_k=top_k, batch_size=3)
    losses = task.sequence_losses(model, "search", EVERY)
    assert losses.nats == pytest.approx([0.0] * 4, abs=1e-6)
    damage(model)
    assert min(task.sequence_losses(model, "search", EVERY).nats) > 1e-3


def test_kl_is_that_of_the_next_token_distributions():
    model, calibration = trained()
    tokens = calibration.splits["search"][:2]
    task = LanguageTask(calibration, top_k=0)
    task.prepare(model, "search")
    with torch.no_grad():
        dense = model(input_ids=tokens).logits.double().log_softmax(-1)
        damage(model)
        ours = model(input_ids=tokens).logits.double().log_softmax(-1)
    expected = (dense.exp() * (dense - ours)).sum(-1).mean(-1)
    measured = task.sequence_losses(model, "search", (0, 1)).nats
    assert measured == pytest.approx(expected.tolist(), rel=1e-4)


@OBJECTIVES
def test_cross_entropy_is_transformers_own(objective):
    model, calibration = trained()
    expected = cross_entropies(model, calibration.splits["search"])
    task = prepared(model, calibration, objective=objective)
    measured = task.sequence_losses(model, "search", range(8)).cross_entropy_nats
    assert measured == pytest.approx(expected, rel=1e-5)
    assert 2.5 < sum(measured) / 8 < 4.5, "the trained model has perplexity 26"
    alone = task.likelihood_loss(model, "search", 5).item()
    assert alone == pytest.approx(expected[5], rel=1e-5)


def test_cross_entropy_objective_is_the_increase_over_the_dense_model(model):
    calibration = random_tokens()
    dense = cross_entropies(model, calibration.splits["search"])
    task = prepared(model, calibration, objective="cross_entropy", batch_size=3)
    assert task.name == "cross_entropy"
    assert task.sequence_losses(model, "search", EVERY).nats == pytest.approx([0.0] * 4, abs=1e-6)
    damage(model)
    now = cross_entropies(model, calibration.splits["search"])
    expected = [a - b for a, b in zip(now, dense, strict=True)]
    assert task.sequence_losses(model, "search", EVERY).nats == pytest.approx(expected, abs=2e-6)
    assert max(map(abs, expected)) > 1e-3


@TOP_K
@OBJECTIVES
def test_loss_with_a_graph_is_the_measured_one(model, objective, top_k):
    """For cross-entropy its increase over the dense model's."""
    task = prepared(model, random_tokens(), objective=objective, top_k=top_k)
    damage(model)
    expected = task.sequence_losses(model, "search", EVERY).nats
    for index in EVERY:
        model.zero_grad()
        loss = task.loss(model, "search", index)
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected[index], rel=1e-4, abs=1e-5)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert max(gradient.abs().max().item() for gradient in gradients) > 1e-6


def test_measuring_changes_nothing_and_leaves_no_graph(model):
    before = snapshot(model)
    task = prepared(model, random_tokens())
    task.sequence_losses(model, "search", EVERY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prepares_a_split_once(model):
    task = prepared(model, random_tokens())
    assert task.prepare(model, "search") == 0
    assert task.prepare(model, "guard") == 2 * 12


@TOP_K
def test_teacher_cache_on_disk_serves_later_tasks(model, top_k, tmp_path):
    calibration = random_tokens()
    first = prepared(model, calibration, top_k=top_k, cache_folder=tmp_path)
    damage(model)  # a second task that ran the model now would take it for the dense one
    second = LanguageTask(calibration, top_k=top_k, cache_folder=tmp_path)
    assert second.prepare(model, "search") == 0
    losses = [task.sequence_losses(model, "search", EVERY).nats for task in (first, second)]
    assert losses[0] == losses[1]
    assert min(losses[0]) > 1e-3
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_teacher_cache_is_for_its_tokens_and_k_only(model, tmp_path):
    calibration = random_tokens()
    prepared(model, calibration, top_k=8, cache_folder=tmp_path)
    prepared(model, calibration, top_k=9, cache_folder=tmp_path)
    prepared(model, random_tokens(search=3), top_k=8, cache_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="kl or cross_entropy, got 'accuracy'"):
        LanguageTask(random_tokens(), objective="accuracy")

"""Statistics against explicit computations: one backward a sequence, inputs as captured."""

import logging
from dataclasses import replace

import pytest
import torch
from language import random_model, random_tokens
from torch import nn

from objectives.function_task import FunctionTask
from objectives.language_task import LanguageTask
from objectives.statistics import collect_statistics
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space

ALL_KINDS = ("fisher", "hessian", "second_moment", "weighted_inputs")
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
NUM_SEQUENCES, LENGTH = 3, 12


def scene(family, **request):
    """Model, task and space; the space covers every matrix that can be searched."""
    model = random_model(family)
    return model, LanguageTask(random_tokens()), build_space(model, SpaceRequest(**request))


def collect(model, task, space, *needs, meter=None):
    return collect_statistics(model, task, space, needs=needs, meter=meter or TokenMeter())


def members(space):
    return [member for unit in space.units for member in unit.members]


def as_rows(tensor, member):
    return tensor.transpose(-1, -2) if member.transposed else tensor


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@FAMILIES
def test_fisher_is_the_sum_over_sequences_of_squared_gradients(family):
    model, task, space = scene(family, open_units=("embeddings",))
    found = collect(model, task, space, "fisher")
    for member in members(space):
        parameter = model.get_parameter(member.name)
        gradients = [
            torch.autograd.grad(task.likelihood_loss(model, "statistics", i), parameter)[0]
            for i in range(NUM_SEQUENCES)
        ]
        # The gradient of a mean over tokens is a mean of gradients: times the length, per token.
        per_token = LENGTH / NUM_SEQUENCES
        expected = as_rows(sum(g.square() for g in gradients) * per_token, member)
        batched = as_rows(sum(gradients).square() * per_token / NUM_SEQUENCES, member)
        fisher = found[member.name].fisher
        assert fisher.shape == member.shape
        assert relative(fisher, expected) < 1e-6
        assert relative(fisher, batched) > 0.1, "that is the square of a batch's gradient"


@pytest.mark.parametrize("needs", [("second_moment",), ("hessian", "second_moment")])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_are_those_of_the_inputs(family, needs):
    model, task, space = scene(family)
    seen = {member.name: [] for member in members(space)}
    handles = [
        model.get_submodule(member.module).register_forward_hook(
            lambda module, inputs, output, name=member.name: seen[name].append(inputs[0])
        )
        for member in members(space)
    ]
    with torch.no_grad():
        model(input_ids=random_tokens().splits["statistics"])
    for handle in handles:
        handle.remove()
    found = collect(model, task, space, *needs)
    for member in members(space):
        inputs = torch.cat(seen[member.name]).flatten(0, -2).double()
        assert inputs.shape == (NUM_SEQUENCES * LENGTH, member.shape[1])
        hessian = inputs.T @ inputs / len(inputs)
        stats = found[member.name]
        assert relative(stats.second_moment.double(), hessian.diagonal()) < 1e-5
        if "hessian" in needs:
            assert relative(stats.hessian.double(), hessian) < 1e-5
        else:
            assert stats.hessian is None
        assert stats.fisher is None


@FAMILIES
def test_inputs_are_weighted_as_the_loss_feels_them_on_other_text(family):
    """Of the last search sequence: its inputs, times the length of the gradient by the outputs."""
    model, task, space = scene(family)
    found = collect(model, task, space, "weighted_inputs")
    seen = {}

    def watch(name):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[name] = inputs[0].detach(), output

        return hook

    handles = [
        model.get_submodule(member.module).register_forward_hook(watch(member.name))
        for member in members(space)
        if len(member.shape) == 2
    ]
    model.requires_grad_(True)
    task.likelihood_loss(model, "search", task.num_sequences("search") - 1).backward()
    for handle in handles:
        handle.remove()
    assert seen
    for name, (inputs, output) in seen.items():
        weighted = (inputs * output.grad.norm(dim=-1, keepdim=True)).flatten(0, -2).double()
        kept = found[name].weighted_inputs.double()
        assert kept.shape == weighted.shape
        assert relative(kept.T @ kept, weighted.T @ weighted) < 0.02  # bfloat16; in another order


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ((), {}),
        (("second_moment",), {"statistics": 36}),
        (("fisher",), {"statistics": 36, "statistics_backward": 72}),
        (("weighted_inputs",), {"statistics": 12, "statistics_backward": 24}),  # of other text
        (ALL_KINDS, {"statistics": 48, "statistics_backward": 96}),
    ],
)
def test_meter_counts_a_backward_as_two_forwards(needs, expected):
    meter = TokenMeter()
    found = collect(*scene("llama"), *needs, meter=meter)
    assert meter.as_dict() == expected
    assert bool(found) is bool(needs)


def test_all_kinds_at_once_equal_one_at_a_time():
    parts = scene("gpt2")
    together = collect(*parts, *ALL_KINDS)
    for kind in ALL_KINDS:
        alone = collect(*parts, kind)
        for name, stats in alone.items():
            assert torch.allclose(getattr(stats, kind), getattr(together[name], kind), rtol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_hooks_are_left_as_they_were(fails):
    """Gradients that a training loop left behind neither leak into the Fisher nor get lost."""
    model, task, space = scene("llama")
    clean = collect(model, task, space, "fisher")
    flags, gradients = {}, {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        flags[name] = number % 2 == 0
        parameter.requires_grad_(flags[name])
        parameter.grad = torch.full_like(parameter, 5.0) if number % 3 == 0 else None
        gradients[name] = parameter.grad
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if fails:
        explosive = FunctionTask(lambda model, batch: 1 / 0, same_data((0,)))
        with pytest.raises(ZeroDivisionError):
            collect(model, explosive, space, *ALL_KINDS)
    else:
        again = collect(model, task, space, *ALL_KINDS)
        for name, stats in clean.items():
            assert torch.equal(again[name].fisher, stats.fisher)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is flags[name]
        assert parameter.grad is gradients[name]
        assert parameter.grad is None or (parameter.grad == 5.0).all()
        assert torch.equal(parameter, weights[name])
        assert not parameter._post_accumulate_grad_hooks
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def same_data(batches):
    """One list of batches as all four splits."""
    return dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)


@pytest.mark.parametrize(
    ("family", "request_", "hidden"),
    [
        ("llama", {"open_units": ("embeddings",)}, {"embed_tokens"}),
        ("mixtral", {}, {"experts.gate_up_proj", "experts.down_proj"}),
    ],
)
def test_inputs_that_no_hook_can_see_are_none_and_said_so(family, request_, hidden, caplog):
    parts = scene(family, **request_)
    with caplog.at_level(logging.WARNING, logger="objectives.statistics"):
        found = collect(*parts, *ALL_KINDS)
    warned = " ".join(record.getMessage() for record in caplog.records)
    unseen = {name for name, stats in found.items() if stats.second_moment is None}
    assert unseen
    assert all(any(end in name for end in hidden) for name in unseen)
    for name in unseen:
        assert f"no input statistics for {name}" in warned
        assert found[name].hessian is None
        assert found[name].fisher is not None
    assert len(unseen) < len(found)


class HalfUsed(nn.Module):
    """A layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.used(inputs)


def test_layer_that_the_loss_ignores_has_zero_fisher(caplog):
    torch.manual_seed(0)
    model = HalfUsed()
    batches = torch.randn(2, 5, 6)
    task = FunctionTask(lambda m, b: m(b).square().mean(), same_data(batches))
    space = build_space(model, SpaceRequest())
    found = collect(model, task, space, *ALL_KINDS)
    assert torch.equal(found["idle.weight"].fisher, torch.zeros(4, 6))
    assert found["idle.weight"].second_moment is None
    assert found["used.weight"].fisher.min() > 0
    assert "the loss does not depend on idle.weight" in caplog.text


def test_function_task_counts_batches_and_averages_over_them():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 5, 6)
    task = FunctionTask(lambda m, b: m(b).square().mean(), same_data(batches))
    meter = TokenMeter()
    found = collect(model, task, build_space(model, SpaceRequest()), "fisher", meter=meter)
    weight = model[0].weight
    gradients = [torch.autograd.grad(model(b).square().mean(), weight)[0] for b in batches]
    expected = sum(g.square() for g in gradients) / 3
    assert relative(found["0.weight"].fisher, expected) < 1e-6
    assert meter.as_dict() == {"statistics": 3, "statistics_backward": 6}


@pytest.mark.parametrize(
    ("returned", "got"), [(1.0, "float"), (torch.ones(2), r"shape \[2\]"), (None, "NoneType")]
)
def test_function_that_returns_no_scalar_is_refused(returned, got):
    task = FunctionTask(lambda m, b: returned, same_data((0,)))
    with pytest.raises(ValueError, match=f"must return a scalar tensor, got {got}"):
        task.prepare(nn.Linear(2, 2), "search")


def test_progress_is_told_after_every_sequence():
    told = []
    model, task, space = scene("llama")
    collect_statistics(
        model,
        task,
        space,
        needs=("second_moment",),
        meter=TokenMeter(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_unknown_kind_is_refused():
    model, task, space = scene("llama")
    with pytest.raises(ValueError, match=r"unknown statistics \['curvature'\]; known:"):
        collect(model, task, space, "fisher", "curvature")


def test_statistics_of_tied_units_are_kept_per_parameter():
    model, task, space = scene("llama", ties="vllm")
    apart = collect(*scene("llama"), "fisher")
    together = collect(model, task, space, "fisher")
    assert together.keys() == apart.keys()
    for name, stats in together.items():
        assert torch.equal(stats.fisher, apart[name].fisher)
        assert replace(stats, fisher=None) == replace(apart[name], fisher=None)

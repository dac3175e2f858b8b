"""Hutchinson's estimate against Hessians that are written out, and where it is exact."""

from types import SimpleNamespace

import pytest
import torch
from dense_gradients import change, storable_model, with_caches
from language import random_tokens, trained
from scoring import context_of, make_context, table
from torch import nn

from objectives.evaluation import Fidelity
from objectives.function_task import FunctionTask
from objectives.sensitivity import SCORERS, hessian_trace
from objectives.sensitivity.hessian_trace import NUM_PROBES, mean_traces
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

MENU = (RoundToNearest(2, 4), RoundToNearest(4, 4), Keep())


def function_context(model, loss, batches, **options):
    """A context of any model and loss."""
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    space = build_space(model, SpaceRequest())
    return context_of(model, space, FunctionTask(loss, splits), needs=(), **options)


class Two(nn.Module):
    """Two matrices behind one another, and one that is idle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.idle = nn.Linear(8, 4, bias=False)

    def forward(self, inputs):
        return self.second(self.first(inputs).tanh())


def squared(model, batch):
    return model(batch).square().mean()


def test_is_exact_where_the_hessian_is_diagonal():
    """Signs squared are one, so that no probe is off."""
    model = Two()
    curvatures = [torch.rand(4, 8) - 0.3, torch.rand(4, 4) - 0.3]

    def loss(model, batch):
        weights = (model.first.weight, model.second.weight)
        quadratic = sum(
            (c * w.square()).sum() / 2 for c, w in zip(curvatures, weights, strict=True)
        )
        return batch * quadratic + model.first.weight.sum()

    context = function_context(model, loss, torch.tensor([1.0, 3.0]))
    names = [unit.name for unit in context.space.units]
    rows = dict(zip(names, table("hessian_trace", context), strict=True))
    for name, curvature in zip(("first", "second"), curvatures, strict=True):
        for option in range(len(rows[name])):
            (error,) = change(context, names.index(name), option).values()
            expected = 0.5 * 2.0 * curvature.double().mean() * error.square().sum()
            assert rows[name][option] == pytest.approx(expected.item(), rel=1e-5)
    assert set(rows["idle"]) == {0.0}


def test_estimate_is_within_the_error_that_theory_gives():
    """The variance of ``v' H v`` follows from the explicit Hessian of both matrices at once."""
    model = Two()
    batches = torch.randn(100, 3, 8, generator=torch.Generator().manual_seed(1))
    context = function_context(model, squared, batches)
    names = [unit.name for unit in context.space.units]
    found = mean_traces(context, 0, range(len(names)))

    def flat(vector, batch):
        first, second = torch.split(vector, [32, 16])
        weights = {"first.weight": first.view(4, 8), "second.weight": second.view(4, 4)}
        return squared(lambda x: torch.func.functional_call(model, weights, (x,)), batch)

    both = torch.cat([model.first.weight.flatten(), model.second.weight.flatten()]).detach()
    hessians = torch.stack(
        [torch.autograd.functional.hessian(lambda v, b=b: flat(v, b), both) for b in batches]
    ).double()
    for name, part in (("first", slice(0, 32)), ("second", slice(32, 48))):
        own = hessians[:, part, part]
        size = own.shape[-1]
        trace = own.diagonal(dim1=1, dim2=2).sum(-1).mean().item()
        off = own - torch.diag_embed(own.diagonal(dim1=1, dim2=2))
        others = hessians[:, part].square().sum((1, 2)) - own.square().sum((1, 2))
        variance = (2 * off.square().sum((1, 2)) + others).mean() / (len(batches) * NUM_PROBES)
        error = found[f"{name}.weight"].item() * size - trace
        assert abs(error) < 3 * variance.sqrt()
        assert variance.sqrt() < 0.2 * abs(trace), "or the test would prove nothing"
    assert found["idle.weight"].item() == 0.0


def products(model, context, sequence, parameter, signs):
    """``v' (H v)`` of a parameter by a finite difference of gradients."""
    step = 1e-3 * parameter.norm() / signs.norm()
    dense, slopes = parameter.data, []
    for sign in (1, -1):
        parameter.data = dense + sign * step * signs
        loss = context.task.likelihood_loss(model, "statistics", sequence)
        slopes.append(torch.autograd.grad(loss, parameter)[0])
    parameter.data = dense
    return signs * (slopes[0] - slopes[1]) / (2 * step)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_products_are_derivatives_of_gradients_in_every_layout(family, monkeypatch):
    """With every unit in a group of its own no other matrix adds its noise to compare with."""
    context = make_context(storable_model(family), random_tokens(statistics=1), MENU, needs=())
    drawn = []
    signs_of = hessian_trace._signs

    def remember(parameter, generator):
        drawn.append(signs_of(parameter, generator))
        return drawn[-1]

    monkeypatch.setattr(hessian_trace, "_signs", remember)
    for unit in (0, 3, len(context.space.units) - 1):
        (member,) = context.space.units[unit].members
        drawn.clear()
        found = mean_traces(context, unit, [unit])[member.name]
        assert len(drawn) == NUM_PROBES
        parameter = context.model.get_parameter(member.name)
        mean = sum(products(context.model, context, 0, parameter, v) for v in drawn) / NUM_PROBES
        stack = mean.reshape(member.num_matrices, -1).mean(-1)
        assert found.shape == (member.num_matrices,)
        assert torch.allclose(
            found, stack.double(), rtol=0.02, atol=0.02 * stack.abs().max().item()
        )


def test_losses_are_half_the_mean_trace_times_the_squared_error():
    context = make_context(storable_model("mixtral"), random_tokens(), MENU, needs=(), ties="vllm")
    units = range(len(context.space.units))
    traces = mean_traces(context, 0, units)
    rows = table("hessian_trace", context)
    assert min(traces[name].min() for name in traces) < 0, "a random model is at no minimum"
    for unit, row in zip(units, rows, strict=True):
        for option in range(3):
            total = 0.0
            for name, error in change(context, unit, option).items():
                squares = error.square().flatten(1) if error.ndim == 3 else error.square()[None]
                squares = squares.flatten(1).sum(-1)
                total += 0.5 * (traces[name] * squares).sum().item()
            assert row[option] == pytest.approx(total, rel=1e-5)
        assert row[2] == 0.0


def test_groups_of_the_space_decide_the_numbers_and_not_the_cells_asked_for(monkeypatch):
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    weights = [unit.num_weights for unit in context.space.units]
    monkeypatch.setattr(hessian_trace, "GROUP_WEIGHTS", 2 * max(weights))
    groups = hessian_trace._groups(context.space)
    assert [unit for group in groups for unit in group] == list(range(14))
    assert 2 < len(groups) < 14
    assert all(sum(weights[u] for u in group) <= 2 * max(weights) for group in groups)
    whole = table("hessian_trace", context)
    before = dict(context.meter.counts)
    some = list(SCORERS["hessian_trace"]().losses(context, [(13, 0), (12, 1)]))
    assert some == pytest.approx([whole[13][0], whole[12][1]], rel=1e-6)
    spent = {kind: n - before[kind] for kind, n in context.meter.counts.items()}
    assert spent == {"statistics": 36, "statistics_backward": 36 * (2 + 4 * NUM_PROBES)}


def test_seeds_give_other_probes():
    tables = [
        table("hessian_trace", function_context(Two(), squared, torch.randn(2, 3, 8), seed=seed))
        for seed in (0, 1)
    ]
    assert tables[0] != tables[1]


def test_predicts_the_measured_kl_of_mild_compression():
    """Its numbers claim to be nats per token, and they add up over units."""
    model, calibration = trained()
    menu = (RoundToNearest(6, 32), RoundToNearest(8, 32))
    context = make_context(model, calibration, menu, needs=(), num_sequences=8)
    rows = table("hessian_trace", context)
    for option in (0, 1):
        predicted = sum(row[option] for row in rows)
        measured = context.evaluator((option,) * 42, Fidelity("search", 0, 8)).loss_nats
        assert 1 / 2 < predicted / measured < 2
    context.bank.restore()


def test_caches_are_measured():
    context = with_caches(storable_model("llama"), random_tokens(), *MENU)
    last = len(context.space.units) - 1
    (loss,) = SCORERS["hessian_trace"]().losses(context, [(last, 0)])
    assert loss == context.caches(last, 0).nats > 0
    assert "statistics" not in context.meter.counts, "no pass is needed"


def test_model_that_cannot_be_differentiated_twice_is_refused():
    def loss(model, batch):
        states = model(batch)[None, None]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(states, states, states)[0].square().mean()

    context = function_context(Two(), loss, torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"cannot be differentiated twice .*; load it with"):
        table("hessian_trace", context)
    assert all(p.requires_grad and p.grad is None for p in context.model.parameters())


def test_attention_that_hides_its_second_derivative_is_refused():
    model = Two()
    model.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    context = function_context(model, squared, torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="flash_attention_2 has no second derivative; load"):
        table("hessian_trace", context)


def test_other_failures_pass_through():
    def loss(model, batch):
        raise RuntimeError("out of memory")

    context = function_context(Two(), loss, torch.randn(2, 3, 8))
    with pytest.raises(RuntimeError, match="out of memory"):
        table("hessian_trace", context)

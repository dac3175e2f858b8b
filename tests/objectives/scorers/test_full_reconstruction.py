"""Reconstruction by the full second moment against outputs that are computed on every token."""

import pytest
import torch
from dense_gradients import change, storable_model, with_caches
from language import random_tokens
from scoring import make_context, table

from objectives.sensitivity import SCORERS
from search_spaces.operators import Keep, RoundToNearest, Statistics
from search_spaces.operators.members import logical

MENU = (RoundToNearest(2, 16), RoundToNearest(4, 16), Keep())


def inputs_of(context):
    """By parameter name the inputs of its module over all statistics tokens, (tokens, columns)."""
    seen = {}
    handles = [
        context.model.get_submodule(member.module).register_forward_pre_hook(
            lambda module, inputs, name=member.name: seen.setdefault(name, []).append(inputs[0])
        )
        for unit in context.space.units
        for member in unit.members
    ]
    with torch.no_grad():
        for index in context.sequences:
            context.task.likelihood_loss(context.model, "statistics", index)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in found]) for name, found in seen.items()}


@pytest.mark.parametrize(("family", "ties"), [("llama", "vllm"), ("gpt2", "none")])
def test_is_the_squared_error_of_the_outputs_over_all_tokens(family, ties):
    context = make_context(
        storable_model(family), random_tokens(), MENU, needs=("hessian",), ties=ties
    )
    inputs = inputs_of(context)
    for unit, row in enumerate(table("full_reconstruction", context)):
        for option in range(3):
            total = 0.0
            errors = change(context, unit, option)
            pairs = zip(context.space.units[unit].members, context.bank.dense(unit), strict=True)
            for member, dense in pairs:
                x = inputs[member.name].double()
                outputs = x @ logical(dense, member)[0].double().T
                wrong = x @ logical(errors[member.name], member)[0].T
                total += (wrong.square().sum() / outputs.square().sum()).item()
            assert row[option] == pytest.approx(total, rel=1e-4)
        assert row[2] == 0.0


def test_sees_what_the_diagonal_misses():
    """Two inputs that are always equal: errors of opposite sign cancel, equal ones add up."""
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.0
    (member,) = context.space.units[0].members
    context.statistics[member.name] = Statistics(second_moment=torch.ones(32), hessian=hessian)
    (dense,) = context.bank.dense(0)
    losses = {}
    for sign in (1.0, -1.0):
        made = dense.clone()
        made[:, 0] += 0.5
        made[:, 1] += sign * 0.5
        context.bank.compressed = lambda unit, option, made=made: (made,)
        losses[sign] = [
            SCORERS[name]().cell(context, 0, 0)
            for name in ("full_reconstruction", "reconstruction")
        ]
    assert losses[-1.0][0] < 1e-6 < losses[1.0][0]
    assert losses[-1.0][1] == pytest.approx(losses[1.0][1])


def test_rounding_puts_no_loss_below_zero():
    """Errors in directions that no input ever has: the exact answer is zero."""
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    (member,) = context.space.units[0].members
    column = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    context.statistics[member.name] = Statistics(hessian=column @ column.T)
    (dense,) = context.bank.dense(0)
    error = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    error -= (error @ column) @ column.T / column.square().sum()
    context.bank.compressed = lambda unit, option: (dense + error,)
    assert 0.0 <= SCORERS["full_reconstruction"]().cell(context, 0, 0) < 1e-6


def test_unseen_inputs_are_refused_and_caches_are_measured():
    context = make_context(storable_model("mixtral"), random_tokens(), MENU, needs=("hessian",))
    unit = next(i for i, u in enumerate(context.space.units) if "experts" in u.name)
    with pytest.raises(ValueError, match=r"inputs of .*experts.* exclude it or use the fisher"):
        list(SCORERS["full_reconstruction"]().losses(context, [(unit, 0)]))
    cached = with_caches(storable_model("llama"), random_tokens(), *MENU)
    last = len(cached.space.units) - 1
    (loss,) = SCORERS["full_reconstruction"]().losses(cached, [(last, 0)])
    assert loss == cached.caches(last, 0).relative_error > 0

"""AutoQuantize's estimate against gradients and outputs that are held in full, and measured KL."""

import pytest
import torch
from dense_gradients import change, storable_model, with_caches
from language import random_tokens, trained
from scoring import cells_of, context_of, make_context, table
from torch import nn

from objectives.evaluation import Fidelity
from objectives.function_task import FunctionTask
from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.operators.members import logical

MENU = (RoundToNearest(2, 16), RoundToNearest(4, 16), Keep())


def traces(context):
    """For each sequence by parameter name: (tokens, columns) inputs, (tokens, rows) gradients."""
    names = [member.name for unit in context.space.units for member in unit.members]
    found = []
    for index in context.sequences:
        calls, handles = {}, []
        for name in names:

            def keep(module, inputs, output, calls=calls, name=name):
                calls[name] = inputs[0], output

            module = context.model.get_submodule(name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(keep))
        loss = context.task.likelihood_loss(context.model, "statistics", index)
        for handle in handles:
            handle.remove()
        slopes = torch.autograd.grad(loss, [calls[name][1] for name in names])
        found.append(
            {
                name: (calls[name][0].detach().flatten(0, -2), slope.flatten(0, -2))
                for name, slope in zip(names, slopes, strict=True)
            }
        )
    return found


@pytest.mark.parametrize(("family", "ties"), [("llama", "vllm"), ("gpt2", "none")])
def test_is_half_the_squared_product_of_gradients_and_output_errors(family, ties):
    context = make_context(storable_model(family), random_tokens(), MENU, needs=(), ties=ties)
    rows = table("output_gradient", context)
    sequences = traces(context)
    length = 12
    for unit, row in enumerate(rows):
        assert row[2] == 0.0
        for option in (0, 1):
            errors, total = change(context, unit, option), 0.0
            for member in context.space.units[unit].members:
                error = logical(errors[member.name], member)[0]
                for found in sequences:
                    x, slope = (part.double() for part in found[member.name])
                    # of the sum of the tokens' losses, and the mean over tokens of its square
                    total += ((length * slope) * (x @ error.T)).square().sum().item() / length
            assert row[option] == pytest.approx(0.5 * total / len(sequences), rel=1e-4)


def test_predicts_the_measured_kl_of_mild_compression():
    """Its numbers claim to be nats per token, and they add up over units."""
    model, calibration = trained()
    menu = (RoundToNearest(6, 32), RoundToNearest(8, 32))
    context = make_context(model, calibration, menu, needs=(), num_sequences=12)
    rows = table("output_gradient", context)
    for option in (0, 1):
        predicted = sum(row[option] for row in rows)
        measured = context.evaluator((option,) * 42, Fidelity("search", 0, 8)).loss_nats
        assert 1 / 2 < predicted / measured < 2
    context.bank.restore()


def test_weights_get_no_gradients_and_tokens_are_counted():
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    touched = []
    handles = [
        parameter.register_hook(lambda gradient: touched.append(gradient))
        for parameter in context.model.parameters()
    ]
    table("output_gradient", context)
    for handle in handles:
        handle.remove()
    assert not touched
    assert context.meter.as_dict() == {"statistics": 36, "statistics_backward": 72}


def test_stacks_and_embeddings_are_refused_and_caches_are_measured():
    context = make_context(
        storable_model("mixtral"), random_tokens(), MENU, needs=(), open_units=("embeddings",)
    )
    for word in ("experts", "embed"):
        unit = next(i for i, u in enumerate(context.space.units) if word in u.name)
        with pytest.raises(ValueError, match=rf"inputs of .*{word}.* cannot be observed; exclude"):
            list(SCORERS["output_gradient"]().losses(context, [(unit, 0)]))
    cached = with_caches(storable_model("llama"), random_tokens(), *MENU)
    last = len(cached.space.units) - 1
    first, loss = SCORERS["output_gradient"]().losses(cached, [(0, 0), (last, 0)])
    assert loss == cached.caches(last, 0).nats > 0
    plain = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    assert first == table("output_gradient", plain)[0][0]


class Twice(nn.Module):
    """A layer that is run twice, one that writes to its input, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.idle = nn.Linear(8, 4)

    def forward(self, inputs):
        states = self.shared(inputs)
        states += 1.0  # in place, on what would be a leaf
        return self.last(self.shared(states).tanh())


def test_layers_that_run_twice_add_up_and_those_that_never_run_are_refused():
    torch.manual_seed(0)
    model, batches = Twice(), torch.randn(2, 5, 8)
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda m, b: m(b).square().sum(-1).mean(), splits)
    space = build_space(model, SpaceRequest())
    context = context_of(model, space, task, needs=())
    names = [unit.name for unit in space.units]
    score = SCORERS["output_gradient"]().losses
    with pytest.raises(ValueError, match=r"inputs of idle.weight cannot be observed"):
        list(score(context, cells_of(context)))
    unit = names.index("shared")
    (loss,) = score(context, [(unit, 0)])
    (error,) = change(context, unit, 0).values()
    total = 0.0
    for batch in batches:
        first = model.shared(batch)
        second = model.shared(first + 1.0)
        output = model.last(second.tanh()).square().sum(-1).mean()
        slopes = torch.autograd.grad(output, [first, second])
        for x, slope in zip((batch, first + 1.0), slopes, strict=True):
            total += (slope.double() * (x.double() @ error.T)).square().sum().item()
    assert loss == pytest.approx(0.5 * total / 2, rel=1e-4)
    assert isinstance(context.task, FunctionTask)


def test_is_close_to_fisher_where_both_are_in_nats():
    """Two estimates of one number from the same text, by outputs and by weights."""
    model, calibration = trained()
    context = make_context(model, calibration, (RoundToNearest(4, 32),), needs=("fisher",))
    assert isinstance(context.task, LanguageTask)
    by_outputs, by_weights = (
        torch.tensor([row[0] for row in table(name, context)])
        for name in ("output_gradient", "fisher")
    )
    ratios = by_outputs / by_weights
    assert 0.7 < ratios.median() < 1.3
    assert ratios.min() > 0.2
    assert ratios.max() < 5

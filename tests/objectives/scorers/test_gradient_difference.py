"""AutoScheme's estimate by explicit gradients at models that are compressed as a whole."""

import logging

import pytest
import torch
from dense_gradients import change, differing, gradients_at, storable_model, with_caches
from language import random_tokens
from scoring import cells_of, context_of, make_context, table
from torch import nn

from objectives.function_task import FunctionTask
from objectives.sensitivity import SCORERS
from objectives.sensitivity.gradient_difference import uniform_options
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

TWO, FOUR, SIX = (RoundToNearest(bits, 16) for bits in (2, 4, 6))
LEAST = RoundToNearest(2, 24)  # 2.67 bits per weight, and 3, 5 and 7 those above
MENU = (TWO, FOUR, Keep())


def expected(context, assignment, unit, option):
    gradients = gradients_at(context, assignment, context.task.likelihood_loss)
    return sum(
        (gradient[name].double() * difference).abs().sum().item() / len(gradients)
        for gradient in gradients
        for name, difference in change(context, unit, option).items()
    )


@pytest.mark.parametrize(
    ("family", "request_"),
    [("llama", {"ties": "vllm", "open_units": ("embeddings",)}), ("gpt2", {}), ("mixtral", {})],
)
def test_is_the_gradient_at_the_model_in_that_format_times_the_weight_error(family, request_):
    context = make_context(storable_model(family), random_tokens(), MENU, needs=(), **request_)
    for unit, row in enumerate(table("gradient_difference", context)):
        assert row[2] == 0.0
        for option in (0, 1):
            level = (option,) * len(context.space.units)
            assert row[option] == pytest.approx(expected(context, level, unit, option), rel=1e-4)


def test_absolute_values_are_taken_of_each_weight_and_sequence():
    """The absolute value of a sum, or of the mean gradient, would be smaller."""
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    gradients = gradients_at(context, (0,) * 14, context.task.likelihood_loss)
    (row, *_) = table("gradient_difference", context)
    ((name, difference),) = change(context, 0, 0).items()
    mean = sum(g[name].double() for g in gradients) / len(gradients)
    assert row[0] > 1.2 * (mean * difference).abs().sum().item()
    assert row[0] > 5 * abs((mean * difference).sum().item())


def mixed():
    """Menus of three kinds: one lacks the operator, and one has no choice."""
    menus = {"o_proj": (Keep(),), "down_proj": (LEAST, SIX, Keep())}
    return differing(
        storable_model("llama"), random_tokens(), lambda unit: menus.get(unit.kind, MENU)
    )


def test_units_that_lack_the_operator_take_what_is_nearest_in_bytes():
    space = mixed().space
    kinds = [unit.kind for unit in space.units]
    for operator, down, others in (
        (TWO, LEAST, TWO),
        (FOUR, SIX, FOUR),
        (LEAST, LEAST, TWO),
        (SIX, SIX, FOUR),
        (Keep(), Keep(), Keep()),
    ):
        options = uniform_options(space, operator)
        for unit, kind in enumerate(kinds):
            chosen = space.menus[unit][options[unit]].operator
            assert chosen == {"o_proj": Keep(), "down_proj": down}.get(kind, others)


def test_menus_that_differ_are_measured_at_that_model():
    context = mixed()
    rows = table("gradient_difference", context)
    kinds = [unit.kind for unit in context.space.units]
    for unit, option in [(0, 0), (0, 1), (kinds.index("down_proj"), 0), (3, 0)]:
        options = uniform_options(context.space, context.space.menus[unit][option].operator)
        assignment = tuple(options[u] for u in range(len(kinds)))
        assert rows[unit][option] == pytest.approx(expected(context, assignment, unit, option))
    assert rows[kinds.index("o_proj")] == [0.0]


def test_one_pass_for_each_operator_and_none_for_dense_weights():
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    score = SCORERS["gradient_difference"]().losses
    assert list(score(context, [(0, 2), (1, 2)])) == [0.0, 0.0]
    assert context.meter.as_dict() == {}
    list(score(context, [(0, 0), (1, 0), (1, 1)]))
    assert context.meter.as_dict() == {"statistics": 72, "statistics_backward": 144}


def test_caches_stay_dense_in_the_pass_and_are_refused_as_cells():
    model, calibration = storable_model("llama"), random_tokens()
    plain = make_context(model, calibration, MENU, needs=())
    cached = with_caches(model, calibration, *MENU)
    weights, score = cells_of(plain), SCORERS["gradient_difference"]().losses
    assert list(score(cached, weights)) == list(score(plain, weights))
    with pytest.raises(ValueError, match=r"gradient_difference: .* is a cache, which has no"):
        list(score(cached, cells_of(cached)))


class HalfUsed(nn.Module):
    """A layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.used(inputs)


@pytest.mark.parametrize("name", ["gradient_difference", "kl_gradient"])
def test_layer_that_the_loss_ignores_loses_nothing_and_that_is_said(name, caplog):
    torch.manual_seed(0)
    model, batches = HalfUsed(), torch.randn(2, 5, 8)
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda m, b: m(b).square().mean(), splits)
    space = build_space(model, SpaceRequest())
    context = context_of(model, space, task, needs=())
    names = [unit.name for unit in space.units]
    with caplog.at_level(logging.WARNING):
        rows = dict(zip(names, table(name, context), strict=True))
        assert set(rows["idle"]) == {0.0}
        assert rows["used"][0] != 0.0
        assert "the loss does not depend on idle.weight" in caplog.text
        idle = [(names.index("idle"), 0)]
        assert list(SCORERS[name]().losses(context, idle)) == [0.0], "without a gradient at all"

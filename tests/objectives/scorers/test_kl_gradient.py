"""The slope of the KL at the cheapest options, by explicit gradients and by finite differences."""

import pytest
from dense_gradients import change, differing, gradients_at, storable_model, with_caches
from language import random_tokens
from scoring import cells_of, make_context, table

from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from objectives.sensitivity.gradients import holding
from search_spaces.operators import Keep, RoundToNearest

MENU = (RoundToNearest(2, 16), RoundToNearest(4, 16), Keep())


def expected(context, gradients, unit, option, base=None):
    return sum(
        (gradient[name].double() * difference).sum().item() / len(gradients)
        for name, difference in change(context, unit, option, base).items()
        for gradient in gradients
    )


@pytest.mark.parametrize(
    ("family", "request_"),
    [("llama", {"ties": "vllm", "open_units": ("embeddings",)}), ("gpt2", {}), ("mixtral", {})],
)
def test_is_the_gradient_at_the_cheapest_options_times_the_weight_error(family, request_):
    context = make_context(storable_model(family), random_tokens(), MENU, needs=(), **request_)
    if family == "llama":
        assert max(len(unit.members) for unit in context.space.units) == 3
    rows = table("kl_gradient", context)
    context.evaluator.prepare("statistics")
    cheapest = (0,) * len(context.space.units)
    gradients = gradients_at(context, cheapest, context.task.loss)
    for unit, row in enumerate(rows):
        assert row[2] == 0.0
        for option in (0, 1):
            assert row[option] == pytest.approx(
                expected(context, gradients, unit, option), rel=1e-4, abs=1e-6
            )
        # mlx-lm's own number, before its division by the size
        product = expected(context, gradients, unit, 0, base=1)
        assert row[0] - row[1] == pytest.approx(product, rel=1e-4, abs=1e-6)
    losses = [loss for row in rows for loss in row]
    assert min(losses) < 0 < max(losses)


def test_the_measured_kl_falls_by_as_much_along_a_small_part_of_an_upgrade():
    """Finite differences know nothing of gradients: sign, scale and base point are right."""
    model, calibration = storable_model("llama"), random_tokens()
    task = LanguageTask(calibration, top_k=0)
    context = make_context(model, calibration, MENU, needs=())
    rows = table("kl_gradient", context)
    task.prepare(model, "statistics")
    everything = dict.fromkeys(range(len(rows)), 0)
    step = 2e-3
    for unit in (0, 5, 12):
        low, high = (context.bank.compressed(unit, option)[0] for option in (0, 1))
        (parameter,) = context.bank.parameters(unit)
        with holding(context.bank, everything):
            parameter.data = low + step * (high - low)
            ahead = task.sequence_losses(model, "statistics", range(3)).nats
            parameter.data = low - step * (high - low)
            behind = task.sequence_losses(model, "statistics", range(3)).nats
        slope = (sum(ahead) - sum(behind)) / 3 / (2 * step)
        assert rows[unit][1] - rows[unit][0] == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_menus_that_differ_start_from_their_own_cheapest_option():
    menus = {"o_proj": (Keep(),), "down_proj": MENU[1:]}
    context = differing(
        storable_model("llama"), random_tokens(), lambda unit: menus.get(unit.kind, MENU)
    )
    rows = table("kl_gradient", context)
    gradients = gradients_at(context, (0,) * len(rows), context.task.loss)
    assert {len(row) for row in rows} == {1, 2, 3}
    for unit, row in enumerate(rows):
        assert row[0] == pytest.approx(expected(context, gradients, unit, 0), rel=1e-4)
        assert row[-1] == 0.0


def test_tokens_are_counted():
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    list(SCORERS["kl_gradient"]().losses(context, [(0, 0)]))
    assert context.meter.as_dict() == {
        "statistics": 36,
        "statistics_backward": 72,
        "teacher": 36,
    }


def test_caches_stay_dense_in_the_pass_and_are_refused_as_cells():
    model, calibration = storable_model("llama"), random_tokens()
    plain = make_context(model, calibration, MENU, needs=())
    cached = with_caches(model, calibration, *MENU)
    weights = cells_of(plain)
    score = SCORERS["kl_gradient"]().losses
    assert list(score(cached, weights)) == list(score(plain, weights))
    with pytest.raises(ValueError, match=r"kl_gradient: .* is a cache, which has no weights"):
        list(score(cached, cells_of(cached)))

"""What every scorer promises, on every unit of the trained model; a new one joins by its line.

Two of them are also held to their claims: closed forms, and Fisher's nats against measured ones.
"""

from math import isfinite

import numpy as np
import pytest
import torch
from language import assert_same_weights, random_model, random_tokens, snapshot, trained
from scoring import cells_of, make_context, table

from objectives.bank import Bank
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from objectives.sensitivity.blend import FISHER_WEIGHT
from objectives.statistics import KINDS
from objectives.task import TokenMeter
from search_spaces.operators import Keep, RoundToNearest

BITS = (2, 3, 4, 5, 6, 8)
MENU = (*(RoundToNearest(bits, 32) for bits in BITS), Keep())
CLOSED_FORMS = ("blend", "fisher", "reconstruction", "relative_error")
# Estimates of a size: one that is linear in the error may fall below zero or out of order.
SIGNED: tuple[str, ...] = (
    "hessian_trace",
    "kl_gradient",
    "marginal_perplexity",
    "one_at_a_time",
    "one_at_a_time_incumbent",
)

every_scorer = pytest.mark.parametrize("name", list(SCORERS))
closed_forms = pytest.mark.parametrize("name", CLOSED_FORMS)


@pytest.fixture(scope="module")
def context():
    model, calibration = trained()
    return make_context(model, calibration, MENU)


@pytest.fixture(scope="module")
def short():
    """Three options and four sequences: enough for what every scorer promises."""
    model, calibration = trained()
    menu = (RoundToNearest(2, 32), RoundToNearest(4, 32), Keep())
    return make_context(model, calibration, menu, num_sequences=4)


@every_scorer
def test_is_registered_under_its_own_name_and_needs_what_exists(name):
    scorer = SCORERS[name]()
    assert scorer.name == name
    assert scorer.unit
    assert scorer.needs <= KINDS


@every_scorer
def test_losses_are_finite_of_plain_type_and_rise_with_the_error(name, short):
    rows = table(name, short)
    assert [len(row) for row in rows] == [3] * 42
    losses = [loss for row in rows for loss in row]
    assert all(type(loss) is float and isfinite(loss) for loss in losses)
    assert len(set(losses)) > 42, "units and options must be told apart"
    assert name in SIGNED or all(loss >= 0 for loss in losses)
    two, four, sixteen = (sum(abs(row[option]) for row in rows) for option in range(3))
    assert two > four > 10 * sixteen


@every_scorer
def test_some_cells_are_scored_as_in_the_whole_table(name, short):
    """A run that was stopped half way asks for the rest only."""
    whole = dict(zip(cells_of(short), (x for row in table(name, short) for x in row), strict=True))
    some = [(3, 0), (3, 1), (17, 1), (40, 0)]
    losses = list(SCORERS[name]().losses(short, some))
    assert losses == pytest.approx([whole[cell] for cell in some], rel=1e-6)


@every_scorer
def test_leaves_the_model_as_it_was(name, short):
    model = short.model
    short.bank.restore()
    before = snapshot(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    table(name, short)
    short.bank.restore()
    assert_same_weights(model, before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all("forward" not in vars(module) for module in model.modules())


@closed_forms
def test_more_bits_never_lose_more(name, context):
    for row, menu in zip(table(name, context), context.space.menus, strict=True):
        assert [option.operator for option in menu] == list(MENU)
        assert row == sorted(row, reverse=True)
        assert row[0] > 10 * row[-2] > 0


@closed_forms
@pytest.mark.parametrize("lossless", [Keep(), RoundToNearest(3, 16, symmetric=False)])
def test_lossless_options_lose_nothing(name, lossless):
    """Weights that lie on the grid already: every group holds both ends of a grid of eight."""
    model = random_model("llama")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                codes = torch.randint(0, 8, parameter.shape, generator=generator).float()
                codes[:, ::16], codes[:, 1::16] = 0.0, 7.0
                parameter.copy_((codes - 3) / 16)
    context = make_context(model, random_tokens(), (lossless, RoundToNearest(2, 16)))
    for row, menu in zip(table(name, context), context.space.menus, strict=True):
        for loss, option in zip(row, menu, strict=True):
            assert (loss == 0.0) is (option.operator == lossless)


@every_scorer
def test_equal_runs_give_equal_tables(name):
    tables = [
        table(name, make_context(random_model("llama"), random_tokens(), MENU[:2], num_sequences=2))
        for _ in range(2)
    ]
    assert tables[0] == tables[1]


@every_scorer
def test_scores_from_what_it_says_it_needs(name, context):
    """Nothing else is collected in a run of its own."""
    model, calibration = random_model("gpt2"), random_tokens()
    needs = SCORERS[name].needs
    lean = make_context(model, calibration, MENU[:2], needs=needs, num_sequences=2)
    full = make_context(model, calibration, MENU[:2], num_sequences=2)
    assert table(name, lean) == pytest.approx(np.array(table(name, full)), rel=1e-5)


@closed_forms
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_transposed_and_stacked_matrices_are_read_as_their_operators_see_them(name, family):
    """A scorer that forgot the layout would meet statistics of another shape or order."""
    model = random_model(family)
    exclude = ("*experts*",) if family == "mixtral" and name == "reconstruction" else ()
    context = make_context(model, random_tokens(), MENU[:2], exclude=exclude)
    for unit, row in enumerate(table(name, context)):
        assert row == pytest.approx([closed_form(name, context, unit, i) for i in range(2)])


def closed_form(name, context, unit, option):
    """The loss by its definition, in double precision."""
    assert name in CLOSED_FORMS
    if name == "blend":
        fisher = closed_form("fisher", context, unit, option)
        relative = closed_form("relative_error", context, unit, option)
        return fisher**FISHER_WEIGHT * relative ** (1 - FISHER_WEIGHT)
    total = 0.0
    for member, parameter in zip(
        context.space.units[unit].members, context.bank.dense(unit), strict=True
    ):
        weight = parameter.transpose(-1, -2) if member.transposed else parameter
        operator = context.space.menus[unit][option].operator
        stack = weight.reshape(-1, *member.matrix_shape)
        made = torch.stack([operator.apply(matrix, None) for matrix in stack]).double()
        weight, error = stack.double(), made - stack.double()
        stats = context.statistics[member.name]
        if name == "fisher":
            total += 0.5 * (stats.fisher.double().reshape(error.shape) * error**2).sum().item()
            continue
        scale = stats.second_moment.double() if name == "reconstruction" else 1.0
        total += ((scale * error**2).sum() / (scale * weight**2).sum()).item()
    return total


def test_matrix_of_zeros_loses_nothing_of_its_energy():
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    context = make_context(model, random_tokens(), MENU[:2])
    unit = [u.name for u in context.space.units].index("model.layers.0.mlp.up_proj")
    for name in CLOSED_FORMS:
        assert table(name, context)[unit] == [0.0, 0.0]


def test_reconstruction_without_observed_inputs_says_what_to_do():
    context = make_context(random_model("mixtral"), random_tokens(), MENU[:2])
    unit = next(i for i, u in enumerate(context.space.units) if "experts" in u.name)
    with pytest.raises(ValueError, match=r"inputs of .*experts.* exclude it or use the fisher"):
        list(SCORERS["reconstruction"]().losses(context, [(unit, 0)]))


@pytest.mark.parametrize("bits", [6, 8])
def test_fisher_predicts_the_measured_kl_of_mild_compression(context, bits):
    """Its numbers claim to be nats per token, and they add up over units."""
    model, calibration = trained()
    option = BITS.index(bits)
    predicted = sum(row[option] for row in table("fisher", context))
    bank = Bank(model, context.space)
    evaluate = Evaluator(model, LanguageTask(calibration, top_k=0), bank, TokenMeter())
    measured = evaluate((option,) * 42, Fidelity("search", 0, 8)).loss_nats
    bank.restore()
    assert 1 / 3 < predicted / measured < 3

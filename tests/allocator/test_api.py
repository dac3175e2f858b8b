"""The library call on plain modules: a small classifier that was really trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from allocator import allocate
from allocator.api import AllocateOptions
from allocator.config import CapsConfig, SearchConfig
from allocator.plan import load_plan
from objectives.function_task import split_batches
from search_spaces.build import SpaceRequest, build_space

TRIALS = 12


def make_batches(count=24, size=32, seed=0):
    """Points in 16 dimensions, labelled by which of four fixed directions they follow most."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(4, 16, generator=generator)
    generator.manual_seed(seed)
    batches = []
    for _ in range(count):
        inputs = torch.randn(size, 16, generator=generator)
        batches.append((inputs, (inputs @ directions.T).argmax(1)))
    return batches


def loss(model, batch):
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def make_model():
    layers = [nn.Linear(16, 96)]
    for columns in (96, 64, 64):
        layers += [nn.ReLU(), nn.Linear(columns, 64)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 4))


def train():
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for batch in make_batches(60, 64, seed=1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model.state_dict()


TRAINED = train()


@pytest.fixture
def model():
    made = make_model()
    made.load_state_dict(TRAINED)
    return made.eval()


def options(search="model_guided", trials=TRIALS, **changes):
    return AllocateOptions(
        search=SearchConfig(name=search, batch=4, **changes), caps=CapsConfig(trials=trials)
    )


def mean_loss(model, batches):
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in batches) / len(batches)


def test_ten_lines_compress_a_classifier(model, tmp_path):
    data = make_batches()
    allocation = allocate(model, "4bpw", data=data, loss=loss, options=options())
    heldout = split_batches(data)["heldout"]
    plan = allocation.plan
    assert (
        plan.budget_bytes
        >= plan.achieved_bytes
        == sum(
            (
                tensor_bytes := plan.achieved_bytes,
                -tensor_bytes,
                plan.budget_bytes - plan.slack_bytes,
            )
        )
    )
    assert plan.bits_per_weight <= 4
    assert {unit.name for unit in plan.units} == {"0", "2", "4", "6", "8"}
    dense = mean_loss(model, heldout)
    assert dense < 0.4, "untrained it is log 4"
    allocation.apply(model)
    measured = plan.heldout_nats["returned"]
    assert mean_loss(model, heldout) - dense == pytest.approx(measured.nats, abs=1e-5)
    assert measured.nats != 0
    allocation.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_options_of_the_search_are_checked_before_the_model_is_touched(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = options("evolution", options={"num_offsprings": 2})
    with pytest.raises(ValueError, match="did you mean 'num_offspring'"):
        allocate(model, "4bpw", data=make_batches(), loss=loss, options=wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    right = options("evolution", trials=6, options={"num_offspring": 2})
    assert allocate(model, "4bpw", data=make_batches(), loss=loss, options=right).plan.search


@pytest.mark.parametrize("search", ["model_guided", "random"])
def test_model_is_left_as_it_was(model, search):
    """Weights, gradients and flags; what is not searched is rounded to 16 bits."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[2].weight.requires_grad_(False)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    allocate(model, "4bpw", data=make_batches(), loss=loss, options=options(search, trials=4))
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    for name, parameter in model.named_parameters():
        dense = TRAINED[name]
        expected = dense if name.endswith("weight") else dense.bfloat16().float()
        assert torch.equal(parameter, expected), name
        assert (parameter.grad == 1).all()
        assert parameter.requires_grad is (name != "2.weight")


def test_returned_plan_is_the_best_on_the_guard_and_bounds_hold(model):
    allocation = allocate(model, "3.5bpw", data=make_batches(), loss=loss, options=options())
    plan, outcome = allocation.plan, allocation.outcome
    guard = {name: measured.nats for name, measured in plan.guard_nats.items()}
    assert set(guard) == outcome.candidates.keys() | {"returned"}
    assert {name for name in guard if ":" not in name} == {"uniform", "dp", "search", "returned"}
    assert guard["returned"] == min(guard.values())
    assert plan.objective == "loss_increase"
    assert plan.search.num_evaluations == TRIALS
    assert plan.lower_bound_nats == pytest.approx(outcome.solution.loss)
    assert set(outcome.tables) == {
        "correlated_blend",
        "correlated_fisher",
        "fisher",
        "reconstruction",
        "relative_error",
    }
    assert outcome.spent.tokens["statistics_backward"] == 2 * outcome.spent.tokens["statistics"]
    assert outcome.spent.tokens["search"] == 4 * len({e.key for e in outcome.history.evaluations})


def test_equal_seeds_give_equal_plans(model):
    plans = []
    for seed in (0, 0, 3):  # which reads the two windows in the other order
        model.load_state_dict(TRAINED)
        found = allocate(
            model, "3.5bpw", data=make_batches(), loss=loss, options=options(seed=seed)
        )
        plans.append(found.plan)
    assert plans[0] == plans[1]
    assert plans[0].search.history_sha256 != plans[2].search.history_sha256


def test_no_plan_is_ever_over_its_budget(model):
    """Thirty budgets between the least and the most, in every notation."""
    space = build_space(model, SpaceRequest())
    least = space.least_bytes + space.overhead_bytes
    most = space.most_bytes + space.overhead_bytes
    rng = np.random.default_rng(0)
    data = split_batches(make_batches(8, 4))
    for index, size in enumerate(rng.integers(least, most + 1, size=30)):
        bits = 8 * (size - space.overhead_bytes) / space.num_weights
        text = (f"{size}", f"{size / 1000:.3f}KB", f"{bits + 0.001:.3f}bpw")[index % 3]
        chosen = options("random", trials=3, scorers=("relative_error",), scorer="relative_error")
        chosen = replace(chosen, search=chosen.search.model_copy(update={"batch": 2}))
        plan = allocate(model, text, data=data, loss=loss, options=chosen).plan
        assert plan.achieved_bytes <= plan.budget_bytes
        assert plan.searched_bytes <= plan.searched_budget_bytes
        if index % 3 < 2:
            assert plan.budget_bytes == size
        else:
            assert plan.bits_per_weight <= float(text.removesuffix("bpw"))


@pytest.mark.parametrize(
    ("budget", "data", "says"),
    [
        ("1bpw", make_batches(8), "cannot be met"),
        ("lots", make_batches(8), "'lots' is not a budget"),
        ("4bpw", make_batches(7), "at least 8 batches"),
        ("4bpw", {"search": make_batches(2)}, "splits guard, heldout, statistics have no batches"),
        ("4bpw", {**split_batches(make_batches(8)), "guard": []}, "splits guard have no batches"),
    ],
)
def test_mistakes_are_said_before_the_model_is_touched(model, budget, data, says):
    with pytest.raises(ValueError, match=says):
        allocate(model, budget, data=data, loss=loss)
    assert all(torch.equal(tensor, TRAINED[name]) for name, tensor in model.state_dict().items())


def test_loss_that_is_no_scalar_or_never_finite_is_refused(model):
    data = make_batches(8, 4)
    with pytest.raises(ValueError, match="must return a scalar tensor, got float"):
        allocate(model, "4bpw", data=data, loss=lambda m, b: loss(m, b).item())
    infinite = options(scorer="relative_error", scorers=("relative_error",))
    infinite = replace(infinite, search=infinite.search.model_copy(update={"batch": 2}))
    with pytest.raises(ValueError, match=r"no candidate could be measured.*non-finite loss nan"):
        allocate(
            model, "4bpw", data=data, loss=lambda m, b: loss(m, b) * torch.nan, options=infinite
        )


class Odd(nn.Module):
    """Convolution, batch norm, an unused layer and one weight used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.idle, self.head = nn.Linear(8, 8), nn.Linear(64, 4, bias=False)

    def forward(self, inputs):
        hidden = self.norm(self.conv(inputs[:, None])).flatten(1).relu()
        return self.head(self.second(self.first(hidden).relu()))


def test_modules_with_buffers_ties_and_unused_layers():
    torch.manual_seed(0)
    model, data = Odd().eval(), make_batches(16, 8)
    chosen = options("random", trials=6, scorer="fisher", scorers=("fisher", "relative_error"))
    allocation = allocate(model, "5bpw", data=data, loss=loss, options=chosen)
    plan = allocation.plan
    assert {unit.name for unit in plan.units} == {"first", "idle", "head"}
    assert "norm.num_batches_tracked" in {tensor.name for tensor in plan.fixed}
    heldout = split_batches(data)["heldout"]
    dense = mean_loss(model, heldout)
    allocation.apply(model)
    assert model.second.weight is model.first.weight
    increase = mean_loss(model, heldout) - dense
    assert increase == pytest.approx(plan.heldout_nats["returned"].nats, abs=1e-5)

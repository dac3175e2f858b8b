"""Swapping by reference: the dense model comes back bit for bit, whatever happened in between."""

import gc
import math
import weakref
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from language import (
    MENU,
    assert_same_weights,
    offering,
    random_model,
    random_tokens,
    snapshot,
)

from objectives.bank import Bank
from objectives.evaluation import Fidelity, round_significant
from objectives.evaluator import Evaluator
from objectives.language_task import LanguageTask
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest, Statistics
from search_spaces.operators.members import logical
from search_spaces.space import SearchSpace, build_menu

ALL = Fidelity("search", 0, 4)
OPEN = SpaceRequest(open_units=("embeddings",))
TIED = {"tie_word_embeddings": True}
# Plain, tied with the embedding as a unit, transposed (and tied), stacked experts.
MODELS = {
    "llama": lambda: (random_model("llama"), SpaceRequest()),
    "tied": lambda: (random_model("llama", **TIED), OPEN),
    "gpt2": lambda: (random_model("gpt2"), OPEN),
    "mixtral": lambda: (random_model("mixtral"), SpaceRequest()),
}


@dataclass(frozen=True)
class Poison(Keep):
    """Fills a matrix with one number, or fails."""

    value: float = 0.0
    name: ClassVar[str] = "poison"

    def apply(self, weight, stats):
        if self.value == 0.0:
            raise RuntimeError("no such kernel")
        return torch.full_like(weight, self.value)


class CountingBank(Bank):
    """Counts what it compresses."""

    made = 0

    def make(self, unit, operator):
        self.made += 1
        return super().make(unit, operator)


def bench(model, request, operators=MENU, **options):
    """Space, bank, evaluator and meter of a model."""
    space = offering(build_space(model, request), *operators)
    bank, meter = Bank(model, space, **options), TokenMeter()
    evaluator = Evaluator(model, LanguageTask(random_tokens(), top_k=0), bank, meter)
    return space, bank, evaluator, meter


def random_assignments(space, count, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(int(rng.integers(len(menu))) for menu in space.menus) for _ in range(count)]


def places(model):
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def test_restores_the_very_same_tensors_after_many_swaps(case):
    model, request = case
    before, at = snapshot(model), places(model)
    space, bank, evaluator, _ = bench(model, request)
    seen = {evaluator(assignment, ALL).loss_nats for assignment in random_assignments(space, 12)}
    assert len(seen) == 12
    assert places(model) != at
    bank.restore()
    assert places(model) == at
    assert_same_weights(model, before)


def test_swap_puts_each_option_where_it_belongs(case):
    """Against the operator on every single matrix of every layout."""
    model, request = case
    dense = snapshot(model)
    space, bank, *_ = bench(model, request)
    for assignment in random_assignments(space, 3):
        bank.swap(assignment)
        for unit, operator in zip(space.units, space.operators(assignment), strict=True):
            for member in unit.members:
                now = logical(model.get_parameter(member.name).detach(), member)
                for matrix, swapped in zip(logical(dense[member.name], member), now, strict=True):
                    assert torch.equal(swapped, operator.apply(matrix, None))
    fixed = {tensor.name for tensor in space.fixed}
    assert all(torch.equal(model.get_parameter(name), dense[name]) for name in fixed)


def test_swap_touches_only_units_that_differ(case):
    model, request = case
    space, bank, *_ = bench(model, request)
    first = (1,) * len(space.units)
    bank.swap(first)
    for unit, described in enumerate(space.units):
        before = places(model)
        bank.swap((*first[:unit], 0, *first[unit + 1 :]))
        after = places(model)
        assert {name for name in before if before[name] != after[name]} == {
            member.name for member in described.members
        }
        bank.swap(first)
        assert places(model) == before


def test_tied_embeddings_are_one_unit_seen_by_both_ends():
    model, request = MODELS["tied"]()
    space, bank, *_ = bench(model, request)
    (unit,) = (i for i, u in enumerate(space.units) if u.kind == "embeddings")
    dense = model.model.embed_tokens.weight.detach().clone()
    bank.swap(tuple(0 if i == unit else 3 for i in range(len(space.units))))
    for end in (model.model.embed_tokens, model.lm_head):
        assert torch.equal(end.weight, MENU[0].apply(dense, None))
    bank.restore()
    assert torch.equal(model.lm_head.weight, dense)


@pytest.mark.parametrize("most_bytes", [0, 5_000, 20_000])
def test_little_memory_changes_no_result(most_bytes):
    results = []
    for options in ({}, {"most_bytes": most_bytes}):
        model = random_model("llama")
        space, _, evaluator, _ = bench(model, SpaceRequest(), **options)
        results.append([evaluator(a, ALL) for a in random_assignments(space, 4)])
    assert results[0] == results[1]


def test_bank_keeps_what_was_used_last_up_to_its_cap():
    model = random_model("llama")
    space = offering(build_space(model, SpaceRequest()), *MENU)
    unit = next(i for i, u in enumerate(space.units) if u.kind == "gate_proj")
    size = model.get_parameter(space.units[unit].members[0].name).nbytes
    bank = CountingBank(model, space, most_bytes=2 * size)
    kept = [weakref.ref(bank.compressed(unit, option)[0]) for option in (0, 1)]
    bank.compressed(unit, 0)
    assert bank.made == 2
    bank.compressed(unit, 2)  # drops option 1, which was used before option 0
    gc.collect()
    assert [ref() is not None for ref in kept] == [True, False]
    bank.compressed(unit, 0)
    assert bank.made == 3
    bank.compressed(unit, 1)
    assert bank.made == 4


def test_swap_compresses_nothing_but_what_differs():
    model = random_model("llama")
    space = offering(build_space(model, SpaceRequest()), *MENU)
    bank = CountingBank(model, space, most_bytes=0)
    bank.swap((0,) * len(space.units))
    assert bank.made == len(space.units)
    bank.swap((0,) * (len(space.units) - 1) + (2,))
    assert bank.made == len(space.units) + 1


def test_option_larger_than_the_cap_is_made_but_not_kept():
    model = random_model("llama")
    space = offering(build_space(model, SpaceRequest()), *MENU)
    bank = CountingBank(model, space, most_bytes=100)
    assert torch.equal(bank.compressed(0, 1)[0], bank.compressed(0, 1)[0])
    assert bank.made == 2


def test_equal_assignments_measure_equal_whatever_came_between():
    model = random_model("llama")
    space, _, evaluator, _ = bench(model, SpaceRequest())
    one, *others = random_assignments(space, 4)
    first = evaluator(one, ALL)
    for other in others:
        evaluator(other, ALL)
    assert evaluator(one, ALL) == first


def test_evaluation_holds_rounded_losses_in_the_order_of_the_fidelity():
    model = random_model("llama")
    space, _, evaluator, meter = bench(model, SpaceRequest())
    assignment = (0,) * len(space.units)
    whole = evaluator(assignment, ALL)
    part = evaluator(assignment, Fidelity("search", 3, 2))
    assert part.sequence_nats == pytest.approx(whole.sequence_nats[3:] + whole.sequence_nats[:1])
    assert len(whole.sequence_cross_entropy_nats) == 4
    values = whole.sequence_nats + whole.sequence_cross_entropy_nats
    assert all(value == round_significant(value) for value in values)
    assert (whole.num_tokens, part.num_tokens) == (4 * 12, 2 * 12)
    check = int(2.5 * 4 * 12)  # once, whether forward passes may be shared
    assert meter.as_dict() == {"check": check, "search": 6 * 12, "teacher": 4 * 12}


def test_split_first_used_while_swapped_is_compared_with_the_dense_model():
    fidelity = Fidelity("guard", 0, 2)
    results = []
    for warm in (False, True):
        model = random_model("llama")
        space, _, evaluator, _ = bench(model, SpaceRequest())
        assignment = (0,) * len(space.units)
        if warm:
            evaluator(assignment, ALL)
        results.append(evaluator(assignment, fidelity))
    assert results[0] == results[1]
    assert results[0].loss_nats > 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_option_that_is_not_finite_is_refused_even_where_attention_would_hide_it(value):
    model = random_model("llama")
    before = snapshot(model)
    space, bank, evaluator, _ = bench(model, SpaceRequest(), (Poison(value=value), MENU[0]))
    query = next(i for i, unit in enumerate(space.units) if unit.kind == "q_proj")
    fine = (0,) * len(space.units)
    reference = evaluator(fine, ALL)
    with pytest.raises(ValueError, match=r"q_proj\.weight under .* is not finite"):
        evaluator((*fine[:query], 1, *fine[query + 1 :]), ALL)
    assert evaluator(fine, ALL) == reference
    bank.restore()
    assert_same_weights(model, before)


@pytest.mark.parametrize("value", [1e38])
def test_candidate_with_a_non_finite_loss_has_failed_and_harms_no_other(value):
    model = random_model("llama")
    before = snapshot(model)
    space, bank, evaluator, _ = bench(model, SpaceRequest(), (Poison(value=value), MENU[0]))
    fine = (0,) * len(space.units)
    labels = [option.operator.name for option in space.menus[0]]
    assert labels == ["round_to_nearest", "poison"]
    reference = evaluator(fine, ALL)
    last = next(i for i, unit in reversed(list(enumerate(space.units))) if unit.kind == "down_proj")
    bad = evaluator((*fine[:last], 1, *fine[last + 1 :]), ALL)
    assert not bad.ok
    assert bad.error is not None
    assert "non-finite loss" in bad.error
    assert bad.sequence_nats == ()
    assert bad.loss_nats == math.inf
    assert bad.num_tokens == 4 * 12
    assert evaluator(fine, ALL) == reference
    bank.restore()
    assert_same_weights(model, before)


def test_failure_in_the_middle_of_a_swap_or_forward_can_be_restored():
    model = random_model("llama")
    before, at = snapshot(model), places(model)
    space, bank, evaluator, _ = bench(model, SpaceRequest(), (Poison(), MENU[0]))
    fine = (0,) * len(space.units)
    reference = evaluator(fine, ALL)
    middle = len(space.units) // 2
    with pytest.raises(RuntimeError, match="no such kernel"):
        evaluator((*fine[:middle], 1, *fine[middle + 1 :]), ALL)
    assert evaluator(fine, ALL) == reference

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator(fine, ALL)
    handle.remove()
    assert evaluator(fine, ALL) == reference
    bank.restore()
    assert places(model) == at
    assert_same_weights(model, before)


def test_assignment_of_another_space_is_refused_before_anything_is_swapped():
    model = random_model("llama")
    space, bank, *_ = bench(model, SpaceRequest())
    at = places(model)
    for assignment in ((0,), (9,) * len(space.units)):
        with pytest.raises(ValueError, match=r"expected 14 choices|has 4 options"):
            bank.swap(assignment)
    assert places(model) == at


def test_units_of_several_members_swap_together():
    model = random_model("llama")
    untied = build_space(model, SpaceRequest(ties="vllm"))
    assert max(len(unit.members) for unit in untied.units) == 3
    menus = tuple(build_menu(unit, (RoundToNearest(4, 16), Keep())) for unit in untied.units)
    space = SearchSpace("tied", untied.units, menus, untied.fixed, untied.ties)
    bank, before = Bank(model, space), snapshot(model)
    bank.swap((0,) * len(space.units))
    for unit in space.units:
        for member in unit.members:
            expected = RoundToNearest(4, 16).apply(before[member.name], None)
            assert torch.equal(model.get_parameter(member.name), expected)
    bank.restore()
    assert_same_weights(model, before)


def test_new_statistics_reach_the_weights_and_what_is_kept_of_forward_passes():
    found = []
    for scales in ((0.0, 1.0), (1.0,)):
        model = random_model("llama")
        space = build_space(model, SpaceRequest(space="sparsity"))
        bank = Bank(model, space)
        evaluate = Evaluator(model, LanguageTask(random_tokens()), bank, TokenMeter(2))
        names = [member.name for unit in space.units for member in unit.members]
        for scale in scales:  # pruned by magnitude, or by inputs that grow along the columns
            bank.use_statistics(
                {
                    name: Statistics(1 + scale * torch.arange(model.get_parameter(name).shape[1]))
                    for name in names
                }
            )
            nats = evaluate(tuple(1 for _ in space.units), ALL).sequence_nats
        found.append(nats)
    assert found[0] == found[1]

"""Published one-shot plans of a trained model: exact in bytes, and true to their ratios."""

import numpy as np
import pytest
from language import trained
from scoring import context_of

from allocator.ratio_plans import published_plan, removed_ratios
from objectives.language_task import LanguageTask
from objectives.sensitivity import SCORERS
from objectives.sensitivity.arithmetic_progression import ArithmeticProgression
from objectives.sensitivity.importance import ImportanceScorer
from objectives.sensitivity.outlier_ratio import OutlierRatio
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import GPTQ, Keep, Prune, RoundToNearest, SparseGPT
from search_spaces.operators.members import pack_unit
from search_spaces.space import SearchSpace, build_menu

OURS = [name for name in SCORERS if issubclass(SCORERS[name], ImportanceScorer)]


@pytest.fixture(scope="module", params=["sparsity", "bits"])
def context(request):
    model, calibration = trained()
    space = build_space(model, SpaceRequest(space=request.param))
    return context_of(model, space, LanguageTask(calibration), num_sequences=2)


def packed_bytes(context, plan):
    """What the chosen options weigh when they are really made."""
    total = 0
    for place, operator in enumerate(context.space.operators(plan)):
        unit, dense = context.space.units[place], context.bank.dense(place)
        tensors = pack_unit(dense, unit, operator, context.statistics)
        total += sum(tensor.nbytes for tensor in tensors.values())
    return total


@pytest.mark.parametrize("name", OURS)
def test_plans_fill_their_budget_to_the_byte_and_never_exceed_it(name, context):
    scorer, space = SCORERS[name](), context.space
    importances = scorer.importances(context)
    steps = [np.diff([option.bytes for option in menu]).max() for menu in space.menus]
    for share in (0.2, 0.45, 0.7):
        budget = int(space.least_bytes + share * (space.most_bytes - space.least_bytes))
        plan = published_plan(scorer, importances, space, budget)
        assert 0 <= budget - space.bytes(plan) < max(steps)
    assert packed_bytes(context, plan) == space.bytes(plan)


def test_equal_importances_give_the_uniform_plan(context):
    scorer, space = OutlierRatio(), context.space
    for option in (1, 3, 5):
        uniform = (option,) * len(space.units)
        plan = published_plan(scorer, np.ones(42), space, space.bytes(uniform))
        assert plan == uniform


def test_ratios_are_asked_for_at_the_mean_that_fills_the_budget(context):
    asked = []

    class Asked(OutlierRatio):
        def map_ratios(self, importances, space, removed):
            asked.append(removed)
            return super().map_ratios(importances, space, removed)

    space = context.space
    for option in (1, 3, 5):
        budget = space.bytes((option,) * len(space.units))
        published_plan(Asked(), np.arange(42), space, budget)
        assert asked.pop() == pytest.approx(removed_ratios(space)[0][option], abs=0.01)


def test_plans_follow_the_ratios(context):
    scorer, space = ArithmeticProgression(beta=0.06), context.space
    budget = (space.least_bytes + space.most_bytes) // 2
    plan = published_plan(scorer, scorer.importances(context), space, budget)
    removed = removed_ratios(space)
    lost = np.array([row[i] for row, i in zip(removed, plan, strict=True)]).reshape(6, 7).mean(1)
    assert (np.diff(lost) >= 0).all()
    assert lost[-1] - lost[0] == pytest.approx(5 * 0.06, abs=0.1)


def test_a_budget_below_the_least_is_refused(context):
    with pytest.raises(ValueError, match="no assignment fits"):
        published_plan(ArithmeticProgression(), np.arange(42), context.space, 1000)


def offered(*operators):
    """One menu for all units of the trained model."""
    model, _ = trained()
    space = build_space(model, SpaceRequest())
    menus = tuple(build_menu(unit, operators) for unit in space.units)
    return SearchSpace(space.name, space.units, menus, space.fixed)


def test_pure_prunings_remove_their_sparsity_and_all_else_bytes():
    sparse = removed_ratios(offered(Prune(0.75), SparseGPT(0.5, n=2, m=4), Keep()))
    assert all(sorted(row) == [0.0, 0.5, 0.75] for row in sparse)
    int4 = RoundToNearest(4)
    quantized = removed_ratios(offered(Prune(0.5, values=int4), Prune(0.5), Keep()))
    assert all(len(set(row)) == 3 for row in quantized)
    mixed = offered(Prune(0.5, values=int4), Prune(0.5), GPTQ(3), Keep())
    for unit, menu, row in zip(mixed.units, mixed.menus, removed_ratios(mixed), strict=True):
        assert row == pytest.approx([1 - o.bytes / (2 * unit.num_weights) for o in menu])
        assert len(set(row)) == 4

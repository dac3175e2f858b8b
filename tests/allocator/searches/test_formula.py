"""Expressions against numpy by hand, their guard rails, and the search that finds them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from allocator.searches.expression import POST, PRE, REDUCTIONS, Formula
from allocator.searches.formula import FormulaOptions, FormulaSearch, Layers
from objectives.mappers import spread_map

from .zoo import drive, get_animal

SAMPLES = [np.array([0.1, 0.2, 0.4, 0.9]), np.array([0.5, 0.6, 0.7, 3.0]), np.full(4, 0.25)]


def statistics(*stages, **fields):
    pre, reduction, post = stages
    return Formula(pre, reduction, post, **fields).statistics(SAMPLES)


def test_published_examples_by_hand():
    found = statistics(("abs_log",), "variance", ("atan", "asin"))
    expected = [np.arctan(np.log(sample).var()) for sample in SAMPLES]
    assert found == pytest.approx([np.arcsin(value) for value in expected])
    assert statistics(("abs",), "variance", ("identity",)) == pytest.approx(
        [sample.var() for sample in SAMPLES]
    )


@pytest.mark.parametrize(
    ("reduction", "by_hand"),
    [
        ("frobenius", np.linalg.norm),
        ("l1_mean", lambda v: np.abs(v).mean()),
        ("geometric_mean", lambda v: np.prod(np.abs(v)) ** (1 / len(v))),
        ("mean", np.mean),
        ("identity", np.mean),
        ("variance", np.var),
        ("std", np.std),
        ("entropy", lambda v: -sum(p * np.log(p) for p in v / v.sum())),
    ],
)
def test_reductions_by_hand(reduction, by_hand):
    assert statistics((), reduction, ("identity",)) == pytest.approx([by_hand(s) for s in SAMPLES])


def test_without_a_reduction_the_post_operators_act_on_every_value():
    found = statistics((), "identity", ("exp",))
    assert found == pytest.approx([np.exp(sample).mean() for sample in SAMPLES])
    assert statistics((), "mean", ("exp",)) == pytest.approx([np.exp(s.mean()) for s in SAMPLES])


def test_pre_operators_by_hand():
    assert statistics(("z_score", "square"), "mean", ("identity",))[:2] == pytest.approx([1, 1])
    assert statistics(("minmax",), "mean", ("identity",))[0] == pytest.approx(0.375)
    assert statistics(("sigmoid",), "mean", ("identity",))[2] == pytest.approx(
        1 / (1 + np.exp(-0.25))
    )


def test_every_chain_gives_a_number_or_infinity_and_warns_of_nothing():
    samples = [np.array([0.0, 1e-8, 5.0, 900.0]), np.array([0.5, 0.6, 0.7, 3.0])]
    for pre in PRE:
        for reduction in REDUCTIONS:
            for post in POST:
                found = Formula((pre,), reduction, (post,)).statistics(samples)
                assert found.shape == (2,)
                assert not np.isnan(found).any()


def test_what_is_no_number_counts_as_zero_and_infinity_is_refused():
    assert statistics((), "mean", ("exp", "asin"))[0] == 0
    formula = Formula(("log",), "mean", ("identity",))
    zeros = [np.array([0.0, 1.0]), np.array([1.0, 2.0])]
    assert np.isinf(formula.statistics(zeros)[0])
    with pytest.raises(ValueError, match="infinite"):
        formula.ratios(zeros, 0.5)


@pytest.mark.parametrize("sign", [-1, 1])
def test_ratios_are_the_spread_mapper_in_both_signs(sign):
    formula = Formula((), "mean", ("identity",), sign=sign, spread=0.1)
    means = [sample.mean() for sample in SAMPLES]
    found = formula.ratios(SAMPLES, 0.6)
    assert found == pytest.approx(spread_map(means, 0.6, 0.1, sign=sign))
    assert found.mean() == pytest.approx(0.6)
    assert np.argmax(found) == (np.argmax(means) if sign < 0 else np.argmin(means))


def test_ratios_keep_the_floor_and_their_mean():
    found = Formula((), "mean", ("identity",), spread=0.5).ratios(SAMPLES, 0.2)
    assert found.min() == pytest.approx(0.01)
    assert found.mean() == pytest.approx(0.2)


def test_formula_is_its_json():
    formula = Formula(("abs", "log"), "std", ("tanh", "exp"), sign=1, spread=0.2, group="unit")
    assert Formula.from_json(json.loads(json.dumps(formula.to_json()))) == formula
    assert str(formula) == "+(abs - log - std - tanh - exp), spread 0.2, by unit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": ("abs",) * 3}, "0 to 2 operators as pre"),
        ({"pre": ("gram",)}, "got gram"),
        ({"reduction": "determinant"}, "as reduction"),
        ({"post": ()}, "1 to 2 operators as post"),
        ({"sign": 0}, "sign of -1 or 1"),
        ({"spread": 0.7}, "spread up to 0.5"),
        ({"group": "row"}, "block or unit"),
    ],
)
def test_what_is_no_formula_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Formula((), "mean", ("identity",)), **changes)


def test_blocks_pool_their_units_by_size():
    animal = get_animal("plain")
    importances = (np.full(8, 1.0), np.full(8, 2.0), *animal.setting.importances[2:])
    depths = (0, 0, *(1 + depth for depth in animal.setting.depths[2:]))
    importances = tuple(np.resize(sample, 8) for sample in importances)
    setting = replace(animal.setting, importances=importances, depths=depths)
    samples, members = Layers(setting).groups["block"]
    sizes = [float(cost.max()) for cost in setting.problem.bytes[:2]]
    share = sizes[0] / sum(sizes)
    assert members[0] == members[1] == 0
    assert set(samples[0]) == {1.0, 2.0}
    assert (samples[0] == 1.0).mean() == pytest.approx(share, abs=1 / 16 + 1e-9)


def test_units_outside_the_blocks_are_groups_of_their_own():
    setting = get_animal("ragged").setting
    _, members = Layers(setting).groups["block"]
    embedding = setting.depths.index(-1)
    assert (members == members[embedding]).sum() == 1
    for unit, depth in enumerate(setting.depths):
        same = [u for u, other in enumerate(setting.depths) if other == depth]
        assert (members[same] == members[unit]).all()


def test_search_needs_importances():
    setting = get_animal("plain").setting
    with pytest.raises(ValueError, match="formula needs importances"):
        FormulaSearch(replace(setting, importances=()))
    with pytest.raises(ValueError, match="samples of one size"):
        FormulaSearch(replace(setting, importances=setting.importances[1:]))
    with pytest.raises(ValueError, match="samples of one size"):
        FormulaSearch(replace(setting, importances=(np.ones(3), *setting.importances[1:])))


def test_examples_come_first_and_the_formula_gives_the_best_that_is_no_start():
    animal = get_animal("plain")
    search = FormulaSearch(animal.setting, FormulaOptions(groups=("block",)))
    assert search.formula is None
    layers = Layers(animal.setting)
    history = drive(search, animal.measure, 60, 4)
    examples = [
        Formula(("abs_log",), "variance", ("atan", "asin")),
        Formula(("abs",), "variance", ("identity",)),
    ]
    drawn = [e.assignment for e in history if e.assignment not in animal.setting.starts]
    assert drawn[0] in [layers.assignment(example) for example in examples]
    assert search.formula.group == "block"
    assert layers.assignment(search.formula) in drawn


def test_what_is_found_on_one_model_serves_another():
    """On an animal of another size the formula alone beats its plan, which the table misleads."""
    animal, other = get_animal("plain"), get_animal("whole")
    search = FormulaSearch(animal.setting)
    drive(search, animal.measure, 80, 4)
    assert animal.true_loss(search.best) < 0.9
    saved = Formula.from_json(json.loads(json.dumps(search.formula.to_json())))
    assignment = Layers(other.setting).assignment(saved)
    problem = other.setting.problem
    assert problem.total_bytes(assignment) <= problem.budget_bytes
    assert other.true_loss(assignment) < 0.95


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="at least one random formula"):
        FormulaOptions(num_parents=0)
    with pytest.raises(ValueError, match="groups of"):
        FormulaOptions(groups=("row",))

"""LAMP and magnitude: one cut for all matrices, and the additive losses that it minimises."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from language import random_model, random_tokens
from scoring import make_context, table
from toys import MENU, normal, toy_context

from objectives.sensitivity import SCORERS
from objectives.sensitivity.lamp import Lamp, Magnitude
from search_spaces.operators import Keep, Prune

MATRICES = [normal(4, 3), 5 * normal(2, 7, seed=1) ** 3, 0.2 * normal(5, 5, seed=2)]

both = pytest.mark.parametrize("name", ["lamp", "magnitude"])


def slow_scores(name, weight):
    """The score of every weight, by the definition."""
    squares = sorted(weight.double().square().flatten().tolist())
    if name == "magnitude":
        return squares
    return [square / sum(squares[rank:]) for rank, square in enumerate(squares)]


def slow_cut(name, matrices, num_removed):
    """Weights that each matrix loses when the lowest scores of all go."""
    scored = [(s, i) for i, weight in enumerate(matrices) for s in slow_scores(name, weight)]
    gone = [index for _, index in sorted(scored)[:num_removed]]
    return [gone.count(index) for index in range(len(matrices))]


@both
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_ratios_are_those_of_the_global_cut(name, share):
    context = toy_context([[weight] for weight in MATRICES])
    scorer = SCORERS[name]()
    ratios = scorer.ratios(scorer.importances(context), context.space, share)
    sizes = [weight.numel() for weight in MATRICES]
    expected = slow_cut(name, MATRICES, round(share * sum(sizes)))
    assert len(set(ratios)) == 3
    # The cut lies between weights, and so do the numbers of weights below it.
    assert ratios * sizes == pytest.approx(expected, abs=1.5)


@both
def test_large_matrices_are_cut_between_the_ranks_that_are_kept(name):
    matrices = [normal(90, 80), normal(70, 100, seed=1) ** 3]
    context = toy_context([matrices])
    scorer = SCORERS[name]()
    sizes = np.array([7200, 7000])
    found = scorer.ratios(scorer.importances(context), context.space, 0.6) * sizes
    assert found == pytest.approx(slow_cut(name, matrices, 8520), abs=2)


@both
def test_importance_is_what_half_would_keep(name):
    context = toy_context([[weight] for weight in MATRICES])
    scorer = SCORERS[name]()
    importances = scorer.importances(context)
    assert importances == pytest.approx(1 - scorer.ratios(importances, context.space, 0.5))


@both
def test_the_cut_is_the_best_of_its_table(name):
    """Every way to prune two matrices, tried: none with as many zeros has a smaller loss."""
    matrices = [normal(4, 4, seed=5), 3 * normal(4, 4, seed=6) ** 3]
    menu = (*(Prune(k / 16, pattern="matrix") for k in range(16)), Keep())
    context = toy_context([[weight] for weight in matrices], menu=menu)
    losses = [
        {option.operator: loss for option, loss in zip(options, row, strict=True)}
        for options, row in zip(context.space.menus, table(name, context), strict=True)
    ]
    for num_removed in range(31):
        best = min(
            (losses[0][menu[a]] + losses[1][menu[b]], (a, b))
            for a, b in product(range(16), repeat=2)
            if a + b == num_removed
        )
        # LAMP never removes the last weight of a matrix, whose score is 1; nor does the menu.
        if max(cut := slow_cut(name, matrices, num_removed)) < 16:
            assert list(best[1]) == cut


def test_tables_by_their_definitions():
    model = random_model("mixtral")
    context = make_context(model, random_tokens(), MENU, needs=())
    rows = table("lamp", context), table("magnitude", context)
    stacked = 0
    for unit, lamp, magnitude in zip(context.space.units, *rows, strict=True):
        place = context.space.units.index(unit)
        (dense,), (made,) = context.bank.dense(place), context.bank.compressed(place, 0)
        shape = (-1, *unit.members[0].matrix_shape)
        weight, error = dense.double().reshape(shape), (made - dense).double().reshape(shape)
        lost = error.square().sum((1, 2)) / weight.square().sum((1, 2))
        stacked += len(weight) > 1
        assert lamp[0] == pytest.approx(sum(-log(1 - x) for x in lost.tolist()))
        assert magnitude[0] == pytest.approx(float(error.square().sum()))
        assert 1e-2 > magnitude[-1] > lamp[-1] > 0  # the 16 bits of keep
    assert stacked


def test_matrices_of_zeros_go_first_and_lose_nothing():
    zeros = torch.zeros(4, 4)
    context = toy_context([[zeros], [normal(4, 4)]], menu=(Prune(0.5), Keep()))
    for scorer in (Lamp(), Magnitude()):
        first, second = scorer.ratios(scorer.importances(context), context.space, 0.5)
        assert first > 0.9
        assert second < 0.1
        assert list(scorer.losses(context, [(0, 0)])) == [0.0]


def test_an_error_as_large_as_the_matrix_is_a_large_loss_but_finite():
    context = toy_context([[normal(4, 4)]], menu=(Prune(1.0), Prune(0.75), Keep()))
    gone, most, _ = table("lamp", context)[0]
    assert most < gone < 30


def test_ratios_need_the_scorer_that_measured():
    context = toy_context([[weight] for weight in MATRICES])
    importances = Lamp().importances(context)
    with pytest.raises(ValueError, match=r"scorer lamp: .* call importances of the same scorer"):
        Lamp().ratios(importances, context.space, 0.5)

from __future__ import annotations

import numpy as np
import pytest
import torch

from allocator.problem import Status
from allocator.row_allocation import RowCurves, allocate_rows
from search_spaces.operators import GGUFBlock, RoundToNearest, RowPrune, Statistics
from search_spaces.operators.row_prune import kept_counts, row_losses, weight_losses

SHAPES = ((24, 64), (40, 32), (8, 100))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def matrices(shapes=SHAPES):
    """Weights whose rows and matrices differ in scale."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (rows, columns) in enumerate(shapes):
        scale = torch.exp(torch.randn(rows, 1, generator=generator)) / (index + 1)
        weight = torch.randn(rows, columns, generator=generator) * scale
        made.append((weight, Statistics(second_moment=torch.rand(columns, generator=generator))))
    return made


def curves_of(made, shares, score="wanda"):
    return [
        RowCurves(
            f"m{index}",
            tuple(weight.shape),
            row_losses(
                weight_losses(score, weight, stats), kept_counts(weight.shape[1], shares)
            ).numpy(),
        )
        for index, (weight, stats) in enumerate(made)
    ]


def total_loss(made, operators):
    """What the operators really drop, by the score's own loss."""
    losses = 0.0
    for (weight, stats), operator in zip(made, operators, strict=True):
        mask, _ = operator.select(weight, stats)
        losses += float(weight_losses(operator.score, weight, stats)[~mask].double().sum())
    return losses


def bytes_of(made, operators):
    return sum(o.bytes(tuple(w.shape)) for (w, _), o in zip(made, operators, strict=True))


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8])
def test_joint_rows_lose_least_at_the_bytes_of_equal_sparsity(sparsity):
    made = matrices()
    alone = [RowPrune(sparsity) for _ in made]
    budget = bytes_of(made, alone)
    joint = allocate_rows(
        curves_of(made, SHARES), SHARES, budget_bytes=budget, rule=RowPrune(sparsity)
    )
    assert joint.bytes == bytes_of(made, joint.operators) <= budget
    # Short by less than the largest step of a row: 0.2 of 100 weights.
    assert budget - joint.bytes < 2 * 20
    for counts, operator, (weight, _) in zip(joint.counts, joint.operators, made, strict=True):
        assert counts.sum() == operator.keep_exactly == operator.num_kept(tuple(weight.shape))
        assert set(counts.tolist()) <= set(kept_counts(weight.shape[1], SHARES))
        assert operator.sparsity == pytest.approx(1 - counts.sum() / weight.numel())
    assert joint.sparsities == tuple(operator.sparsity for operator in joint.operators)
    # The operator splits the same total at least as well as the menu's steps did.
    found = total_loss(made, joint.operators)
    assert found <= joint.solution.loss * (1 + 1e-6)
    assert found < total_loss(made, alone)


def test_an_operator_reproduces_the_joint_solution_of_its_matrix():
    made = matrices(((12, 20), (9, 20)))
    shares = [kept / 20 for kept in range(1, 21)]  # every number of weights is on the menu
    budget = bytes_of(made, [RowPrune(0.6), RowPrune(0.6)])
    joint = allocate_rows(
        curves_of(made, shares), shares, budget_bytes=budget, rule=RowPrune(0.0, floor=0.3)
    )
    assert joint.solution.status is Status.OPTIMAL
    assert joint.bytes == budget
    for (weight, stats), operator, counts in zip(made, joint.operators, joint.counts, strict=True):
        mask, _ = operator.select(weight, stats)
        assert mask.sum(1).tolist() == counts.tolist()
        assert operator.floor == 0.05


def test_quantized_values_stay_within_the_budget():
    made = matrices()
    rule = RowPrune(0.5, values=RoundToNearest(4, 16))
    budget = bytes_of(made, [rule] * 3)
    joint = allocate_rows(curves_of(made, SHARES), SHARES, budget_bytes=budget, rule=rule)
    assert 0.9 * budget < joint.bytes <= budget
    assert {operator.values for operator in joint.operators} == {RoundToNearest(4, 16)}


def test_what_does_not_fit_is_refused():
    made = matrices()
    curves, rule = curves_of(made, SHARES), RowPrune(0.5)
    with pytest.raises(
        ValueError, match=r"budget is 900 bytes, but keeping 0\.1 of every row takes"
    ):
        allocate_rows(curves, SHARES, budget_bytes=900, rule=rule)
    for shares in ((), (0.0, 0.5), (0.5, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="shares must ascend within 0 to 1"):
            allocate_rows(curves, shares, budget_bytes=10**6, rule=rule)
    with pytest.raises(ValueError, match=r"m0 has losses \(24, 8\), expected .* 24 rows and 2 sh"):
        allocate_rows(curves, (0.5, 1.0), budget_bytes=10**6, rule=rule)
    with pytest.raises(ValueError, match="only the split 'water'"):
        allocate_rows(curves, SHARES, budget_bytes=10**6, rule=RowPrune(0.5, "trim"))


def test_values_that_rows_cannot_store_are_refused():
    rule = RowPrune(0.5, values=GGUFBlock("q8_0"))
    assert rule.values.unfit((1, 7))
    with pytest.raises(ValueError, match="7 weights cannot be stored as"):
        allocate_rows(curves_of(matrices(), SHARES), SHARES, budget_bytes=10**6, rule=rule)


def test_shares_are_rounded_up_but_for_floating_point():
    assert kept_counts(30, [0.05, 0.1, 0.34, 1.0]) == [2, 3, 11, 30]
    assert np.diff(kept_counts(7, SHARES)).min() >= 0

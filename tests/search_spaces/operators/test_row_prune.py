from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.operators import Keep, RoundToNearest, RowPrune, Statistics
from search_spaces.operators.row_prune import (
    _prefix_outputs,
    exact_counts,
    project_counts,
    row_losses,
    weight_losses,
)


def matrix(rows, columns, seed=0, spread=1.0):
    """Rows of unlike scales, correlated inputs, and what the calibration text would say of them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(rows, 1, generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * scale
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(200, columns, generator=generator) @ (mixing + torch.eye(columns))
    hessian = inputs.T @ inputs / len(inputs)
    stats = Statistics(
        second_moment=hessian.diagonal().clone(),
        hessian=hessian,
        fisher=torch.rand(rows, columns, generator=generator),
    )
    return weight, stats, inputs


def cosine(weight, mask, inputs):
    """Of all dense and pruned outputs taken together, in float64."""
    dense = inputs.double() @ weight.double().T
    pruned = inputs.double() @ (weight * mask).double().T
    return float((dense * pruned).sum() / (dense.norm() * pruned.norm()))


def uniform(weight, stats, num_kept):
    """Equal counts, the odd ones to the first rows, by Wanda's score."""
    rows = len(weight)
    counts = torch.full((rows,), num_kept // rows)
    counts[: num_kept % rows] += 1
    scores = weight.abs() * stats.second_moment.sqrt()
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts[:, None]


@pytest.mark.parametrize(
    ("sparsity", "bits"), [(0.5, 9.0), (0.6, 7.4), (0.7, 5.8), (0.8, 4.2), (0.9, 2.6), (0.0, 16)]
)
def test_bits_per_weight_of_a_bitmap_are_those_of_the_total(sparsity, bits):
    for split in ("water", "trim"):
        size = RowPrune(sparsity, split).bytes((4096, 4096))
        assert 8 * size / 4096**2 == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize("split", ["water", "trim"])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.77, 0.99, 1.0])
def test_total_is_exact_and_no_row_goes_below_the_floor(split, sparsity):
    weight, stats, _ = matrix(13, 29)
    operator = RowPrune(sparsity, split)
    mask, kept = operator.select(weight, stats)
    total = 13 * 29 - math.floor(13 * 29 * sparsity + 0.5)
    assert int(mask.sum()) == total == operator.num_kept((13, 29))
    assert int(mask.sum(1).min()) >= min(math.ceil(0.05 * 29), total // 13)
    assert torch.equal(kept, weight)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fisher", "factored_fisher"])
def test_water_is_the_split_of_least_loss(score):
    weight, stats, _ = matrix(4, 6)
    losses = weight_losses(score, weight, stats)
    menus = row_losses(losses, range(7)).double().numpy()
    for total in (5, 9, 12, 20):
        operator = RowPrune(0.0, score=score, floor=0.3, keep_exactly=total)
        mask, _ = operator.select(weight, stats)
        least = min(2, total // 4)
        best = min(
            sum(menus[row][count] for row, count in enumerate(counts))
            for counts in itertools.product(range(least, 7), repeat=4)
            if sum(counts) == total
        )
        assert float(losses[~mask].double().sum()) == pytest.approx(best, rel=1e-6)
        assert int(mask.sum(1).min()) >= least


def test_losses_are_squared_scores_and_fisher_estimates_as_they_are():
    weight, stats, _ = matrix(3, 5)
    squared = weight.square()
    expected = {
        "magnitude": squared,
        "wanda": squared * stats.second_moment,
        "fisher": squared * stats.fisher / 2,
        "factored_fisher": squared
        * stats.second_moment
        * stats.fisher.mean(1, keepdim=True)
        / stats.second_moment.mean()
        / 2,
    }
    for score, losses in expected.items():
        torch.testing.assert_close(weight_losses(score, weight, stats), losses)


def test_a_factored_fisher_is_the_fisher_where_it_has_rank_one():
    weight, stats, _ = matrix(5, 8)
    rank_one = replace(stats, fisher=torch.linspace(0.1, 1, 5)[:, None] * stats.second_moment)
    torch.testing.assert_close(
        weight_losses("factored_fisher", weight, rank_one),
        weight_losses("fisher", weight, rank_one),
    )


def test_row_losses_sum_what_is_dropped():
    losses = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
    found = row_losses(losses, [0, 1, 2, 3])
    assert found.dtype == torch.float32
    assert found.tolist() == [[6, 3, 1, 0], [5, 0, 0, 0]]


def test_water_gives_strong_rows_more_and_ties_to_the_first():
    weight = torch.ones(4, 8)
    weight[3] = 0.01
    mask, _ = RowPrune(0.5, score="magnitude", floor=0.125).select(weight, Statistics())
    assert mask.sum(1).tolist() == [8, 6, 1, 1]
    assert mask[1].tolist() == [True] * 6 + [False] * 2


def test_floor_and_exact_totals_can_be_set():
    weight, stats, _ = matrix(6, 20, spread=3.0)
    counts = {
        floor: RowPrune(0.7, floor=floor).select(weight, stats)[0].sum(1) for floor in (0.0, 0.2, 1)
    }
    assert int(counts[0.0].min()) < 4 <= int(counts[0.2].min())
    assert counts[1].tolist() == [6] * 6  # the floor of all is lowered to an even share
    exact = RowPrune(0.7, keep_exactly=37)
    assert int(exact.select(weight, stats)[0].sum()) == 37
    assert exact.bytes((6, 20)) == 2 * 37 + 15
    assert exact.unfit((6, 6)) == "keeps 37 weights of a matrix that has 36"
    assert not exact.unfit((6, 20))


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (9, 40), (3, 70)])
def test_prefix_outputs_agree_with_direct_products(rows, columns, monkeypatch):
    monkeypatch.setattr("search_spaces.operators.row_prune._MOST_GATHERED", 600)  # several chunks
    weight, stats, inputs = matrix(rows, columns, seed=columns)
    order = weight.abs().argsort(dim=1, descending=True)
    found = _prefix_outputs(weight, stats.hessian, order)
    rank = order.argsort(dim=1)
    dense = inputs.double() @ weight.double().T
    for count in range(columns + 1):
        pruned = inputs.double() @ (weight * (rank < count)).double().T
        products, squares = (dense * pruned).mean(0), pruned.square().mean(0)
        torch.testing.assert_close(found.products[:, count], products, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.squares[:, count], squares, rtol=1e-4, atol=1e-4)
        counts = torch.full((rows,), count)
        if count:
            mask = rank < count
            assert float(found.quality(counts)) == pytest.approx(
                cosine(weight, mask, inputs), abs=1e-5
            )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.8])
def test_trim_is_never_worse_than_uniform(seed, sparsity):
    weight, stats, inputs = matrix(24, 48, seed=seed)
    operator = RowPrune(sparsity, "trim")
    mask, _ = operator.select(weight, stats)
    start = uniform(weight, stats, operator.num_kept((24, 48)))
    assert cosine(weight, mask, inputs) >= cosine(weight, start, inputs) - 1e-6


def test_trim_gains_where_some_rows_are_nearly_empty():
    weight, stats, inputs = matrix(16, 64, spread=0.0)
    weight[::2, 8:] *= 1e-3  # eight weights say all that these rows do
    operator = RowPrune(0.7, "trim")
    mask, _ = operator.select(weight, stats)
    start = uniform(weight, stats, operator.num_kept((16, 64)))
    assert cosine(weight, mask, inputs) > cosine(weight, start, inputs) + 0.02
    counts = mask.sum(1)
    assert int(counts[::2].max()) < int(counts[1::2].min())


def published_loop(weight, inputs, order, target, rate):
    """TRIM's own loop for one learning rate, truncation and recentring included."""
    columns = weight.shape[1]
    dense = weight @ inputs
    sparsity = np.full(len(weight), target)

    def outputs(sparsity):
        mask = np.ones_like(weight, dtype=bool)
        for row, count in enumerate((columns * sparsity).astype(int)):
            mask[row, order[row, : max(count, 0)]] = False
        return (weight * mask) @ inputs, int(mask.sum())

    def cos(one, other):
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        return (one * other).sum(-1) / (norms + 1e-8)

    pruned, kept = outputs(sparsity)
    best = cos(dense.ravel(), pruned.ravel()), kept
    for _ in range(10):
        quality = cos(dense, pruned)
        change = (quality - quality.min()) / (np.ptp(quality) + 1e-6) * 2 * rate
        sparsity = np.clip(sparsity + change - change.mean(), 0, 0.95)
        sparsity = sparsity - sparsity.mean() + target
        pruned, kept = outputs(sparsity)
        best = max(best, (cos(dense.ravel(), pruned.ravel()), kept))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_trim_reaches_what_the_published_loop_reaches(seed):
    weight, stats, inputs = matrix(32, 64, seed=seed, spread=0.3)
    weight[:8, 16:] *= 0.05
    order = (weight.abs() * stats.second_moment.sqrt()).argsort(dim=1).numpy()
    rates = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
    arrays = weight.double().numpy(), inputs.T.double().numpy(), order
    published, kept = max(published_loop(*arrays, 0.625, rate) for rate in rates)
    # As many weights as the truncated counts really kept, which is what sparsity 0.625 is not.
    mask, _ = RowPrune(0.625, "trim", keep_exactly=kept).select(weight, stats)
    assert cosine(weight, mask, inputs) >= published - 2e-3
    plain = cosine(weight, uniform(weight, stats, kept), inputs)
    assert published > plain + 0.01  # there is something to reach


def test_trim_keeps_the_uniform_start_where_rows_are_alike():
    weight = torch.ones(6, 10)
    stats = Statistics(second_moment=torch.ones(10), hessian=torch.eye(10))
    mask, _ = RowPrune(0.45, "trim").select(weight, stats)
    assert mask.sum(1).tolist() == [6, 6, 6, 5, 5, 5]


def test_a_row_of_zeros_is_pruned_first_by_trim():
    weight, stats, _ = matrix(8, 40, spread=0.0)
    weight[3] = 0.0
    mask, _ = RowPrune(0.6, "trim").select(weight, stats)
    assert int(mask.sum(1).argmin()) == 3


@st.composite
def boxes(draw):
    """Wanted counts, a box and a total that the box can hold."""
    rows = draw(st.integers(1, 8))
    most = draw(st.integers(1, 20))
    least = draw(st.integers(0, most))
    total = draw(st.integers(rows * least, rows * most))
    wanted = draw(st.lists(st.floats(-30, 50), min_size=rows, max_size=rows))
    return torch.tensor(wanted, dtype=torch.float64), total, least, most


@settings(derandomize=True, deadline=None, max_examples=200)
@given(box=boxes())
def test_projection_shifts_and_clips_to_the_exact_total(box):
    wanted, total, least, most = box
    projected = project_counts(wanted, total, least, most)
    assert float(projected.sum()) == pytest.approx(total, abs=1e-9)
    assert least <= float(projected.min()) <= float(projected.max()) <= most
    inside = (projected > least) & (projected < most)
    shifts = (projected - wanted)[inside]
    if len(shifts):
        torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts), rtol=0, atol=1e-9)
    counts = exact_counts(projected, total, least, most)
    assert int(counts.sum()) == total
    assert least <= int(counts.min()) <= int(counts.max()) <= most
    assert float((counts - projected).abs().max()) < 1 + 1e-9


@settings(derandomize=True, deadline=None, max_examples=200)
@given(box=boxes())
def test_counts_are_exact_whatever_is_wanted(box):
    wanted, total, least, most = box
    counts = exact_counts(torch.stack([wanted, wanted.flip(0)]), total, least, most)
    assert counts.sum(1).tolist() == [total, total]
    assert least <= int(counts.min()) <= int(counts.max()) <= most


def test_remainders_decide_and_equal_ones_go_by_index():
    wanted = torch.tensor([1.2, 2.7, 3.7, 0.4], dtype=torch.float64)
    assert exact_counts(wanted, 8, 0, 9).tolist() == [1, 3, 4, 0]
    assert exact_counts(wanted, 7, 0, 9).tolist() == [1, 3, 3, 0]
    assert exact_counts(torch.full((4,), 1.5, dtype=torch.float64), 6, 0, 9).tolist() == [
        2,
        2,
        1,
        1,
    ]


def test_labels_differ_and_needs_follow_the_fields():
    int4 = RoundToNearest(4, 64)
    labels = {
        RowPrune(0.5): "rows-wanda0.5",
        RowPrune(0.5, floor=0.1): "rows-wanda0.5-floor0.1",
        RowPrune(0.5, keep_exactly=77): "rows-wanda0.5=77",
        RowPrune(0.5, "trim", "fisher", int4): "trim-fisher0.5+int4-g64",
    }
    assert {operator: operator.label for operator in labels} == labels
    assert RowPrune(0.5, score="magnitude").needs == set()
    assert RowPrune(0.5).needs == {"second_moment"}
    assert RowPrune(0.5, "trim", "fisher").needs == {"fisher", "hessian"}
    assert RowPrune(0.5, score="factored_fisher").needs == {"fisher", "second_moment"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.1}, "sparsity must be 0 to 1, got 1.1"),
        ({"split": "even"}, "split must be water or trim, got 'even'"),
        (
            {"score": "snip"},
            "score must be one of magnitude, wanda, .*, factored_fisher, got 'snip'",
        ),
        ({"floor": -0.1}, "floor must be 0 to 1, got -0.1"),
        ({"keep_exactly": -1}, "keep_exactly must be >= 0, got -1"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=f"row_prune: {message}"):
        RowPrune(**{"sparsity": 0.5, "values": Keep(), **fields})


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        (RowPrune(0.5), "second_moment"),
        (RowPrune(0.5, score="fisher"), "fisher"),
        (RowPrune(0.5, "trim", "magnitude"), "hessian"),
    ],
)
def test_missing_statistics_are_named(operator, kind):
    with pytest.raises(ValueError, match=f"row_prune needs the {kind}"):
        operator.apply(torch.ones(2, 3), Statistics())


@pytest.mark.parametrize("kind", ["second_moment", "hessian"])
def test_statistics_that_are_not_finite_are_refused(kind):
    weight, stats, _ = matrix(4, 6)
    bad = getattr(stats, kind).clone()
    bad[..., 2] = torch.nan
    with pytest.raises(ValueError, match="inf or NaN"):
        RowPrune(0.5, "trim").select(weight, replace(stats, **{kind: bad}))

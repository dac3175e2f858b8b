"""Compositions against slow references in numpy, worked byte values, and nests of any depth."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from search_spaces.operators import (
    GPTQ,
    Keep,
    LowRankPlus,
    LowRankSparseColumns,
    Prune,
    ResidualStack,
    RoundToNearest,
    Statistics,
    operator_from_json,
    operator_to_json,
)
from search_spaces.operators.decomposition import factor_statistics, relative_scales, truncated_svd

NONE = Statistics()
HALF = Keep("float16")
INT3 = RoundToNearest(3)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spectrum(rows, columns, decay=0.9, seed=0):
    """A matrix whose singular values fall by a factor each."""
    number = min(rows, columns)
    left = torch.linalg.qr(random(rows, number, seed=seed))[0]
    right = torch.linalg.qr(random(columns, number, seed=seed + 1))[0]
    return left * 10 * decay ** torch.arange(number) @ right.T


def statistics(rows, columns, seed=0):
    """Inputs of very different sizes, correlated; a Fisher of very different rows and columns."""
    inputs = random(400, columns, seed=seed) * random(columns, seed=seed + 1).mul(1.5).exp()
    inputs = inputs @ (torch.eye(columns) + 0.1 * random(columns, columns, seed=seed + 2))
    fisher = random(rows, columns, seed=seed + 3).square()
    fisher *= random(rows, 1, seed=seed + 4).exp() * random(columns, seed=seed + 5).exp()
    return Statistics(inputs.square().mean(0), inputs.T @ inputs / 400, fisher)


def svd(matrix, rank):
    """The best approximation of a rank, in float64 numpy."""
    left, values, right = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).float()


def bits_per_weight(operator, rows, columns):
    return 8 * operator.bytes((rows, columns)) / (rows * columns)


# Worked byte values


@pytest.mark.parametrize(
    ("shape", "bits"),
    [((4096, 4096), 1.125), ((4096, 14336), 1.080), ((1024, 4096), 1.3125), ((8192, 28672), 1.040)],
)
def test_a_level_costs_what_bitstack_says(shape, bits):
    sizes = [ResidualStack(levels).bytes(shape) for levels in range(1, 17)]
    rows, columns = shape
    assert sizes == [
        levels * (rows * columns // 8 + 2 * 16 * (rows + columns)) for levels in range(1, 17)
    ]
    assert bits_per_weight(ResidualStack(1), *shape) == pytest.approx(bits, abs=5e-4)
    assert ResidualStack(3, scaled=True).bytes(shape) == sizes[2] + 2 * columns


def test_a_stack_of_sixteen_levels_is_larger_than_dense():
    assert bits_per_weight(ResidualStack(16), 4096, 4096) == 18


def test_published_sizes_of_low_rank_and_something():
    svd_quant = LowRankPlus(32, RoundToNearest(4), smoothing=0.5)
    m = n = 3072
    assert svd_quant.bytes((m, n)) == m * n // 2 + 2 * m * n // 64 + 2 * 32 * (m + n) + 2 * n
    assert bits_per_weight(svd_quant, m, n) - 8 * 2 * n / (m * n) == pytest.approx(4.583, abs=5e-4)
    lost = LowRankSparseColumns(256, 64 / 4096)
    assert lost.bytes((4096, 4096)) == 2 * 256 * 8192 + 2 * 4096 * 64 + 2 * 64
    assert bits_per_weight(lost, 4096, 4096) - 8 * 128 / 4096**2 == 2.25
    factors = LowRankPlus(64, RoundToNearest(4), RoundToNearest(8, 0))
    seven_billion = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    weights = sum(rows * columns for rows, columns in seven_billion)
    for operator, bits in ((LowRankPlus(64, RoundToNearest(4)), 0.395), (factors, 0.198)):
        extra = sum(operator.bytes(s) - RoundToNearest(4).bytes(s) for s in seven_billion)
        assert 8 * extra / weights == pytest.approx(bits, abs=3e-3)


def test_indices_of_wide_matrices_take_four_bytes():
    narrow, wide = (LowRankSparseColumns(1, 1.0).layout((1, 2**16 + extra)) for extra in (0, 1))
    assert [tensors[-1].dtype for tensors in (narrow, wide)] == ["U16", "I32"]
    matrix = random(1, 2**16 + 1)
    packed = LowRankSparseColumns(1, 1.0, kept=HALF).pack(matrix, NONE)
    assert packed["indices"].dtype == torch.int32
    assert packed["indices"].tolist() == list(range(2**16 + 1))


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 9)])
def test_ranks_are_clipped_and_priced_as_clipped(shape):
    rank = min(shape)
    for clipped, wanted in (
        (LowRankPlus(rank, INT3), LowRankPlus(1000, INT3)),
        (LowRankSparseColumns(rank, 0.2), LowRankSparseColumns(1000, 0.2)),
        (ResidualStack(2, rank), ResidualStack(2, 1000)),
    ):
        assert wanted.layout(shape) == clipped.layout(shape)
        matrix = random(*shape)
        assert torch.equal(wanted.apply(matrix, NONE), clipped.apply(matrix, NONE))


# Truncated SVD


@pytest.mark.parametrize(("rank", "share"), [(1, 0.97), (16, 0.97), (141, 1 - 1e-6)])
def test_truncated_svd_is_nearly_the_best(rank, share):
    matrix = spectrum(600, 300, 0.98)
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (600, rank)
    assert right.shape == (rank, 300)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    error = (matrix - left @ right).square().sum().item()
    whole = matrix.square().sum().item()
    best = (matrix - svd(matrix, rank)).square().sum().item()
    assert best * (1 - 1e-4) <= error
    assert whole - error >= share * (whole - best)
    # An orthogonal projection: what is left is orthogonal to what is taken.
    assert (left @ right * (matrix - left @ right)).sum().item() == pytest.approx(0, abs=1e-3)


def test_truncated_svd_of_small_matrices_is_exact():
    for shape in ((60, 100), (100, 60), (1, 7)):
        matrix = random(*shape)
        left, right = truncated_svd(matrix, 1)
        torch.testing.assert_close(left @ right, svd(matrix, 1), atol=1e-4, rtol=0)


def test_scales_follow_norms_and_survive_float16():
    moment = torch.tensor([4.0, 0.0, 12.0, 0.0])
    assert relative_scales(moment, 0.5).tolist() == pytest.approx([1, 1e-3, 3**0.5, 1e-3])
    assert (relative_scales(moment, 0.5).half() > 0).all()
    assert relative_scales(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


# Low rank plus


def reference_rounds(matrix, rank, residual, num_rounds):
    """Approximation after each round of LQ-LoRA's algorithm 1, none left out."""
    stored, found = torch.zeros_like(matrix), []
    for _ in range(num_rounds):
        low = svd(matrix - stored, rank)
        stored = residual.apply(matrix - low, NONE)
        found.append(low + stored)
    return found


def test_rounds_are_those_of_the_reference():
    """With factors that hardly round, each number of rounds gives the reference's best one."""
    matrix = spectrum(40, 64)
    rounds = reference_rounds(matrix, 4, RoundToNearest(2, 32), 6)
    errors = [(matrix - one).norm().item() for one in rounds]
    assert min(errors) < 0.98 * errors[0], "the rounds must matter here"
    rise = next((i for i in range(1, 6) if errors[i] > errors[i - 1]), 6)
    for iterations in range(1, 7):
        made = LowRankPlus(4, RoundToNearest(2, 32), RoundToNearest(8, 1), iterations)
        error = (matrix - made.apply(matrix, NONE)).norm().item()
        assert error == pytest.approx(min(errors[: min(iterations, rise)]), rel=0.02)


def test_the_best_round_is_kept_and_not_the_one_after():
    """Over many matrices some round errs more; the result is that of the rounds before it."""
    stopped = 0
    for seed in range(12):
        matrix = random(16, 32, seed=seed)
        errors = [
            (matrix - LowRankPlus(2, RoundToNearest(2, 8), HALF, k).apply(matrix, NONE)).norm()
            for k in range(1, 31)
        ]
        assert all(after <= before for before, after in pairwise(errors))
        low = reference_rounds(matrix, 2, RoundToNearest(2, 8), 30)
        risen = any(
            (matrix - after).norm() > (matrix - before).norm() * 1.001
            for before, after in pairwise(low)
        )
        stopped += risen and errors[-1] == errors[-10]
    assert stopped >= 3


def test_an_exactly_low_rank_matrix_is_left_to_the_factors():
    matrix = random(48, 3) @ random(3, 64, seed=1)
    made = LowRankPlus(3, RoundToNearest(2), HALF).apply(matrix, NONE)
    plain = RoundToNearest(2).apply(matrix, NONE)
    assert (matrix - made).norm() < 1e-3 * (matrix - plain).norm()


def test_weighting_is_the_two_sided_surrogate():
    """One round's factors are those of the SVD between diagonal square roots of the Fisher."""
    matrix, stats = random(30, 50), statistics(30, 50)
    packed = LowRankPlus(5, Keep(), HALF, iterations=1, weighted=True).pack(matrix, stats)
    rows = stats.fisher.double().mean(1).sqrt()[:, None]
    columns = stats.fisher.double().mean(0).sqrt()
    expected = svd(rows * matrix * columns, 5) / rows / columns
    made = packed["left"].float() @ packed["right"].float()
    assert (made - expected).norm() < 2e-3 * expected.norm()
    assert (made - svd(matrix, 5)).norm() > 0.1 * expected.norm()


def test_weighting_lowers_the_weighted_error_and_smoothing_the_output_error():
    matrix, stats = random(64, 128), statistics(64, 128)
    plain, smooth, weighted = (
        matrix - LowRankPlus(8, INT3, **options).apply(matrix, stats)
        for options in ({}, {"smoothing": 0.5}, {"weighted": True})
    )

    def fisher(error):
        return (error.square() * stats.fisher).sum()

    def output(error):
        return (error @ stats.hessian * error).sum()

    assert fisher(weighted) < 0.97 * fisher(plain)
    assert output(smooth) < 0.9 * output(plain)


def test_smoothing_scales_the_columns_and_is_undone():
    matrix, stats = random(24, 64), statistics(24, 64)
    packed = LowRankPlus(4, INT3, smoothing=0.7).pack(matrix, stats)
    moment = stats.second_moment
    expected = (moment / moment.mean()).clamp(min=1e-6) ** 0.35
    torch.testing.assert_close(packed["input_scales"], expected.half())
    scaled = matrix * packed["input_scales"].float()
    low = packed["left"].float() @ packed["right"].float()
    residual = INT3.apply(scaled - low, NONE)
    by_hand = (low + residual) / packed["input_scales"].float()
    made = LowRankPlus(4, INT3, smoothing=0.7).apply(matrix, stats)
    torch.testing.assert_close(made, by_hand, atol=1e-5, rtol=1e-5)


def test_a_nested_operator_sees_what_reaches_it():
    """The residual's GPTQ gets the scaled Hessian, so smoothing and GPTQ work together."""
    matrix, stats = random(64, 128), statistics(64, 128)

    def output(operator):
        error = matrix - operator.apply(matrix, stats)
        return (error @ stats.hessian * error).sum()

    nearest, gptq = (LowRankPlus(8, o, smoothing=0.5) for o in (INT3, GPTQ(3)))
    assert gptq.needs == {"hessian", "second_moment"}
    assert output(gptq) < 0.7 * output(nearest)


def test_factors_see_what_reaches_them():
    """The left factor's inputs are the right factor's outputs, gradients come through the left."""
    inputs, left, right = random(500, 40), random(30, 6, seed=1), random(6, 40, seed=2)
    gradients = random(500, 30, seed=3)
    products = torch.einsum("tr,tc->trc", gradients, inputs)
    stats = Statistics(inputs.square().mean(0), inputs.T @ inputs / 500, products.square().mean(0))
    every = frozenset({"second_moment", "hessian", "fisher"})
    of_left, of_right = factor_statistics(stats, every, left, right)
    hidden = inputs @ right.T
    torch.testing.assert_close(of_left.hessian, hidden.T @ hidden / 500, rtol=1e-3, atol=1e-2)
    assert torch.equal(of_right.hessian, stats.hessian)
    # Under inputs and gradients that are nearly uncorrelated the rest is nearly what is seen.
    torch.testing.assert_close(of_left.second_moment, hidden.square().mean(0), rtol=0.3, atol=0)
    of_factor = torch.einsum("tr,tk->trk", gradients, hidden).square().mean(0)
    assert (of_left.fisher / of_factor).log().abs().mean() < 0.2
    of_factor = torch.einsum("tk,tc->tkc", gradients @ left, inputs).square().mean(0)
    assert (of_right.fisher / of_factor).log().abs().mean() < 0.2
    assert factor_statistics(stats, frozenset(), left, right) == (NONE, NONE)


def test_statistics_it_does_not_need_change_nothing():
    matrix, stats = random(40, 64), statistics(40, 64)
    for operator in (
        LowRankPlus(4, INT3),
        LowRankPlus(4, INT3, GPTQ(4)),
        LowRankSparseColumns(4, 0.2, kept=GPTQ(4)),
        ResidualStack(2, 4),
    ):
        only = Statistics(**{kind: getattr(stats, kind) for kind in operator.needs})
        assert torch.equal(operator.apply(matrix, stats), operator.apply(matrix, only))


# Low rank and sparse columns


@pytest.mark.parametrize("weighted", [False, True])
def test_columns_are_the_worst_of_the_residual(weighted):
    matrix, stats = spectrum(40, 60), statistics(40, 60)
    scales = (stats.second_moment / stats.second_moment.mean()).sqrt().clamp(min=1e-3)
    scales = scales if weighted else torch.ones(60)
    left = (matrix * scales - svd(matrix * scales, 5)).norm(dim=0)
    chosen = sorted(left.topk(12).indices.tolist())
    operator = LowRankSparseColumns(5, 0.2, HALF, HALF, weighted)
    packed = operator.pack(matrix, stats)
    assert packed["indices"].tolist() == chosen
    made = operator.apply(matrix, stats)
    assert torch.equal(made[:, chosen], matrix[:, chosen].half().float())
    others = [column for column in range(60) if column not in chosen]
    expected = (svd(matrix[:, others] * scales[others], 5)) / scales[others]
    torch.testing.assert_close(made[:, others], expected, atol=0.02, rtol=0.01)
    published = ((matrix * scales - svd(matrix * scales, 5)) / scales)[:, others]
    ours = made[:, others] - matrix[:, others]
    assert (ours * scales[others]).norm() < (published * scales[others]).norm()


def test_keeping_every_column_is_keeping_the_matrix():
    matrix = random(20, 33)
    made = LowRankSparseColumns(2, 1.0, kept=INT3).apply(matrix, NONE)
    assert torch.equal(made, INT3.apply(matrix, NONE))
    assert LowRankSparseColumns(2, 0.001).layout((20, 33))[-1].shape == (1,)


def test_kept_columns_see_their_own_statistics():
    matrix, stats = random(48, 64), statistics(48, 64)
    operator = LowRankSparseColumns(2, 1.0, kept=GPTQ(3))
    assert torch.equal(operator.apply(matrix, stats), GPTQ(3).apply(matrix, stats))
    chosen = LowRankSparseColumns(2, 0.5, kept=GPTQ(3))
    columns = chosen.pack(matrix, stats)["indices"].long()
    part = Statistics(hessian=stats.hessian[columns][:, columns])
    expected = GPTQ(3).apply(matrix[:, columns], part)
    assert torch.equal(chosen.apply(matrix, stats)[:, columns], expected)


# Residual stacks


def reference_level(rest, rank):
    """A level of the iterative absolute value decomposition, factors in float16, in numpy."""
    left, values, right = np.linalg.svd(np.abs(rest), full_matrices=False)
    roots = np.sqrt(values[:rank])
    factors = (left[:, :rank] * roots, roots[:, None] * right[:rank])
    lower, upper = (factor.astype(np.float16).astype(np.float64) for factor in factors)
    return np.where(rest > 0, 1, -1) * (lower @ upper)


def test_stack_is_the_iterative_absolute_value_decomposition():
    """Level by level: what one rounding of a factor changes, every later level enlarges."""
    matrix = random(40, 56)
    before = torch.zeros_like(matrix)
    for levels in (1, 2, 3, 4):
        rest = matrix - before
        made = ResidualStack(levels, 6).apply(matrix, NONE)
        expected = torch.from_numpy(reference_level(rest.double().numpy(), 6))
        assert (made - before - expected).norm() < 1e-3 * rest.norm()
        assert (made - matrix).norm() < 0.6 * rest.norm()
        before = made


@pytest.mark.parametrize("scaled", [False, True])
def test_levels_are_nested_to_the_bit(scaled):
    matrix, stats = random(150, 200), statistics(150, 200)  # too large to be decomposed exactly
    deep = ResidualStack(9, 4, scaled).pack(matrix, stats)
    for levels in range(1, 10):
        shallow = ResidualStack(levels, 4, scaled)
        packed = shallow.pack(matrix, stats)
        for name in ("signs", "left", "right"):
            assert torch.equal(packed[name], deep[name][:levels])
        prefix = {**deep, **{name: deep[name][:levels] for name in ("signs", "left", "right")}}
        assert torch.equal(shallow.unpack(prefix, (150, 200)), shallow.apply(matrix, stats))


@given(
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([1e-12, 1e-4, 1.0, 1e4, 1e6]),
    st.integers(0, 1000),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_more_levels_never_err_more(rows, columns, rank, size, seed):
    matrix = random(rows, columns, seed=seed) * size
    errors = [matrix.double().norm().item()] + [
        (matrix - ResidualStack(levels, rank).apply(matrix, NONE)).double().norm().item()
        for levels in (1, 2, 3, 5, 8, 16, 40)
    ]
    # Summing the levels rounds in float32, which shows once nothing else is left.
    rounding = 1e-6 * errors[0]
    assert all(b <= a + rounding for a, b in pairwise(errors)), errors
    if 1e-4 <= size <= 1e4:
        assert errors[-1] < 0.05 * errors[0] + rounding


def test_scaling_lowers_the_error_that_counts():
    matrix, stats = random(64, 128), statistics(64, 128)

    def weighted(operator):
        error = matrix - operator.apply(matrix, stats)
        return (error.square() * stats.second_moment).sum()

    assert weighted(ResidualStack(3, 8, scaled=True)) < 0.8 * weighted(ResidualStack(3, 8))


# Messages


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LowRankPlus(0, INT3), "low_rank_plus: rank must be at least 1, got 0"),
        (lambda: LowRankPlus(1, INT3, iterations=0), "iterations must be at least 1, got 0"),
        (lambda: LowRankPlus(1, INT3, smoothing=1.5), "smoothing must be 0 to 1, got 1.5"),
        (lambda: LowRankSparseColumns(0, 0.1), "rank must be at least 1, got 0"),
        (lambda: LowRankSparseColumns(1, 0.0), "above 0 and at most 1, got 0.0"),
        (lambda: LowRankSparseColumns(1, 1.1), "above 0 and at most 1, got 1.1"),
        (lambda: ResidualStack(0), "levels must be 1 to 64, got 0"),
        (lambda: ResidualStack(65), "levels must be 1 to 64, got 65"),
        (lambda: ResidualStack(1, 0), "rank must be at least 1, got 0"),
    ],
)
def test_faulty_fields_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        (LowRankPlus(2, INT3, weighted=True), "fisher"),
        (LowRankPlus(2, INT3, smoothing=0.5), "second_moment"),
        (LowRankPlus(2, GPTQ(3)), "hessian"),
        (LowRankSparseColumns(2, 0.1, weighted=True), "second_moment"),
        (LowRankSparseColumns(2, 0.1, kept=GPTQ(3)), "hessian"),
        (ResidualStack(2, scaled=True), "second_moment"),
    ],
)
def test_missing_statistics_are_named(operator, kind):
    assert operator.needs == {kind}
    for method in (operator.apply, operator.pack):
        with pytest.raises(ValueError, match=f"needs the {kind}"):
            method(random(8, 16), NONE)


def test_labels_tell_operators_apart():
    operators = [
        LowRankPlus(4, INT3),
        LowRankPlus(4, INT3, HALF),
        LowRankPlus(4, INT3, INT3),
        LowRankPlus(4, INT3, iterations=5),
        LowRankPlus(4, INT3, smoothing=0.5),
        LowRankPlus(4, INT3, weighted=True),
        LowRankPlus(4, LowRankPlus(4, INT3)),
        LowRankPlus(4, INT3, LowRankPlus(4, INT3)),
        LowRankSparseColumns(4, 0.1),
        LowRankSparseColumns(4, 0.1, INT3),
        LowRankSparseColumns(4, 0.1, kept=INT3),
        LowRankSparseColumns(4, 0.1, weighted=True),
        ResidualStack(4),
        ResidualStack(4, 8),
        ResidualStack(4, scaled=True),
    ]
    labels = [operator.label for operator in operators]
    assert len(set(labels)) == len(labels)
    assert not any(" " in label for label in labels)
    assert labels[0] == "lr4+int3-g64"
    assert labels[6] == "lr4+lr4+int3-g64"


# Nests


def nest(children):
    """One more composition around operators."""
    return st.one_of(
        st.builds(
            LowRankPlus,
            rank=st.integers(1, 9),
            residual=children,
            factors=children,
            iterations=st.integers(1, 3),
            smoothing=st.sampled_from([0.0, 0.5]),
            weighted=st.booleans(),
        ),
        st.builds(
            LowRankSparseColumns,
            rank=st.integers(1, 9),
            columns=st.sampled_from([0.01, 0.3, 1.0]),
            factors=children,
            kept=children,
            weighted=st.booleans(),
        ),
    )


LEAVES = st.sampled_from(
    [
        Keep(),
        HALF,
        INT3,
        RoundToNearest(2, 16, symmetric=False),
        ResidualStack(2, 3),
        ResidualStack(1, 2, scaled=True),
        Prune(0.5, values=RoundToNearest(4)),
        Prune(0.4, "wanda"),
    ]
)


def summed_bytes(operator, shape):
    """Price by the definition: what each part costs by itself."""
    rows, columns = shape
    if isinstance(operator, LowRankPlus):
        rank = min(operator.rank, rows, columns)
        return (
            summed_bytes(operator.residual, shape)
            + summed_bytes(operator.factors, (rows, rank))
            + summed_bytes(operator.factors, (rank, columns))
            + (2 * columns if operator.smoothing else 0)
        )
    if isinstance(operator, LowRankSparseColumns):
        rank = min(operator.rank, rows, columns)
        kept = max(1, round(operator.columns * columns))
        return (
            summed_bytes(operator.factors, (rows, rank))
            + summed_bytes(operator.factors, (rank, columns))
            + summed_bytes(operator.kept, (rows, kept))
            + 2 * kept
        )
    return operator.bytes(shape)


@given(st.recursive(LEAVES, nest, max_leaves=6), st.sampled_from([(24, 40), (1, 9), (7, 1)]))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_nest_adds_up_and_comes_back(operator, shape):
    assert operator_from_json(json.loads(json.dumps(operator_to_json(operator)))) == operator
    if operator.unfit(shape):
        return
    assert operator.bytes(shape) == summed_bytes(operator, shape)
    matrix, stats = random(*shape), statistics(*shape)
    packed = dict(operator.pack(matrix, stats))
    stored = save({name: tensor.contiguous() for name, tensor in packed.items()})
    read = load(stored)
    assert sum(tensor.nbytes for tensor in read.values()) == operator.bytes(shape)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        tensor.name: tensor.shape for tensor in operator.layout(shape)
    }
    applied = operator.apply(matrix, stats)
    assert torch.isfinite(applied).all()
    assert torch.equal(operator.unpack(read, shape), applied)


def test_nested_operators_are_read_from_plain_mappings():
    plain = {
        "name": "low_rank_plus",
        "rank": 16,
        "residual": {
            "name": "low_rank_plus",
            "rank": 4,
            "residual": {"name": "round_to_nearest", "bits": 3},
        },
        "factors": {
            "name": "prune",
            "sparsity": 0.5,
            "values": {"name": "round_to_nearest", "bits": 4},
        },
    }
    expected = LowRankPlus(
        16, LowRankPlus(4, RoundToNearest(3)), Prune(0.5, values=RoundToNearest(4))
    )
    assert operator_from_json(plain) == expected
    with pytest.raises(ValueError, match="residual must be an operator"):
        operator_from_json({"name": "low_rank_plus", "rank": 16, "residual": "keep"})

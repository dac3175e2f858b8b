"""GPTQ, clipped rounding, NormalFloat and decoupleQ against slow references and published facts."""

import itertools
import weakref

import numpy as np
import pytest
import torch

from search_spaces.operators import (
    GPTQ,
    ClippedRound,
    DecoupledRound,
    NormalFloat,
    RoundToNearest,
    Statistics,
)
from search_spaces.operators.decoupled import _Fit, _fit_floats
from search_spaces.operators.hessian import LatestFactor, inverse_factor, output_errors
from search_spaces.operators.normal_float import lq_lora_menu, normal_float_levels
from search_spaces.storage import ceil_div

NONE = Statistics()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, num_tokens=600, seed=1):
    """(columns, columns) mean outer product of inputs that share a few directions."""
    common = normal(num_tokens, 4, seed=seed) @ normal(4, columns, seed=seed + 1)
    inputs = common + normal(num_tokens, columns, seed=seed + 2)
    inputs *= torch.linspace(0.3, 2, columns)
    return inputs.T @ inputs / num_tokens


def row_errors(operator, weight, hessian):
    stats = Statistics(hessian=hessian, second_moment=hessian.diagonal())
    return output_errors(operator.apply(weight, stats) - weight, hessian)


# GPTQ


def slow_gptq(weight, hessian, operator):
    """Algorithm 1 by its definition: the remaining Hessian is inverted anew for each column."""
    weight, hessian = weight.double().numpy().copy(), hessian.double().numpy()
    given = weight.copy()
    rows, columns = weight.shape
    width, levels = operator.group_size or columns, 2**operator.bits - 1
    damped = hessian + operator.damping * hessian.diagonal().mean() * np.eye(columns)
    order = np.argsort(-hessian.diagonal()) if operator.act_order else np.arange(columns)
    rounded = np.zeros_like(weight)
    scale, zero = {}, {}

    def fit(group, source):
        values = source[:, group * width : (group + 1) * width]
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        if operator.symmetric:
            reach = np.maximum(-low, high) * 2 / levels
            zero[group] = np.full(rows, 2.0 ** (operator.bits - 1))
        else:
            reach = (high - low) / levels
        scale[group] = reach.astype(np.float16).astype(float)
        if not operator.symmetric:
            zero[group] = np.clip(np.round(-low / scale[group]), 0, levels)

    for group in range(ceil_div(columns, width)):
        fit(group, given)
    for position, column in enumerate(order):
        group = column // width
        if not operator.act_order and column % width == 0:
            fit(group, weight)
        codes = np.round(weight[:, column] / scale[group]) + zero[group]
        rounded[:, column] = (np.clip(codes, 0, levels) - zero[group]) * scale[group]
        left = order[position:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        error = (weight[:, column] - rounded[:, column]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
    return torch.tensor(rounded, dtype=torch.float32)


GPTQ_CASES = [
    GPTQ(3, 16),
    GPTQ(4, 0),
    GPTQ(2, 24, symmetric=False),
    GPTQ(3, 150, symmetric=False),
    GPTQ(4, 72, damping=0.1),
    GPTQ(3, 16, act_order=True),
    GPTQ(2, 150, symmetric=False, act_order=True),
]


@pytest.mark.parametrize("operator", GPTQ_CASES, ids=lambda operator: operator.label)
def test_gptq_follows_its_definition(operator):
    weight, hessian = normal(12, 200), correlated(200)
    made = operator.apply(weight, Statistics(hessian=hessian))
    expected = slow_gptq(weight, hessian, operator)
    # A tie decided the other way changes the rest of its row; nothing else may differ.
    same = (made - expected).abs().amax(1) < 1e-4
    assert same.float().mean() >= 0.75
    plain = RoundToNearest(operator.bits, operator.group_size, operator.symmetric)
    assert row_errors(operator, weight, hessian).sum() < row_errors(plain, weight, hessian).sum()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_never_worse_than_round_to_nearest_in_any_row(bits, act_order):
    kept = 0
    for seed in range(12):
        columns = 16 + 23 * (seed % 4)
        weight = normal(64, columns, seed=seed)
        inputs = normal(8 + 40 * (seed % 3), columns, seed=seed + 100)
        hessian = inputs.T @ inputs / len(inputs)
        operator, plain = GPTQ(bits, 16, act_order=act_order), RoundToNearest(bits, 16)
        errors = row_errors(operator, weight, hessian)
        bound = row_errors(plain, weight, hessian)
        assert (errors <= bound * (1 + 1e-5)).all()
        stats = Statistics(hessian=hessian)
        kept += (operator.apply(weight, stats) == plain.apply(weight, NONE)).all(1).sum().item()
    assert act_order or kept > 0, "no row fell back, so this test could not fail"


def test_gptq_ignores_weights_whose_input_never_fires():
    weight, hessian = normal(8, 32), correlated(32)
    hessian[5], hessian[:, 5] = 0, 0
    loud = weight.clone()
    loud[:, 5] = 1000
    stats = Statistics(hessian=hessian)
    own = row_errors(GPTQ(4, 32), weight, hessian) < row_errors(
        RoundToNearest(4, 32), weight, hessian
    )
    assert own.sum() >= 5
    made = GPTQ(4, 32).apply(loud, stats)[own]
    assert torch.equal(made, GPTQ(4, 32).apply(weight, stats)[own])
    assert torch.equal(made[:, 5], torch.zeros(len(made)))


def test_the_factor_is_a_root_of_the_damped_inverse():
    hessian = correlated(40)
    factor = inverse_factor(hessian, 0.02).double()
    damped = hessian.double() + 0.02 * hessian.diagonal().mean() * torch.eye(40)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(40).double(), atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_a_factor_is_made_once_for_all_options_of_a_matrix():
    memory, hessian, order = LatestFactor(), correlated(12), torch.arange(12).flip(0)
    first = memory.factor(hessian, 0.01)
    assert torch.equal(first, inverse_factor(hessian, 0.01))
    assert memory.factor(hessian, 0.01) is first
    turned = memory.factor(hessian, 0.01, order)
    assert torch.equal(turned, inverse_factor(hessian[order][:, order], 0.01))
    assert memory.factor(hessian, 0.02) is not memory.factor(hessian, 0.01)
    before = memory.factor(hessian, 0.01)
    hessian *= 2  # written to: what is remembered is no longer true
    assert torch.allclose(memory.factor(hessian, 0.01), before / 2**0.5)


def test_a_factor_goes_with_its_hessian():
    memory, hessian = LatestFactor(), correlated(12)
    factor = weakref.ref(memory.factor(hessian, 0.01))
    assert factor() is not None
    del hessian
    assert factor() is None


def test_damping_grows_until_the_factor_exists():
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.5  # an eigenvalue of -0.5
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 1.0 * torch.eye(6)  # 0.01 and 0.1 do not suffice
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(6).double(), atol=1e-5)


@pytest.mark.parametrize(
    "operator", [GPTQ(3), DecoupledRound(3)], ids=lambda operator: operator.label
)
def test_a_missing_or_broken_hessian_is_refused(operator):
    weight = normal(4, 16)
    with pytest.raises(ValueError, match="needs the hessian"):
        operator.pack(weight, NONE)
    with pytest.raises(ValueError, match="finite"):
        operator.pack(weight, Statistics(hessian=torch.full((16, 16), torch.nan)))


@pytest.mark.parametrize("operator", [GPTQ(3), DecoupledRound(3)], ids=lambda o: o.label)
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e8])
def test_hessians_of_any_size_do(operator, scale):
    weight = normal(4, 32)
    made = operator.apply(weight, Statistics(hessian=correlated(32) * scale))
    if scale:
        expected = operator.apply(weight, Statistics(hessian=correlated(32)))
        assert (made - expected).square().mean() < 0.01 * expected.square().mean()
    assert (made - weight).abs().max() < 2


@pytest.mark.parametrize(
    "operator",
    [GPTQ(3, 48), GPTQ(3, 48, False, True), ClippedRound(3, 48), ClippedRound(1, 48, False)],
    ids=lambda operator: operator.label,
)
def test_what_grids_store_is_what_round_to_nearest_stores(operator):
    weight, hessian = normal(9, 130), correlated(130)
    stats = Statistics(hessian=hessian)
    plain = RoundToNearest(operator.bits, operator.group_size, operator.symmetric)
    assert operator.layout((9, 130)) == plain.layout((9, 130))
    read = plain.unpack(operator.pack(weight, stats), (9, 130))
    assert torch.equal(read, operator.apply(weight, stats))


# Clipped rounding


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (1, False)])
@pytest.mark.parametrize("weighted", [False, True])
def test_clipping_takes_the_best_ratio_of_every_group(bits, symmetric, weighted):
    weight, moment = normal(6, 40).pow(3), normal(40, seed=4).square()
    operator = ClippedRound(bits, 16, symmetric, weighted)
    made = operator.apply(weight, Statistics(second_moment=moment))
    importance = moment if weighted else torch.ones(40)
    levels = 2**bits - 1
    gained = 0
    for row, start in itertools.product(range(6), (0, 16, 32)):
        part = slice(start, min(start + 16, 40))
        values = weight[row, part]
        losses = []
        for percent in range(10, 101, 5):
            low, high = (min(0, values.min()), max(0, values.max()))
            span = 2 * max(-low, high) if symmetric else high - low
            scale = torch.as_tensor(span * percent / 100 / levels).half().float()
            zero = 2 ** (bits - 1)
            if not symmetric:
                zero = (-low * percent / 100 / scale).round().clamp(0, levels)
            codes = ((values / scale).round() + zero).clamp(0, levels)
            error = (codes - zero) * scale - values
            losses.append((error.square() * importance[part]).sum().item())
        loss = ((made[row, part] - values).square() * importance[part]).sum().item()
        assert loss == pytest.approx(min(losses), rel=1e-3)
        gained += loss < 0.99 * losses[-1]
    assert gained > 3


def test_only_weighted_clipping_needs_statistics():
    assert ClippedRound(3).needs == frozenset()
    assert ClippedRound(3, weighted=True).needs == {"second_moment"}
    with pytest.raises(ValueError, match="clipped_round needs the second_moment"):
        ClippedRound(3, weighted=True).apply(normal(4, 16), NONE)


# NormalFloat

# QLoRA, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def test_four_bit_levels_are_those_of_qlora():
    assert normal_float_levels(4) == pytest.approx(NF4, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_ascend_from_minus_one_to_one_through_zero(bits):
    levels = normal_float_levels(bits)
    assert len(levels) == 2**bits
    assert list(levels) == sorted(set(levels))
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1, 0, 1)


def test_normal_float_bytes_are_those_of_lq_lora():
    shape = (4096, 4096)
    offset = 4
    assert NormalFloat().bytes(shape) * 8 / 4096**2 == pytest.approx(4.12695, abs=1e-5)
    sizes = {"bfloat16": 16, "float16": 16, "float32": 32}
    for one in lq_lora_menu():
        bits = one.bits + one.scale_bits / one.block
        bits += sizes[one.scale_dtype] / (one.block * one.scale_block)
        assert one.bytes(shape) == bits * 4096**2 / 8 + offset
    # 105 weights: 53 bytes; 4 scales of 3 bits: 2 bytes; 2 bfloat16; the offset.
    assert NormalFloat(4, 32, 3, "bfloat16", 3).bytes((7, 15)) == 53 + 2 + 4 + offset


def test_the_menu_of_lq_lora():
    menu = lq_lora_menu()
    assert len(menu) == len({one.label for one in menu}) == 432
    bits = [(one.bytes((4096, 4096)) - 4) * 8 / 4096**2 for one in menu]
    assert (min(bits), max(bits)) == pytest.approx((2.032, 8.625), abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_normal_float_by_its_definition(dtype):
    operator = NormalFloat(3, 8, 4, dtype, 3)
    weight = normal(5, 13).exp()
    flat = weight.flatten().tolist()
    blocks = [flat[i : i + 8] for i in range(0, 65, 8)]
    largest = [max(map(abs, block)) for block in blocks]
    levels = normal_float_levels(3)
    expected = []
    for i, block in enumerate(blocks):
        neighbours = largest[i // 3 * 3 : i // 3 * 3 + 3]
        second = torch.tensor(max(neighbours) - min(largest)).to(getattr(torch, dtype)).item()
        code = min(15, round((largest[i] - min(largest)) / second * 15)) if second else 0
        scale = min(largest) + code / 15 * second
        expected += [min(levels, key=lambda v: abs(v - x / scale)) * scale for x in block]
    made = operator.apply(weight, NONE).flatten()
    assert torch.allclose(made, torch.tensor(expected), rtol=1e-5)


def test_normal_float_survives_constant_and_extreme_scales():
    for weight in (torch.full((8, 64), 0.5), torch.eye(16) * 1e6, torch.eye(16) * 1e-8):
        for dtype in ("bfloat16", "float16", "float32"):
            made = NormalFloat(4, 16, 8, dtype, 4).apply(weight, NONE)
            assert torch.isfinite(made).all()
            assert torch.equal(made == 0, weight == 0)
    assert torch.equal(
        NormalFloat(2).apply(torch.full((8, 64), 0.5), NONE), torch.full((8, 64), 0.5)
    )


# decoupleQ


@pytest.mark.parametrize(("group", "bits"), [(64, 2.5), (128, 2.25), (0, 2.0078125)])
def test_decoupled_bytes_are_the_published_ones(group, bits):
    assert DecoupledRound(2, group).bytes((4096, 4096)) * 8 / 4096**2 == bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 24])
def test_decoupled_is_better_than_gptq_on_the_same_codes(bits, group):
    weight, hessian = normal(32, 100), correlated(100)
    errors = row_errors(DecoupledRound(bits, group), weight, hessian)
    start = row_errors(GPTQ(bits, group, False, True), weight, hessian)
    # The offset of the start is rounded to float16, hence the margin.
    assert (errors <= start * 1.01).all()
    assert errors.sum() < 0.99 * start.sum()


def test_decoupled_floats_are_the_least_squares_solution():
    weight, hessian = normal(5, 22), correlated(22)
    integers = torch.randint(-4, 4, (5, 22), generator=torch.Generator().manual_seed(2)).float()
    fit = _Fit(integers, torch.ones(5, 3), torch.zeros(5, 3))
    made = _fit_floats(fit, weight, hessian, 8)
    root = np.linalg.cholesky(hessian.double().numpy()).T  # |root @ error| is the output error
    for row in range(5):
        design = np.zeros((22, 6))
        for column in range(22):
            design[column, column // 8] = integers[row, column]
            design[column, 3 + column // 8] = 1
        best = np.linalg.lstsq(root @ design, root @ weight[row].double().numpy(), rcond=None)[0]
        found = torch.cat([made.scales[row], made.offsets[row]]).numpy()
        assert found == pytest.approx(best, rel=5e-3, abs=5e-3)


def test_decoupled_integers_cannot_be_bettered_one_at_a_time():
    operator = DecoupledRound(2, 4)
    weight, hessian = normal(6, 8), correlated(8)
    fit = _Fit(torch.zeros(6, 8), torch.full((6, 2), 0.7), torch.full((6, 2), 0.35))
    for _ in range(5):
        fit = operator._fit_integers(fit, weight, hessian)
    least = output_errors(fit.dense(4) - weight, hessian)
    for column, value in itertools.product(range(8), range(-2, 2)):
        integers = fit.integers.clone()
        integers[:, column] = value
        other = output_errors(fit._replace(integers=integers).dense(4) - weight, hessian)
        assert (least <= other * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQ(1), "gptq: bits must be 2 to 8, got 1"),
        (lambda: GPTQ(3, -1), "gptq: group_size must be >= 0, got -1"),
        (lambda: GPTQ(3, damping=0.0), "gptq: damping must be positive and finite, got 0.0"),
        (lambda: ClippedRound(9), "clipped_round: bits must be 2 to 8, got 9"),
        (lambda: NormalFloat(1), "normal_float: bits must be 2 to 8, got 1"),
        (lambda: NormalFloat(scale_bits=9), "normal_float: scale_bits must be 2 to 8, got 9"),
        (lambda: NormalFloat(block=0), "normal_float: block must be >= 1, got 0"),
        (lambda: NormalFloat(scale_block=0), "normal_float: scale_block must be >= 1, got 0"),
        (lambda: NormalFloat(scale_dtype="fp8"), "float16 or float32, got 'fp8'"),
        (lambda: DecoupledRound(9), "decoupled: bits must be 1 to 8, got 9"),
        (lambda: DecoupledRound(2, -1), "decoupled: group_size must be >= 0, got -1"),
    ],
)
def test_wrong_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

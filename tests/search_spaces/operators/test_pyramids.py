"""Pyramids and powers of two against enumeration, exhaustive search and theory."""

import itertools
import math

import pytest
import torch
from matrices import NONE, bits_per_weight, draws, squared_error

from search_spaces.operators import PowerOfTwo, Pyramid, RoundToNearest
from search_spaces.operators.pyramid import index_of, num_points, point_at, project

# Pyramid


def test_pyramid_counts():
    assert num_points(2, 1) == 4
    assert num_points(3, 2) == 18
    assert math.log2(num_points(16, 32)) == pytest.approx(51.13, abs=0.01)
    for (dimensions, pulses), bits in {
        (16, 16): 2.319,
        (16, 32): 3.196,
        (16, 48): 3.731,
        (8, 16): 2.982,
    }.items():
        assert math.log2(num_points(dimensions, pulses)) / dimensions == pytest.approx(
            bits, abs=5e-4
        )


@pytest.mark.parametrize(("dimensions", "pulses"), [(1, 3), (2, 1), (3, 4), (4, 3), (5, 2)])
def test_every_point_has_an_index_of_its_own(dimensions, pulses):
    every = [
        point
        for point in itertools.product(range(-pulses, pulses + 1), repeat=dimensions)
        if sum(map(abs, point)) == pulses
    ]
    points = torch.tensor(every)
    index = index_of(points, pulses)
    assert sorted(index.tolist()) == list(range(num_points(dimensions, pulses)))
    assert torch.equal(point_at(index, dimensions, pulses), points)


@pytest.mark.parametrize(("dimensions", "pulses"), [(16, 53), (8, 256), (256, 9), (30, 16)])
def test_indices_of_many_bits_are_exact(dimensions, pulses):
    count = num_points(dimensions, pulses)
    assert count > 2**48
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, count, (500,), generator=generator)
    index = torch.cat([index, torch.tensor([0, 1, count - 2, count - 1])])
    points = point_at(index, dimensions, pulses)
    assert (points.abs().sum(1) == pulses).all()
    assert torch.equal(index_of(points, pulses), index)


def test_pyramid_bytes():
    assert Pyramid(16, 32).index_bits == 52
    assert bits_per_weight(Pyramid(16, 32)) == (52 + 8) / 16 + 16 / 4096
    # 7 rows of 13 weights: two groups of 8 each, 24 and 8 bits
    assert Pyramid(8, 16).bytes((7, 13)) == 14 * 24 // 8 + 14 + 2 * 7


def test_pulses_are_a_nearly_continuous_knob():
    ladder = [Pyramid(16, pulses, 6) for pulses in range(1, 54)]
    sizes = [bits_per_weight(operator) for operator in ladder]
    steps = [dear - cheap for cheap, dear in itertools.pairwise(sizes)]
    assert all(step >= 0 for step in steps)
    assert all(step <= 2 / 16 for step in steps[7:])  # at most two bits of a group's index
    assert sizes[0] < 0.75
    assert sizes[-1] > 4.1
    matrix = draws(32, 512)
    errors = [squared_error(operator, matrix) for operator in ladder]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("dimensions", "pulses"), [(3, 5), (4, 4), (4, 7), (5, 3)])
def test_projection_finds_nearly_always_the_closest_point(dimensions, pulses):
    count = num_points(dimensions, pulses)
    every = point_at(torch.arange(count), dimensions, pulses).float()
    every = every / every.norm(dim=1, keepdim=True)
    groups = draws(400, dimensions)
    groups = groups / groups.norm(dim=1, keepdim=True)
    best = (groups @ every.T).amax(1)
    found = project(groups, pulses)
    assert (found.abs().sum(1) == pulses).all()
    assert torch.equal(found, found.round())
    ours = (groups * found).sum(1) / found.norm(dim=1)
    assert (ours >= best - 1e-6).float().mean() > 0.97
    assert (1 - ours.square()).sum() < 1.02 * (1 - best.square()).sum()


def test_pyramid_errs_far_less_than_rounding_in_the_same_bytes(trained):
    rounding = RoundToNearest(3, 64)
    pyramid = Pyramid(16, 21)
    assert pyramid.bytes(trained.shape) <= rounding.bytes(trained.shape)
    assert squared_error(pyramid, trained) < 0.62 * squared_error(rounding, trained)


def test_a_gain_of_eight_bits_costs_almost_nothing(trained):
    groups = trained.reshape(-1, 16)
    points = project(groups, 24)
    gains = (groups * points).sum(1, keepdim=True) / points.square().sum(1, keepdim=True)
    ideal = (gains * points - groups).square().sum()
    assert ideal <= squared_error(Pyramid(16, 24), trained) < 1.005 * ideal


def test_pyramid_refuses_indices_that_do_not_fit():
    with pytest.raises(ValueError, match="64 pulses in groups of 16 need an index of 66 bits"):
        Pyramid(16, 64)
    Pyramid(16, 53)
    with pytest.raises(ValueError, match="take fewer pulses or smaller groups"):
        Pyramid(16, 54)


# Power of two


def test_power_of_two_bytes():
    assert bits_per_weight(PowerOfTwo(3)) == 3 + 16 / 4096
    assert bits_per_weight(PowerOfTwo(3, 64)) == 3.25
    assert PowerOfTwo(3, 8).bytes((7, 13)) == math.ceil(7 * 13 * 3 / 8) + 2 * 7 * 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_weight_is_its_groups_scale_halved_and_never_zero(bits):
    matrix = draws(6, 100)
    matrix[2, :30] = 0.0
    matrix[4, 32:64] = 0.0
    operator = PowerOfTwo(bits, 32)
    found = operator.apply(matrix, NONE)
    scales = operator.pack(matrix, NONE)["scales"].float().repeat_interleave(32, 1)[:, :100]
    empty = torch.zeros_like(matrix, dtype=torch.bool)
    empty[4, 32:64] = True
    assert (found[empty] == 0).all()
    exponents = -(found / scales).abs().log2()[~empty]
    assert torch.equal(exponents, exponents.round())
    assert exponents.min() >= 0
    assert exponents.max() == 2 ** (bits - 1) - 1
    kept = (matrix != 0) & ~empty
    assert torch.equal(found[kept].sign(), matrix[kept].sign())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_power_of_two_scale_is_as_good_as_an_exhaustive_search(bits):
    matrix = torch.cat([draws(20, 120), draws(20, 120, seed=1) ** 3])
    levels = 2.0 ** -torch.arange(2 ** (bits - 1))
    sizes = matrix.abs()
    best = torch.full((40,), torch.inf)
    for factor in torch.logspace(-7, 0.5, 800, base=2):
        scaled = (sizes.amax(1, keepdim=True) * factor).unsqueeze(-1) * levels
        best = torch.minimum(best, (sizes.unsqueeze(-1) - scaled).square().amin(-1).sum(1))
    assert squared_error(PowerOfTwo(bits), matrix) == pytest.approx(best.sum().item(), rel=0.01)


def test_powers_of_two_come_back_unchanged():
    matrix = PowerOfTwo(3, 16).apply(draws(10, 70), NONE)
    assert torch.equal(PowerOfTwo(3, 16).apply(matrix, NONE), matrix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pyramid(0, 4), "group_size must be 1 to 256, got 0"),
        (lambda: Pyramid(4, 0), "pulses must be 1 to 256, got 0"),
        (lambda: Pyramid(4, 4, 9), "gain_bits must be 1 to 8, got 9"),
        (lambda: PowerOfTwo(0), "bits must be 1 to 6, got 0"),
        (lambda: PowerOfTwo(3, -1), "group_size must be >= 0, got -1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_labels():
    assert Pyramid(16, 32).label == "pvq16-k32-g8"
    assert PowerOfTwo(3).label == "shift3-row"
    assert PowerOfTwo(3, 64).label == "shift3-g64"

"""Mappers against published figures, and budgets that are met."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.mappers import box_project, entropic_map, range_map, smooth, spread_map

# LayerIF's influence scores of Mistral-7B by block, and what they are after smoothing.
RAW = [
    *(0, 0.6873, 0.6239, 0.7973, 0.6273, 0.5928, 0.7172, 0.8668),
    *(0.8004, 0.9685, 0.8682, 0.9335, 1, 0.8886, 0.9465, 0.8204),
    *(0.9136, 0.9278, 0.8381, 0.9114, 0.6531, 0.8611, 0.9333, 0.9411),
    *(0.936, 0.9045, 0.9212, 0.7918, 0.7849, 0.8254, 0.7898, 0.8395),
]
SMOOTHED = [
    *(0.0328, 0.5723, 0.7624, 0.7378, 0.6498, 0.6838, 0.6919, 0.8031),
    *(0.8723, 0.8932, 0.9228, 0.9439, 0.9428, 0.9332, 0.8999, 0.8894),
    *(0.8875, 0.9048, 0.8685, 0.8095, 0.7992, 0.836, 0.8801, 0.9501),
    *(0.9468, 0.916, 0.8693, 0.8342, 0.802, 0.7901, 0.801, 0.8401),
]


def test_smoothing_gives_layerifs_published_values():
    assert smooth(RAW) == pytest.approx(SMOOTHED, abs=1e-4)
    with pytest.raises(ValueError, match="7 blocks or more, got 6"):
        smooth(RAW[:6])


@pytest.mark.parametrize(
    ("epsilon", "least", "most"), [(0.1, 0.4206, 0.5141), (0.3, 0.2894, 0.5375)]
)
def test_layerifs_ratios_at_half_sparsity(epsilon, least, most):
    ratios = range_map(smooth(RAW), np.ones(32), 0.5, epsilon)
    assert (ratios.min(), ratios.max()) == pytest.approx((least, most), abs=1e-4)
    assert ratios.argmax() == 23
    assert ratios.mean() == pytest.approx(0.5)


def test_spread_maps_of_both_signs():
    assert spread_map([5, 3, 2, 1], 0.6, 0.08, sign=1) == pytest.approx([0.51, 0.59, 0.63, 0.67])
    assert spread_map([5, 3, 2, 1], 0.6, 0.08, sign=-1) == pytest.approx([0.69, 0.61, 0.57, 0.53])
    assert spread_map([2, 2, 2], 0.6, 0.08, sign=1) == pytest.approx([0.6] * 3)


def test_entropic_map_caps_and_refills():
    score, sizes = [0.05, 0.1, 0.2, 0.3], [1.0, 2.0, 1.0, 4.0]
    ratios = entropic_map(score, sizes, 0.3, epsilon=0.015)
    assert ratios.max() == pytest.approx(0.8)
    assert ratios @ np.array(sizes) == pytest.approx(0.3 * sum(sizes))
    assert list(ratios) == sorted(ratios, reverse=True)
    flat = entropic_map(score, sizes, 0.3, epsilon=1e6)
    assert flat == pytest.approx([0.3] * 4, rel=1e-4)
    with pytest.raises(ValueError, match=r"cap of 0\.2"):
        entropic_map(score, sizes, 0.3, epsilon=1.0, cap=0.2)


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=12),
    st.floats(0.0, 0.9),
    st.integers(0, 2**31),
)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_box_projection_meets_its_mean_and_keeps_the_order(ratios, mean, seed):
    sizes = np.random.default_rng(seed).integers(1, 100, len(ratios))
    found = box_project(ratios, sizes, mean)
    assert sizes @ found == pytest.approx(mean * sizes.sum(), abs=1e-9 * sizes.sum())
    assert (found >= 0).all()
    assert (found <= 0.95).all()
    assert all(a <= b for a, b in zip(found[np.argsort(ratios)], np.sort(found), strict=True))


def test_box_projection_refuses_a_mean_outside_the_box():
    with pytest.raises(ValueError, match=r"0\.99 lies outside 0\.0 to 0\.95"):
        box_project([0.5], [1], 0.99)

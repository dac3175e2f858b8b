"""Verdicts of races: against scipy's paired test, and how often they err."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from allocator.searches.racing import Verdict, judge


@pytest.mark.parametrize("count", [3, 4, 16])
@pytest.mark.parametrize("shift", [-1.0, -0.2, 0.0, 0.2, 1.0])
def test_it_is_the_one_sided_paired_t_test(count, shift):
    rng = np.random.default_rng(count)
    for _ in range(50):
        theirs = rng.normal(2.0, 1.0, count)
        ours = theirs + rng.normal(shift, 0.5, count)
        found = judge(ours, theirs, 0.05)
        if ttest_rel(ours, theirs, alternative="greater").pvalue < 0.05:
            assert found is Verdict.WORSE
        elif ttest_rel(ours, theirs, alternative="less").pvalue < 0.05:
            assert found is Verdict.BETTER
        else:
            assert found is Verdict.OPEN


def test_too_little_text_and_level_zero_leave_it_open():
    assert judge([5.0, 5.1], [1.0, 1.0], 0.05) is Verdict.OPEN
    assert judge([5.0, 5.1, 5.2, 5.3], [1.0, 1.0, 1.0, 1.0], 0.0) is Verdict.OPEN
    assert judge([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.05) is Verdict.OPEN
    assert judge([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], 0.05) is Verdict.WORSE


def test_a_failed_challenger_is_worse_and_a_failed_incumbent_stays_open():
    assert judge([math.inf], [1.0], 0.05) is Verdict.WORSE
    assert judge([1.0, 1.0, 1.0], [math.inf] * 3, 0.05) is Verdict.OPEN


def test_equal_assignments_are_called_no_more_often_than_the_level_says():
    rng = np.random.default_rng(0)
    called = [judge(rng.normal(size=8), rng.normal(size=8), 0.05) for _ in range(4000)]
    for side in (Verdict.BETTER, Verdict.WORSE):
        assert 0.035 < np.mean([found is side for found in called]) < 0.065

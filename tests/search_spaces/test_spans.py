"""Every operator says from where to where it goes."""

import pytest

from search_spaces.operators import OPERATORS
from search_spaces.spans import SPANS, bits_span


def test_every_operator_has_a_span():
    assert set(SPANS) == set(OPERATORS)


@pytest.mark.parametrize("name", SPANS)
def test_spans_are_of_the_operator_and_inside_16_bits(name):
    assert all(operator.name == name for operator in SPANS[name])
    least, most = bits_span(name)
    assert 0 < least <= most <= 16
    assert (least < most) == (name != "keep")

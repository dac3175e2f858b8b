"""Instances of every operator that the conformance suites run on; a new operator adds its line."""

from search_spaces.operators import Keep, RoundToNearest

CASES = (
    Keep(),
    Keep("float16"),
    *(RoundToNearest(bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(RoundToNearest(bits, 8, symmetric=False) for bits in (1, 2, 3, 5, 8)),
    RoundToNearest(3, 0),
    RoundToNearest(4, 0, symmetric=False),
    RoundToNearest(5, 1),
)


def case_id(operator):
    """A readable test id."""
    return f"{operator.label}-{operator.dtype}" if operator.name == "keep" else operator.label

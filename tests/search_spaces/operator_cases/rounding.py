"""Keeping and rounding."""

from operator_cases import Ladder
from search_spaces.operators import Keep, RoundToNearest

LADDERS = (
    Ladder(tuple(RoundToNearest(bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8))),
    Ladder(tuple(RoundToNearest(bits, 8, symmetric=False) for bits in (1, 2, 3, 5, 8))),
    Ladder((RoundToNearest(3, 0), RoundToNearest(5, 0), Keep())),
    Ladder((RoundToNearest(4, 0, symmetric=False), Keep("float16"))),
    Ladder((RoundToNearest(5, 1),)),
)

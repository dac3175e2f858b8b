"""Low rank plus a residual, low rank plus sparse columns, residual stacks, and nests of them."""

from operator_cases import Ladder, fisher_error
from search_spaces.operators import (
    Keep,
    LowRankPlus,
    LowRankSparseColumns,
    ResidualStack,
    RoundToNearest,
)


def input_error(error, stats):
    """Squared error weighted by the mean square of the inputs."""
    return (error.square() * stats.second_moment).sum().item()


INT3 = RoundToNearest(3)
INT8 = RoundToNearest(8)

LADDERS = (
    Ladder(tuple(LowRankPlus(rank, INT3) for rank in (1, 4, 16, 40))),
    Ladder(tuple(LowRankPlus(8, RoundToNearest(bits)) for bits in (2, 3, 4, 8))),
    Ladder(
        tuple(LowRankPlus(rank, INT3, INT8, iterations=3, weighted=True) for rank in (2, 8, 24)),
        fisher_error,
    ),
    Ladder(tuple(LowRankPlus(rank, INT3, smoothing=0.5) for rank in (2, 8, 24)), input_error),
    Ladder((LowRankPlus(4, LowRankPlus(4, INT3, INT8), iterations=2),)),
    Ladder((LowRankPlus(3, ResidualStack(2, 4), smoothing=1.0, weighted=True),)),
    Ladder((LowRankPlus(6, RoundToNearest(2), LowRankPlus(2, INT3, iterations=1)),)),
    Ladder(tuple(LowRankSparseColumns(rank, 0.1) for rank in (1, 4, 16, 40))),
    Ladder(tuple(LowRankSparseColumns(4, part, INT8, INT3) for part in (0.01, 0.2, 0.6, 1.0))),
    Ladder(
        tuple(LowRankSparseColumns(8, part, weighted=True) for part in (0.05, 0.3)), input_error
    ),
    Ladder((LowRankSparseColumns(4, 0.5, kept=LowRankPlus(2, INT3, Keep("float16"))),)),
    Ladder(tuple(ResidualStack(levels, 4) for levels in (1, 2, 3, 5, 8, 16))),
    Ladder(tuple(ResidualStack(3, rank) for rank in (1, 8, 16))),
    Ladder(tuple(ResidualStack(levels, 8, scaled=True) for levels in (1, 2, 4)), input_error),
)

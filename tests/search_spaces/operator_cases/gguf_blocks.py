"""ggml's block formats."""

from operator_cases import Ladder
from search_spaces.operators import GGUFBlock


def weighted_error(error, stats):
    """Squared error weighted by the second moment of the inputs, as an importance matrix has it."""
    return (error.square() * stats.second_moment).sum().item()


def ladder(*types):
    return tuple(GGUFBlock(kind) for kind in types)


LADDERS = (
    Ladder(ladder("tq1_0", "tq2_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")),
    Ladder(ladder("mxfp4", "q4_0", "q4_1", "q5_0", "q5_1")),
    Ladder(
        tuple(GGUFBlock(f"q{bits}_k", weighted=True) for bits in (2, 3, 4, 5, 6)), weighted_error
    ),
)

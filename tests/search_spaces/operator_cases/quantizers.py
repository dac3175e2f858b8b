"""Rounding to a grid with more thought: clipped, to the output error, decoupled, to quantiles."""

from operator_cases import Ladder, output_error, squared_error
from search_spaces.operators import GPTQ, ClippedRound, DecoupledRound, NormalFloat


def second_moment_error(error, stats):
    return (error.square() * stats.second_moment).sum().item()


WIDTHS = (2, 3, 4, 6, 8)
LADDERS = (
    Ladder(tuple(GPTQ(bits, 64) for bits in WIDTHS), output_error),
    Ladder(tuple(GPTQ(bits, 24, False, True) for bits in (1, *WIDTHS)), output_error),
    Ladder(tuple(GPTQ(bits, 0) for bits in (3, 4)), output_error),
    Ladder(tuple(GPTQ(3, group, False, False, 0.1) for group in (192, 96, 5)), output_error),
    Ladder(tuple(ClippedRound(bits, 64) for bits in WIDTHS), squared_error),
    Ladder(tuple(ClippedRound(bits, 0, False) for bits in (1, *WIDTHS)), squared_error),
    Ladder(tuple(ClippedRound(b, 16, weighted=True) for b in WIDTHS), second_moment_error),
    Ladder(tuple(NormalFloat(bits) for bits in range(2, 9))),
    Ladder(tuple(NormalFloat(3, 32, bits, "bfloat16", 16) for bits in (2, 3, 8))),
    Ladder(tuple(NormalFloat(4, block, 8, "float16", 5) for block in (64, 33, 16))),
    Ladder(tuple(DecoupledRound(bits, 64) for bits in (1, *WIDTHS)), output_error),
    Ladder(tuple(DecoupledRound(2, group) for group in (0, 160, 24)), output_error),
)

"""Codebooks, pyramids, powers of two, and a sparse part beside a dense one."""

from operator_cases import Ladder, fisher_error
from search_spaces.operators import (
    Codebook,
    DenseAndSparse,
    PowerOfTwo,
    Pyramid,
    RoundToNearest,
)

SHARES = (0.0, 0.005, 0.05, 0.4)

LADDERS = (
    Ladder(tuple(Codebook(bits) for bits in (1, 2, 3, 4, 6)), fisher_error),
    Ladder(tuple(Codebook(bits, weighted=False) for bits in (2, 4))),
    Ladder((Codebook(3, iterations=1),)),
    Ladder(tuple(DenseAndSparse(share, 0.0, RoundToNearest(3)) for share in SHARES)),
    Ladder(tuple(DenseAndSparse(0.002, s, Codebook(3)) for s in SHARES[1:]), fisher_error),
    Ladder((DenseAndSparse(0.3, 0.7, PowerOfTwo(2, 32)),)),
    Ladder(tuple(Pyramid(16, pulses) for pulses in (1, 4, 16, 24, 32, 53))),
    Ladder(tuple(Pyramid(8, pulses, 6) for pulses in (16, 256))),
    Ladder(tuple(Pyramid(16, 32, gain_bits) for gain_bits in (1, 2, 5))),
    Ladder((Pyramid(1, 5, 3), Pyramid(1, 5, 4))),
    Ladder(tuple(PowerOfTwo(bits) for bits in (1, 2, 3, 4, 6))),
    Ladder(tuple(PowerOfTwo(3, group_size) for group_size in (512, 48, 8))),
)

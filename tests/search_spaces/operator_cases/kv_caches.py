"""Caches of keys and values, one sequence of an odd number of tokens and channels."""

from operator_cases import UnitLadder
from search_spaces.operators import KVQuantize
from search_spaces.space import Member


def cache(*parts, shape):
    return tuple(Member("layer.attention", part, shape, cache=True) for part in parts)


UNIT_LADDERS = (
    UnitLadder(
        tuple(KVQuantize(bits, bits) for bits in (1, 2, 3, 4, 5, 6, 7, 8)),
        cache("keys", "values", shape=(130, 48)),
    ),
    UnitLadder(
        (KVQuantize(2, 1, 7), KVQuantize(2, 2, 7), KVQuantize(4, 2, 7), KVQuantize(4, 2, 7, 9)),
        cache("keys", "values", shape=(23, 13)),
    ),
    UnitLadder(
        (KVQuantize(2, 8, 32), KVQuantize(3, 1, 32), KVQuantize(3, 1, 16)),
        cache("keys", shape=(100, 8)),
    ),
    UnitLadder(
        (KVQuantize(8, 2, 16), KVQuantize(1, 3, 16), KVQuantize(1, 4, 16, 1000)),
        cache("values", shape=(5, 65)),
    ),
)

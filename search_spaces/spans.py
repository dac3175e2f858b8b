"""From where to where each operator goes: its cheapest and its dearest useful setting. No torch.

The problem: a list of names does not tell a user which of them can reach 2 bits. Every operator has
a pair of settings here, priced on one typical unit.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces.operators import (
    GPTQ,
    AnyOperator,
    ClippedRound,
    Codebook,
    DecoupledRound,
    DenseAndSparse,
    Dictionary,
    GGUFBlock,
    Keep,
    Kronecker,
    KVQuantize,
    LowRank,
    LowRankPlus,
    LowRankSparseColumns,
    MoDeGPT,
    NormalFloat,
    PowerOfTwo,
    Prune,
    PruneNM,
    Pyramid,
    ResidualStack,
    RoundToNearest,
    RowPrune,
    Shrink,
    SparseGPT,
)
from search_spaces.presets import TYPICAL_UNIT
from search_spaces.space import Member, Unit

_CACHE = Unit(
    "cache",
    tuple(Member("self_attn", name, (1, 8192, 1024), cache=True) for name in ("keys", "values")),
    0,
    "cache",
)

SPANS: Mapping[str, tuple[AnyOperator, AnyOperator]] = {
    "clipped_round": (ClippedRound(2, 128), ClippedRound(8, 32, symmetric=False)),
    "codebook": (Codebook(2), Codebook(6)),
    "decoupled": (DecoupledRound(2, 128), DecoupledRound(4, 32)),
    "dense_and_sparse": (
        DenseAndSparse(0.0005, 0.0, Codebook(2)),
        DenseAndSparse(0.05, 0.0, RoundToNearest(4)),
    ),
    "dictionary": (Dictionary(0.1), Dictionary(0.8)),
    "gguf": (GGUFBlock("tq1_0"), GGUFBlock("q8_0")),
    "gptq": (GPTQ(2, 128), GPTQ(8, 32, symmetric=False)),
    "keep": (Keep(), Keep()),
    "kronecker": (Kronecker(1), Kronecker(64)),
    "kv_quantize": (KVQuantize(2, 2), KVQuantize(8, 8)),
    "low_rank": (LowRank(0.05, factors=RoundToNearest(4)), LowRank(0.9)),
    "low_rank_plus": (
        LowRankPlus(8, RoundToNearest(2, 128), RoundToNearest(8)),
        LowRankPlus(128, RoundToNearest(8)),
    ),
    "low_rank_sparse_columns": (
        LowRankSparseColumns(32, 0.01),
        LowRankSparseColumns(512, 0.25),
    ),
    "modegpt": (MoDeGPT(0.25), MoDeGPT(0.9)),
    "normal_float": (NormalFloat(2, 64, 4, "bfloat16"), NormalFloat(8, 16, 8)),
    "power_of_two": (PowerOfTwo(2), PowerOfTwo(4, 64)),
    "prune": (Prune(0.9, values=RoundToNearest(4)), Prune(0.1)),
    "prune_n_m": (PruneNM(1, 4, values=RoundToNearest(4)), PruneNM(3, 4)),
    "pyramid": (Pyramid(16, 4), Pyramid(16, 53)),
    "residual_stack": (ResidualStack(1), ResidualStack(12)),
    "round_to_nearest": (RoundToNearest(2, 128), RoundToNearest(8, 32, symmetric=False)),
    "row_prune": (RowPrune(0.9, values=RoundToNearest(4)), RowPrune(0.1)),
    "shrink": (Shrink(0.25, values=RoundToNearest(4)), Shrink(0.9)),
    "sparse_gpt": (SparseGPT(0.9, values=RoundToNearest(4)), SparseGPT(0.1)),
}


def bits_span(name: str) -> tuple[float, float]:
    """Bits per weight (per element of a cache) of the two settings, all metadata included.

    Raises:
        KeyError: An operator of an outside package, which is not in the table.
    """
    sizes = []
    for operator in SPANS[name]:
        unit = TYPICAL_UNIT if not TYPICAL_UNIT.unfit(operator) else _CACHE
        sizes.append(8 * unit.bytes(operator) / unit.num_elements)
    return min(sizes), max(sizes)

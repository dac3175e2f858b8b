"""Pruning with every score and storage, SparseGPT, and structured removal."""

from operator_cases import Ladder, UnitLadder, fisher_error, output_error
from search_spaces.operators import Keep, Prune, PruneNM, RoundToNearest, Shrink, SparseGPT
from search_spaces.space import Member

SPARSITIES = (1.0, 0.97, 0.8, 0.6, 0.5, 0.25, 0.0)
INT4 = RoundToNearest(4, 32)


def moment_error(error, stats):
    """Squared error weighted by the second moment of the inputs: what Wanda's score adds up to."""
    return (error.square() * stats.second_moment).sum().item()


def mlp(*names, hidden=24, channels=40):
    """Members of an MLP: projections in, then the one out."""
    *sources, out = names
    members = [Member(f"block.mlp.{name}", "weight", (channels, hidden)) for name in sources]
    return (*members, Member(f"block.mlp.{out}", "weight", (hidden, channels)))


def attention(heads=6, groups=3, head_dim=4, hidden=24):
    """Members of an attention block, not in the usual order."""
    rows = {"o_proj": hidden, "q_proj": heads * head_dim}
    rows |= dict.fromkeys(("k_proj", "v_proj"), groups * head_dim)
    columns = {"o_proj": heads * head_dim}
    return tuple(
        Member(f"block.attn.{name}", "weight", (rows[name], columns.get(name, hidden)))
        for name in rows
    )


LADDERS = (
    Ladder(tuple(Prune(sparsity) for sparsity in SPARSITIES)),
    Ladder(tuple(Prune(sparsity, pattern="matrix") for sparsity in SPARSITIES)),
    Ladder(tuple(Prune(sparsity, "wanda") for sparsity in SPARSITIES[1:]), moment_error),
    Ladder(tuple(Prune(s, "fisher", "matrix") for s in SPARSITIES[1:]), fisher_error),
    Ladder((Prune(0.5, "d_pruner"),)),
    Ladder(tuple(Prune(s, values=RoundToNearest(3, 16, symmetric=False)) for s in (0.9, 0.5))),
    Ladder((Prune(0.5, pattern="matrix", values=INT4), Prune(0.5, values=Keep("float16")))),
    Ladder(tuple(PruneNM(n, 4) for n in (1, 2, 3))),
    Ladder(tuple(PruneNM(n, 8, "wanda") for n in (1, 3, 7)), moment_error),
    Ladder((PruneNM(2, 4, "d_pruner", INT4),)),
    Ladder(tuple(SparseGPT(sparsity) for sparsity in SPARSITIES[1:]), output_error),
    Ladder((SparseGPT(0.5, block=5, values=INT4),)),
    Ladder((SparseGPT(0.75, n=1, m=4), SparseGPT(0.5, n=2, m=4)), output_error),
)

KEPT = (0.0, 0.2, 0.5, 0.8, 1.0)
UNIT_LADDERS = (
    UnitLadder(tuple(Shrink(keep) for keep in KEPT), mlp("gate_proj", "up_proj", "down_proj")),
    UnitLadder(tuple(Shrink(keep, multiple=1) for keep in KEPT), mlp("fc1", "fc2")),
    UnitLadder(tuple(Shrink(keep, head_dim=4) for keep in (0.0, 0.33, 0.67, 1.0)), attention()),
    UnitLadder(
        tuple(Shrink(0.5, values=RoundToNearest(bits, 16)) for bits in (2, 4, 8)),
        mlp("up_proj", "down_proj"),
    ),
)

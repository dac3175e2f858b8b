"""Low rank under every weighting, Kronecker products, dictionaries and MoDeGPT's modules."""

from operator_cases import Ladder, UnitLadder, output_error
from search_spaces.operators import (
    GPTQ,
    Dictionary,
    Keep,
    Kronecker,
    LowRank,
    MoDeGPT,
    RoundToNearest,
)
from search_spaces.space import Member

KEPT = (0.25, 0.5, 0.75, 1.0)
INT8 = RoundToNearest(8, 16)


def input_fisher_error(error, stats):
    """Squared error weighted by each input's Fisher information: what FWSVD minimises."""
    return (error.square() * stats.fisher.sum(0)).sum().item()


def strong_input_error(error, stats):
    """Squared error behind the Hessian: what CorDA minimises."""
    return (error @ stats.hessian).square().sum().item()


def mlp(*names, hidden=24, channels=40):
    """Members of an MLP by their names; ``down_proj`` reads the channels."""
    shapes = {"down_proj": (hidden, channels)}
    return tuple(
        Member(f"block.mlp.{name}", "weight", shapes.get(name, (channels, hidden)))
        for name in names
    )


def attention(heads=6, groups=3, head_dim=8, hidden=24):
    """Members of an attention block, not in the usual order."""
    queries, keys = heads * head_dim, groups * head_dim
    shapes = {
        "o_proj": (hidden, queries),
        "k_proj": (keys, hidden),
        "q_proj": (queries, hidden),
        "v_proj": (keys, hidden),
    }
    return tuple(Member(f"block.attn.{name}", "weight", shape) for name, shape in shapes.items())


def down_error(errors, stats):
    """Output error of the projection out of an MLP, whose members end with it."""
    return output_error(errors[-1], stats[-1])


def query_key_error(errors, stats):
    """Error of queries and keys; values and outputs are turned, and compare as products only."""
    return sum(output_error(errors[i], stats[i]) for i in (1, 2))


LADDERS = (
    Ladder(tuple(LowRank(keep) for keep in KEPT)),
    Ladder(tuple(LowRank(keep, multiple=1) for keep in (0.1, 0.3, 0.9))),
    Ladder(tuple(LowRank(keep, "fisher") for keep in KEPT), input_fisher_error),
    Ladder(tuple(LowRank(keep, "whitened") for keep in KEPT), output_error),
    Ladder(tuple(LowRank(keep, "output") for keep in KEPT), output_error),
    Ladder(tuple(LowRank(keep, "corda") for keep in KEPT), strong_input_error),
    Ladder((LowRank(0.5, factors=RoundToNearest(3, 0)), LowRank(0.5, factors=INT8))),
    Ladder(tuple(LowRank(k, "whitened", factors=GPTQ(4, 16)) for k in (0.5, 0.9)), output_error),
    Ladder(tuple(Kronecker(terms) for terms in (1, 4, 16, 60))),
    Ladder(tuple(Kronecker(keep=keep) for keep in KEPT)),
    Ladder((Kronecker(2, columns_a=2), Kronecker(2, rows_a=1, columns_a=2))),
    Ladder((Kronecker(keep=0.7, factors=INT8), Kronecker(keep=0.7, factors=Keep("float16")))),
    Ladder(tuple(Dictionary(keep) for keep in KEPT), output_error),
    Ladder((Dictionary(0.5, 4.0, 2), Dictionary(0.9, 4.0, 2)), output_error),
    Ladder((Dictionary(0.9, 1.0, 3, INT8), Dictionary(0.9, 1.0, 3)), output_error),
)

UNIT_LADDERS = (
    UnitLadder(
        tuple(MoDeGPT(keep) for keep in KEPT), mlp("gate_proj", "up_proj", "down_proj"), down_error
    ),
    UnitLadder(
        tuple(MoDeGPT(keep, multiple=1) for keep in KEPT), mlp("up_proj", "down_proj"), down_error
    ),
    UnitLadder(
        tuple(MoDeGPT(keep, head_dim=8, multiple=2) for keep in KEPT), attention(), query_key_error
    ),
    UnitLadder((MoDeGPT(0.5, head_dim=8, multiple=4, values=INT8),), attention(groups=6)),
)

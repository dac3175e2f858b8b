"""Named menus: what a unit may become. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.operators import (
    GPTQ,
    AnyOperator,
    ClippedRound,
    Codebook,
    Keep,
    LowRank,
    LowRankPlus,
    MoDeGPT,
    Prune,
    RoundToNearest,
    RowPrune,
    SparseGPT,
)
from search_spaces.operators.gguf_block import gguf_menu
from search_spaces.registry import Registry
from search_spaces.space import Member, Unit

_BITS = (2, 3, 4, 5, 6, 8)
_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3)
_KEEPS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
_MLP = (("gate_proj", (14336, 4096)), ("up_proj", (14336, 4096)), ("down_proj", (4096, 14336)))
TYPICAL_UNIT = Unit("mlp", tuple(Member(name, "weight", s) for name, s in _MLP), 0, "mlp")
"""The feed-forward matrices of an 8-billion-parameter model, by which menus are described."""


@dataclass(frozen=True)
class Preset:
    """A menu under a name.

    Attributes:
        name: What ``--space`` takes.
        summary: One line for lists.
        operators: Offered for every unit that they fit; every menu has ``Keep``, which a user may
            bar.
        ties: How matrices are grouped into units when the user does not say.
        kv: The cache is searched too, where there is a context that it is for.
    """

    name: str
    summary: str
    operators: tuple[AnyOperator, ...]
    ties: str = "none"
    kv: bool = False

    @property
    def bits_per_weight(self) -> tuple[float, float]:
        """Least and most bits per weight of a typical unit, all metadata included."""
        sizes = [
            8 * TYPICAL_UNIT.bytes(o) / TYPICAL_UNIT.num_weights
            for o in self.operators
            if not TYPICAL_UNIT.unfit(o)
        ]
        return min(sizes), max(sizes)


def _bits(group_size: int, *, symmetric: bool) -> tuple[AnyOperator, ...]:
    return tuple(RoundToNearest(bits, group_size, symmetric) for bits in _BITS)


def _gptq() -> tuple[AnyOperator, ...]:
    return (*(GPTQ(bits, act_order=True) for bits in _BITS[:-1]), RoundToNearest(8))


def _sparsity() -> tuple[AnyOperator, ...]:
    return tuple(Prune(share, "wanda") for share in _SHARES)


def _sparse_gpt() -> tuple[AnyOperator, ...]:
    return tuple(SparseGPT(share) for share in _SHARES)


def _rows() -> tuple[AnyOperator, ...]:
    # A row that loses almost everything costs more than estimated: half the even share stays.
    return tuple(
        RowPrune(share, score="factored_fisher", floor=round((1 - share) / 2, 3))
        for share in _SHARES
    )


def _rank() -> tuple[AnyOperator, ...]:
    return tuple(LowRank(keep, "whitened") for keep in _KEEPS)


def _structured() -> tuple[AnyOperator, ...]:
    return tuple(MoDeGPT(keep) for keep in (0.5, 0.625, 0.75, 0.875))


def _depth() -> tuple[AnyOperator, ...]:
    return (Prune(1.0, "magnitude"),)


def _joint() -> tuple[AnyOperator, ...]:
    """Of each family what is near the front of bytes against error on a real model's matrices."""
    four = RoundToNearest(4)
    return (
        LowRank(0.25, "whitened", factors=four),
        *(SparseGPT(share, values=four) for share in (0.75, 0.625, 0.5)),
        *(Codebook(bits) for bits in (2, 3, 4)),
        *(GPTQ(bits, act_order=True) for bits in (3, 4, 5)),
        LowRankPlus(8, ClippedRound(2, weighted=True), RoundToNearest(8)),
        RoundToNearest(6),
        RoundToNearest(8),
    )


def _preset(
    name: str,
    summary: str,
    operators: tuple[AnyOperator, ...],
    *,
    ties: str = "none",
    kv: bool = False,
) -> Preset:
    return Preset(name, summary, (*operators, Keep()), ties, kv)


PRESETS: Registry[Preset] = Registry(
    "space",
    {
        preset.name: preset
        for preset in (
            _preset(
                "bits",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 64",
                _bits(64, symmetric=True),
            ),
            _preset("bits-asymmetric", "the same with zero points", _bits(64, symmetric=False)),
            _preset(
                "bits-g32",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 32",
                _bits(32, symmetric=True),
            ),
            _preset(
                "bits-g128",
                "round to nearest at 2, 3, 4, 5, 6 or 8 bits in groups of 128",
                _bits(128, symmetric=True),
            ),
            _preset("bits-gptq", "GPTQ at 2 to 6 bits in groups of 64; 8 bits rounded", _gptq()),
            _preset(
                "gguf",
                "block formats of llama.cpp, Q2_K to Q8_0; K-quants where 256 divides the columns",
                gguf_menu(),
                ties="llama.cpp",
            ),
            _preset("sparsity", "Wanda, a bitmap and the kept weights at 16 bits", _sparsity()),
            _preset("sparsity-gpt", "the same with SparseGPT's update", _sparse_gpt()),
            _preset(
                "rows",
                "Wanda, each row of a matrix its own share, kept weights at 16 bits",
                _rows(),
            ),
            _preset("rank", "SVD of the whitened matrix (SVD-LLM), factors at 16 bits", _rank()),
            _preset(
                "structured",
                "MoDeGPT: narrower attention and feed-forward blocks, dense at the new shape",
                _structured(),
                ties="modules",
            ),
            _preset(
                "depth",
                "attention and feed-forward parts of blocks, each kept at 16 bits or dropped",
                _depth(),
                ties="modules",
            ),
            _preset("kv", "bits of the cache of each layer; the weights stay dense", (), kv=True),
            _preset(
                "joint",
                "bits, codebooks, sparsity x bits, rank x bits; the cache too, given --context",
                _joint(),
                kv=True,
            ),
        )
    },
    entry_point_group="model_allocator.spaces",
)

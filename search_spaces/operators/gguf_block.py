"""GGUF block formats: what llama.cpp stores and computes with.

The problem: a plan for llama.cpp is only as good as the agreement between the numbers it was
scored with and those llama.cpp will read. So this stores ggml's own blocks, byte by byte, and its
encoders follow ggml's reference quantizer (:mod:`gguf_codecs`, :mod:`gguf_k_quants`).

llama.cpp replaces a type whose block does not divide the columns, with a warning only, by one of
blocks of 32 (see ``FALLBACK``), and by float16 where that does not divide them either. SmolLM2-135M
has 576 columns in most matrices, where no K-quant fits. Such a type is unfit here: the menu has
the replacement under its own name and price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, PackedOperator, Statistics, required
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS: Mapping[str, tuple[int, int]] = {
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "mxfp4": (32, 17),
    "q4_0": (32, 18),
    "q4_k": (256, 144),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_k": (256, 176),
    "q5_1": (32, 24),
    "q6_k": (256, 210),
    "q8_0": (32, 34),
}
"""Weights of a block and its bytes, by type, from cheap to dear."""

FALLBACK: Mapping[str, str] = {
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""What llama.cpp stores instead where blocks of 256 do not divide the columns."""

_K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
_CHUNK_WEIGHTS = 2**18  # what one pass of an encoder works on: few enough to stay in the cache


@dataclass(frozen=True)
class GGUFBlock(PackedOperator):
    """One of ggml's block formats along each row.

    Attributes:
        type: ggml's name of the type in lower case, such as ``q4_k``.
        weighted: Choose the scales of a K-quant by the second moment of the inputs, as
            llama-quantize does with an importance matrix.
    """

    type: str
    weighted: bool = False

    name: ClassVar[str] = "gguf"

    def __post_init__(self) -> None:
        if self.type not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"gguf: type must be one of {known}, got {self.type!r}")
        if self.weighted and self.type not in _K_QUANTS:
            raise ValueError(
                f"gguf: weighted must be false unless the type is one of {', '.join(_K_QUANTS)}, "
                f"got {self.weighted} for {self.type}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The second moment, if weighted."""
        return frozenset({"second_moment"} if self.weighted else ())

    @property
    def label(self) -> str:
        """The name of the type, with ``-imatrix`` when weighted."""
        return f"{self.type}-imatrix" if self.weighted else self.type

    def unfit(self, shape: Matrix) -> str:
        """Blocks do not cross rows: they must divide the columns."""
        width, _ = BLOCKS[self.type]
        if shape[1] % width == 0:
            return ""
        reason = f"{self.type} needs columns in multiples of {width}, got {shape[1]}"
        instead = FALLBACK.get(self.type)
        if instead is None or shape[1] % BLOCKS[instead][0]:
            return reason
        return f"{reason}; llama.cpp would store {instead} instead"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The blocks: ``m (n / block) bytes``."""
        rows, columns = shape
        width, size = BLOCKS[self.type]
        return (StoredTensor("blocks", "U8", (rows, columns // width * size)),)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The blocks, row by row."""
        import torch

        rows, columns = weight.shape
        importance = None
        if self.weighted:
            importance = required(stats, "second_moment", self.label).to(weight.device).float()
        chunk = max(1, _CHUNK_WEIGHTS // columns)
        parts = [self._encode(part.float(), importance) for part in torch.split(weight, chunk)]
        return {"blocks": torch.cat(parts).reshape(rows, -1)}

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """What ggml reads: float32."""
        from search_spaces.operators import gguf_codecs, gguf_k_quants

        _, size = BLOCKS[self.type]
        blocks = packed["blocks"].reshape(-1, size)
        decode = gguf_k_quants.decode if self.type in _K_QUANTS else gguf_codecs.decode
        return decode(self.type, blocks).reshape(shape)

    def _encode(self, rows: Tensor, importance: Tensor | None) -> Tensor:
        """(rows, columns) float32 -> (blocks, bytes) uint8."""
        from search_spaces.operators import gguf_codecs, gguf_k_quants

        blocks = rows.reshape(-1, BLOCKS[self.type][0])
        if self.type not in _K_QUANTS:
            return gguf_codecs.encode(self.type, blocks)
        if importance is not None:
            importance = importance.expand_as(rows).reshape(blocks.shape)
        return gguf_k_quants.encode(self.type, blocks, importance)


def gguf_menu(*, weighted: bool = False) -> tuple[GGUFBlock, ...]:
    """Types worth choosing between, from cheap to dear: K-quants, and blocks of 32 beside them.

    Args:
        weighted: K-quants with an importance matrix.

    Returns:
        Operators for every unit. Where columns are no multiple of 256 the K-quants are unfit and
        4 bits are the least there is. The ternary types are not offered: they are for models
        trained so.
    """
    types = ("q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0")
    return tuple(GGUFBlock(kind, weighted=weighted and kind in _K_QUANTS) for kind in types)

"""Keep: store the matrix as it is, at 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from search_spaces.operators.base import Matrix, PackedOperator, Statistics
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Keep(PackedOperator):
    """The dense matrix in a 16-bit float.

    Attributes:
        dtype: The stored type. bfloat16 keeps float32's range; float16 has more precision.
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    name: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise ValueError(f"keep: dtype must be bfloat16 or float16, got {self.dtype!r}")

    @property
    def label(self) -> str:
        """``keep``."""
        return "keep"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """One dense 16-bit tensor."""
        return (StoredTensor("weight", _STORED[self.dtype], shape),)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The weight in the stored type."""
        del stats
        import torch

        return {"weight": weight.to(getattr(torch, self.dtype)).contiguous()}

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """The stored weight in float32."""
        return packed["weight"].float().reshape(shape)

"""Dense and sparse: the few weights that matter most in 16 bits, the rest by another operator.

The problem: one outlier widens the range that a whole group is quantized in, and a few weights
carry most of the Fisher. SqueezeLLM (Kim et al., 2024, section 4.2) takes out the weights of
largest magnitude and those of largest Fisher, stores them as a sparse matrix, and quantizes what is
left. The two are added: the sparse part holds what the dense part lacks at its places, so that a
product is a dense and a sparse one and no place is masked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Matrix, Operator, PackedOperator, Statistics, required
from search_spaces.operators.keep import Keep
from search_spaces.operators.nested import pack_part, part_layout, unpack_part
from search_spaces.operators.sparse_storage import SparseStorage
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

_DENSE = "dense"
_VALUES = Keep("float16")
_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class DenseAndSparse(PackedOperator):
    """A sparse float16 matrix of outliers and sensitive weights, and a compressed rest.

    How many are taken out follows from the shape, so that the bytes do. In the dense part they are
    zero and, to an operator that looks at the Fisher, weightless.

    Attributes:
        outliers: Share of the weights to take out for their magnitude, 0 to 1.
        sensitive: Share to take out of the others for their Fisher, 0 to 1.
        dense: Stores the rest.
    """

    outliers: float
    sensitive: float
    dense: Operator

    name: ClassVar[str] = "dense_and_sparse"

    def __post_init__(self) -> None:
        for share in ("outliers", "sensitive"):
            value = getattr(self, share)
            if not 0 <= value <= 1:
                raise ValueError(f"dense_and_sparse: {share} must be 0 to 1, got {value}")
        if self.outliers + self.sensitive > 1:
            raise ValueError(
                f"dense_and_sparse: outliers + sensitive must be at most 1, "
                f"got {self.outliers} + {self.sensitive}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the dense part needs and, for sensitive weights, the Fisher."""
        return self.dense.needs | ({"fisher"} if self.sensitive > 0 else frozenset())

    @property
    def label(self) -> str:
        """For example ``kmeans3-fisher+out0.45%+sens0.05%``."""
        shares = (("out", self.outliers), ("sens", self.sensitive))
        return self.dense.label + "".join(f"+{kind}{100 * share:g}%" for kind, share in shares)

    def unfit(self, shape: Matrix) -> str:
        """Why the dense part cannot be stored, or nothing if it can."""
        return self.dense.unfit(shape)

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """The dense part and the sparse one, which is compressed rows while it is sparse.

        ``dense + 4 (m + 1) + (2 + i) nnz`` bytes, with indices of i = 2 bytes up to 65536 columns
        and 4 beyond, or less where a bitmap or a dense matrix is smaller.
        """
        return (*part_layout(_DENSE, self.dense, shape), *self._sparse(shape).layout())

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """Dense plus sparse, in the weight's own dtype."""
        import torch

        full = weight.float()
        mask = self._select(full, stats)
        dense = self.dense.apply(full * ~mask, _without(stats, mask))
        lacking = (full - dense).clamp_(-_LARGEST, _LARGEST).to(torch.float16)
        return (dense + lacking * mask).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """The tensors of both parts."""
        rows, columns = weight.shape
        full = weight.float()
        mask = self._select(full, stats)
        packed = pack_part(_DENSE, self.dense, full * ~mask, _without(stats, mask))
        dense = unpack_part(_DENSE, self.dense, packed, (rows, columns)).to(full)
        lacking = (full - dense).clamp_(-_LARGEST, _LARGEST)
        return packed | self._sparse((rows, columns)).encode(lacking, mask, None)

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        dense = unpack_part(_DENSE, self.dense, packed, shape)
        return dense + self._sparse(shape).decode(packed).to(dense)

    def _counts(self, shape: Matrix) -> tuple[int, int]:
        """Outliers and sensitive weights of a matrix, each to the nearest; halves up."""
        num_weights = shape[0] * shape[1]
        num_outliers = int(num_weights * self.outliers + 0.5)
        num_sensitive = int(num_weights * self.sensitive + 0.5)
        return num_outliers, min(num_sensitive, num_weights - num_outliers)

    def _sparse(self, shape: Matrix) -> SparseStorage:
        return SparseStorage(shape, sum(self._counts(shape)), _VALUES)

    def _select(self, weight: Tensor, stats: Statistics) -> Tensor:
        """(rows, columns) bool, true for what the sparse part holds."""
        from search_spaces.operators.prune import keep_highest

        rows, columns = weight.shape
        num_outliers, num_sensitive = self._counts((rows, columns))
        mask = keep_highest(weight.abs().reshape(1, -1), num_outliers)
        if self.sensitive > 0:
            fisher = required(stats, "fisher", self.name).to(weight).reshape(1, -1)
            mask = mask | keep_highest(fisher.masked_fill(mask, -1.0), num_sensitive)
        return mask.reshape(rows, columns)


def _without(stats: Statistics, mask: Tensor) -> Statistics:
    """The statistics for the dense part, to which what was taken out does not matter."""
    if stats.fisher is None:
        return stats
    return replace(stats, fisher=stats.fisher.to(mask.device) * ~mask)

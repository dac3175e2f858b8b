"""DecoupleQ: integers and the floats that scale them, fitted in turn to the layer's output.

The problem: at 2 bits a grid taken from the range of a group is far from the best one, and the best
one depends on the integers. ``w = s q + z`` is a least-squares problem in (s, z) given q, and an
integer one in q given (s, z); neither step can raise the output error ``tr(E H E')``. Guo et al.,
"decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer
and Floating Points", equations 5 to 9. The integers are fitted by exact coordinate descent here,
where the paper uses projected gradients and a rounding pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from search_spaces.operators.base import Matrix, PackedOperator, Statistics, required
from search_spaces.operators.gptq import GPTQ
from search_spaces.operators.hessian import output_errors
from search_spaces.operators.integer_grid import grouped, storable
from search_spaces.storage import StoredTensor, num_groups, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 4
_SWEEPS = 2
_BLOCK = 128
_DAMPING = 0.01  # of the mean diagonal; without it, directions no token took would be free
_RIDGE = 1e-5  # of a unit diagonal; a group of equal integers does not tell s from z
_CHUNK_ELEMENTS = 2**24


class _Fit(NamedTuple):
    """A whole solution, float32: w = scales * integers + offsets.

    Attributes:
        integers: (rows, columns) from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.
        scales: (rows, groups), either sign, as float16 holds them.
        offsets: (rows, groups) likewise.
    """

    integers: Tensor
    scales: Tensor
    offsets: Tensor

    def dense(self, group_size: int) -> Tensor:
        """(rows, columns) what it stands for."""
        groups = grouped(self.integers, group_size)
        dense = groups * self.scales[..., None] + self.offsets[..., None]
        return dense.flatten(1)[:, : self.integers.shape[1]]


@dataclass(frozen=True)
class DecoupledRound(PackedOperator):
    """Integers with a float scale and a float offset per group, fitted to the output error.

    Starts from asymmetric GPTQ in activation order and keeps, row by row, the best solution seen.

    Attributes:
        bits: Width of a code, 1 to 8.
        group_size: Consecutive weights of a row that share scale and offset; 0 means the whole
            row. The last group of a row may be short.
    """

    bits: int
    group_size: int = 64

    name: ClassVar[str] = "decoupled"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"decoupled: bits must be 1 to 8, got {self.bits}")
        if self.group_size < 0:
            raise ValueError(f"decoupled: group_size must be >= 0, got {self.group_size}")

    @property
    def label(self) -> str:
        """For example ``decoupled2-g64``."""
        return f"decoupled{self.bits}-{'row' if self.group_size == 0 else f'g{self.group_size}'}"

    def layout(self, shape: Matrix) -> tuple[StoredTensor, ...]:
        """Packed codes, float16 scales and offsets.

        ``ceil(m n b / 8) + 4 m G`` bytes with ``G = ceil(n / group_size)``.
        """
        rows, columns = shape
        groups = num_groups(columns, self.group_size)
        return (
            StoredTensor("codes", "U8", (packed_bytes(rows * columns, self.bits),)),
            StoredTensor("scales", "F16", (rows, groups)),
            StoredTensor("offsets", "F16", (rows, groups)),
        )

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        """The fitted matrix, in the weight's own dtype.

        Raises:
            ValueError: There is no Hessian, or it is not finite.
        """
        return self._fit(weight, stats).dense(self.group_size).to(weight.dtype)

    def pack(self, weight: Tensor, stats: Statistics) -> Mapping[str, Tensor]:
        """Codes bit-packed, floats in float16."""
        import torch

        from search_spaces.operators.packing import pack_bits

        fit = self._fit(weight, stats)
        return {
            "codes": pack_bits(fit.integers.flatten() + 2 ** (self.bits - 1), self.bits),
            "scales": fit.scales.to(torch.float16),
            "offsets": fit.offsets.to(torch.float16),
        }

    def unpack(self, packed: Mapping[str, Tensor], shape: Matrix) -> Tensor:
        """(rows, columns) float32 from the packed tensors."""
        from search_spaces.operators.packing import unpack_bits

        codes = unpack_bits(packed["codes"], self.bits, shape[0] * shape[1]).reshape(shape)
        scales, offsets = (packed[name].to(codes) for name in ("scales", "offsets"))
        return _Fit(codes - 2 ** (self.bits - 1), scales, offsets).dense(self.group_size)

    def _fit(self, weight: Tensor, stats: Statistics) -> _Fit:
        """The best of the start and of what each round leads to, for every row."""
        import torch

        hessian = required(stats, "hessian", self.name).to(weight.device).float()
        weight = weight.float()
        now = best = self._start(weight, stats)
        least = output_errors(now.dense(self.group_size) - weight, hessian)
        damped = hessian.clone()
        damped.diagonal().add_((_DAMPING * hessian.diagonal().mean()).clamp_(min=1e-20))
        previous = least.sum().item()
        for _ in range(_ROUNDS):
            now = _fit_floats(now, weight, damped, self.group_size)
            now = self._fit_integers(now, weight, damped)
            errors = output_errors(now.dense(self.group_size) - weight, hessian)
            better = (errors < least)[:, None]
            best = _Fit(*(torch.where(better, a, b) for a, b in zip(now, best, strict=True)))
            least = torch.minimum(errors, least)
            total = errors.sum().item()
            if total >= previous:
                break
            previous = total
        return best

    def _start(self, weight: Tensor, stats: Statistics) -> _Fit:
        """GPTQ's solution, its integers centred so that a float16 offset is fine enough."""
        start = GPTQ(self.bits, self.group_size, symmetric=False, act_order=True)
        codes, scales, zeros = start.quantize(weight, stats)
        half = 2 ** (self.bits - 1)
        offsets = scales.mul(half - zeros).squeeze(-1)
        integers = codes.sub(half).flatten(1)[:, : weight.shape[1]]
        return _stored(integers, scales.squeeze(-1), offsets)

    def _fit_integers(self, fit: _Fit, weight: Tensor, hessian: Tensor) -> _Fit:
        """Sweeps over the columns: every weight at its best integer with all others held.

        Works on the transpose, where a column is contiguous, and lazily: within a block only the
        slopes of its own columns follow each step.
        """
        half = 2 ** (self.bits - 1)
        columns = weight.shape[1]
        slopes = hessian @ (fit.dense(self.group_size) - weight).T
        integers = fit.integers.T.clone()
        width = self.group_size or columns
        scales = fit.scales.T.repeat_interleave(width, 0)[:columns]
        for start in [*range(0, columns, _BLOCK)] * _SWEEPS:
            block = slice(start, start + _BLOCK)
            local, slope, before = hessian[block, block], slopes[block].clone(), integers[block]
            after = before.clone()
            for i in range(len(after)):
                scale = scales[start + i]
                after[i].sub_(slope[i] / (local[i, i] * scale)).round_().clamp_(-half, half - 1)
                step = (after[i] - before[i]).mul_(scale)
                slope[i + 1 :].addr_(local[i, i + 1 :], step)
            slopes.addmm_(hessian[:, block], (after - before).mul_(scales[block]))
            integers[block] = after
        return fit._replace(integers=integers.T)


def _fit_floats(fit: _Fit, weight: Tensor, hessian: Tensor, group_size: int) -> _Fit:
    """Scales and offsets of least output error for these integers, all groups of a row together.

    Solves for the change from the present ones, so that what the integers leave undetermined stays
    as it is. One (2 groups, 2 groups) system per row, in float64.
    """
    import torch
    from torch.nn.functional import pad

    columns, groups = weight.shape[1], fit.scales.shape[1]
    width = group_size or columns
    missing = groups * width - columns
    full = pad(hessian, (0, missing, 0, missing))
    ones = full.reshape(groups, width, groups, width).sum((1, 3))
    residual = grouped((weight - fit.dense(group_size)) @ hessian, group_size)
    size = max(1, _CHUNK_ELEMENTS // max(groups * width, 4 * groups * groups))
    changes = []
    for start in range(0, len(weight), size):
        integers = grouped(fit.integers[start : start + size], group_size)
        slope = residual[start : start + size]
        system = full.new_empty(len(slope), 2, groups, 2, groups)
        system[:, 1, :, 1] = ones
        for group in range(groups):
            rows = full[group * width : (group + 1) * width]
            through = (integers[:, group] @ rows).reshape(integers.shape)
            system[:, 0, group, 0] = (through * integers).sum(-1)
            system[:, 0, group, 1] = system[:, 1, :, 0, group] = through.sum(-1)
        right = torch.cat([(slope * integers).sum(-1), slope.sum(-1)], 1).double()
        changes.append(_solve(system.reshape(len(slope), 2 * groups, -1).double(), right))
    scales, offsets = torch.cat(changes).float().chunk(2, 1)
    return _stored(fit.integers, fit.scales + scales, fit.offsets + offsets)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """(rows, unknowns) solution of positive semi-definite systems, with a little ridge.

    Scaled to a unit diagonal first: a scale's entry is the square of integers up to 128.
    """
    import torch

    norm = system.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt()
    unit = system * norm[:, :, None] * norm[:, None, :]
    unit.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    solution: Tensor = norm * torch.linalg.solve(unit, norm * right)
    return solution


def _stored(integers: Tensor, scales: Tensor, offsets: Tensor) -> _Fit:
    """The floats after a round trip through float16; no scale becomes zero."""
    import torch

    limit = torch.finfo(torch.float16).max
    scales = storable(scales.abs()).copysign(scales)
    return _Fit(integers, scales, offsets.clamp(-limit, limit).half().float())

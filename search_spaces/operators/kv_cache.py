"""KV cache quantization: asymmetric, keys per channel and values per token (KIVI).

The problem: at long contexts the cache outweighs the model, and keys and values want different
treatment. A few channels of the keys are large at every token, so keys share a scale along tokens,
channel by channel; values have no such channels and share one along channels, token by token
(KIVI, ICML 2024, section 3). Both are stored as codes with a float16 scale and offset per group:
``2 B T C b / 8`` bytes of codes and ``2 B T C / g * 4`` of scales and offsets for whole groups.

Keys are cached after the rotary embedding, as ``transformers`` does. The channels of all heads lie
side by side, so groups of values end at heads only where ``group_size`` divides a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from search_spaces.operators.base import Statistics
from search_spaces.storage import Shape, StoredTensor, num_groups, packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.space import Member

KEYS, VALUES = "keys", "values"

_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class KVQuantize:
    """The keys and values that a layer caches, as integers with a scale and offset per group.

    Attributes:
        key_bits: Width of a key's code, 1 to 8.
        value_bits: Width of a value's code, 1 to 8. Of a unit that holds only keys or only values,
            the other width says nothing.
        group_size: Tokens of one key channel, and channels of one token's values, that share a
            scale. The last group may be short.
        residual: Latest tokens that stay at 16 bits. Losses are measured in one pass over a text,
            where this shows for the text's last tokens only: generation loses less.
    """

    key_bits: int
    value_bits: int
    group_size: int = 64
    residual: int = 0

    name: ClassVar[str] = "kv_quantize"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for field in ("key_bits", "value_bits"):
            if not 1 <= getattr(self, field) <= 8:
                raise ValueError(f"kv_quantize: {field} must be 1 to 8, got {getattr(self, field)}")
        for field, least in (("group_size", 1), ("residual", 0)):
            if getattr(self, field) < least:
                found = getattr(self, field)
                raise ValueError(f"kv_quantize: {field} must be >= {least}, got {found}")

    @property
    def label(self) -> str:
        """For example ``kv4-g64``; ``k4v2-g64`` with two widths, ``-r32`` with a residual."""
        same = self.key_bits == self.value_bits
        bits = f"kv{self.key_bits}" if same else f"k{self.key_bits}v{self.value_bits}"
        return f"{bits}-g{self.group_size}{f'-r{self.residual}' if self.residual else ''}"

    def unfit_unit(self, members: Sequence[Member]) -> str:
        """Only caches can be stored so."""
        return next(
            (f"it stores caches, and {m.name} is a parameter" for m in members if not m.cache), ""
        )

    def layout_unit(self, members: Sequence[Member]) -> tuple[StoredTensor, ...]:
        """Codes, scales and offsets of each member, and its latest tokens if any stay dense."""
        return tuple(
            replace(tensor, name=f"{member.name}.{tensor.name}")
            for member in members
            for tensor in self.layout_part(member.parameter, member.shape)
        )

    def pack_unit(
        self, weights: Sequence[Tensor], members: Sequence[Member], stats: Sequence[Statistics]
    ) -> dict[str, Tensor]:
        """The stored tensors of (batch, tokens, channels) keys and values."""
        del stats
        return {
            f"{member.name}.{name}": tensor
            for member, states in zip(members, weights, strict=True)
            for name, tensor in self.pack_part(member.parameter, states).items()
        }

    def unpack_unit(self, packed: Mapping[str, Tensor], members: Sequence[Member]) -> list[Tensor]:
        """One float32 tensor of each member's shape."""
        return [
            self.unpack_part(
                member.parameter,
                {
                    tensor.name: packed[f"{member.name}.{tensor.name}"]
                    for tensor in self.layout_part(member.parameter, member.shape)
                },
                member.shape,
            )
            for member in members
        ]

    def layout_part(self, part: str, shape: Shape) -> tuple[StoredTensor, ...]:
        """The stored tensors of (batch, tokens, channels) keys or values; one sequence may lack it.

        Every sequence of the batch starts at a byte of its own.
        """
        batch, tokens, channels = _whole(shape)
        recent = min(self.residual, tokens)
        coded = tokens - recent
        grouped = (
            (channels, num_groups(coded, self.group_size))
            if part == KEYS
            else (coded, num_groups(channels, self.group_size))
        )
        stored = []
        if coded:
            size = packed_bytes(coded * channels, self._bits(part))
            stored.append(StoredTensor("codes", "U8", (batch, size)))
            stored.append(StoredTensor("scales", "F16", (batch, *grouped)))
            stored.append(StoredTensor("offsets", "F16", (batch, *grouped)))
        if recent:
            stored.append(StoredTensor("recent", "BF16", (batch, recent, channels)))
        return tuple(stored)

    def pack_part(self, part: str, states: Tensor) -> dict[str, Tensor]:
        """The tensors of :meth:`layout_part` from (batch, tokens, channels) keys or values."""
        import torch

        from search_spaces.operators.integer_grid import storable
        from search_spaces.operators.packing import pack_bits

        states = states.reshape(_whole(states.shape))
        coded = max(states.shape[1] - self.residual, 0)
        packed = {}
        if coded:
            rows = _rows(part, states[:, :coded].float())
            grouped = _grouped(rows, self.group_size)
            levels = 2 ** self._bits(part) - 1
            low = grouped.amin(-1, keepdim=True).clamp_(-_LARGEST, _LARGEST)
            offsets = low.to(torch.float16)
            # The grid starts at the offset as it is stored, and ends at the largest value.
            spans = grouped.amax(-1, keepdim=True) - offsets.float()
            scales = storable(spans.div_(levels))
            codes = ((grouped - offsets.float()) / scales).round_().clamp_(0, levels)
            codes = codes.flatten(2)[..., : rows.shape[2]].flatten(1)
            packed["codes"] = torch.stack([pack_bits(row, self._bits(part)) for row in codes])
            packed["scales"] = scales.squeeze(-1).to(torch.float16)
            packed["offsets"] = offsets.squeeze(-1)
        if coded < states.shape[1]:
            packed["recent"] = states[:, coded:].to(torch.bfloat16)
        return packed

    def unpack_part(self, part: str, packed: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Float32 keys or values of this shape from :meth:`pack_part`'s tensors."""
        import torch

        from search_spaces.operators.packing import unpack_bits

        _, tokens, channels = _whole(shape)
        coded = max(tokens - self.residual, 0)
        parts = []
        if coded:
            length, width = (coded, channels) if part == KEYS else (channels, coded)
            codes = torch.stack(
                [unpack_bits(r, self._bits(part), coded * channels) for r in packed["codes"]]
            )
            grouped = _grouped(codes.reshape(-1, width, length), self.group_size)
            scales, offsets = (packed[n].float().unsqueeze(-1) for n in ("scales", "offsets"))
            parts.append(_rows(part, (grouped * scales + offsets).flatten(2)[..., :length]))
        if coded < tokens:
            parts.append(packed["recent"].float())
        return torch.cat(parts, 1).reshape(shape)

    def _bits(self, part: str) -> int:
        assert part in (KEYS, VALUES), part
        return self.key_bits if part == KEYS else self.value_bits


def _whole(shape: Shape) -> Shape:
    """(batch, tokens, channels)."""
    return (1, *shape) if len(shape) == 2 else shape


def _rows(part: str, states: Tensor) -> Tensor:
    """(batch, rows, length) whose rows are cut into groups; its own inverse."""
    return states.transpose(1, 2) if part == KEYS else states


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """(batch, rows, groups, group_size); a short last group repeats its last value."""
    from torch.nn.functional import pad

    groups = num_groups(rows.shape[2], group_size)
    missing = groups * group_size - rows.shape[2]
    padded = pad(rows, (0, missing), mode="replicate") if missing else rows
    return padded.reshape(*rows.shape[:2], groups, group_size)

"""Exact bytes of every stored format, in integer arithmetic.

The problem this file solves: an allocator that budgets nominal bits overshoots. Every option is
priced here from shapes alone, tensor by tensor, as safetensors stores it; nothing is compressed
to learn its size, and torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]

# Bytes of one element, keyed by the names the safetensors header uses, in the order in which the
# library lays tensors out (its element types from the last declared to the first).
ELEMENT_BYTES: Mapping[str, int] = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_LAYOUT_RANK = {name: rank for rank, name in enumerate(ELEMENT_BYTES)}

_LENGTH_PREFIX_BYTES = 8
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors file holds it.

    Attributes:
        name: Its key in the file; inside an operator's layout relative to the parameter.
        dtype: Element type by its safetensors name, such as ``"U8"`` or ``"F16"``.
        shape: Its stored shape.
    """

    name: str
    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        """Payload bytes, without the header."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer quotient rounded up."""
    return -(-numerator // denominator)


def packed_bytes(num_values: int, bits: int) -> int:
    """Bytes of ``num_values`` codes of ``bits`` bits packed without gaps."""
    return ceil_div(num_values * bits, 8)


def num_groups(columns: int, group_size: int) -> int:
    """Groups along a row; the last may be short. ``group_size`` 0 means the whole row."""
    return 1 if group_size == 0 else ceil_div(columns, group_size)


def payload_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Sum of the tensors' own bytes, without the header."""
    return sum(tensor.bytes for tensor in tensors)


def header_bytes(tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes in front of the payload of a safetensors file holding these tensors.

    The library sorts tensors by element type, then by name, writes compact JSON and pads it with
    spaces to a multiple of eight.

    Args:
        tensors: Everything in the file; order does not matter.
        metadata: The file's ``__metadata__`` strings. Its own order does not change the size.

    Returns:
        The length prefix, the JSON and its padding, in bytes.
    """
    ordered = sorted(tensors, key=lambda t: (_LAYOUT_RANK[t.dtype], t.name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    begin = 0
    for tensor in ordered:
        end = begin + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTH_PREFIX_BYTES + ceil_div(len(text), _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT


def safetensors_bytes(
    tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Exact size of the safetensors file holding these tensors, header included."""
    stored = list(tensors)
    return header_bytes(stored, metadata) + payload_bytes(stored)


def header_entry_bound(tensor: StoredTensor, file_bytes: int) -> int:
    """Most bytes one tensor can add to a header, in a file of at most ``file_bytes``.

    Offsets are written in decimal, so an entry's length depends on everything before it. The bound
    takes both offsets at the width of the largest possible one, which makes headers additive and
    never underestimates.
    """
    entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, 0]}
    text = json.dumps({tensor.name: entry}, separators=(",", ":"), ensure_ascii=False).encode()
    # json wrote "{...}" around the entry (2 bytes); in the file a comma follows instead (1 byte).
    return len(text) - 1 + 2 * (len(str(file_bytes)) - 1)


def header_base_bound(metadata: Mapping[str, str] | None = None) -> int:
    """Most bytes a header needs besides its entries: prefix, braces, metadata, padding."""
    text = json.dumps({"__metadata__": dict(metadata or {})}, separators=(",", ":"))
    return _LENGTH_PREFIX_BYTES + len(text.encode()) + _HEADER_ALIGNMENT

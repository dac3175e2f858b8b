"""Tensors on disk, there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from search_spaces.whole_file import replacing

STORED_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types by their names in a safetensors file."""


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    what: str = "",
    exact_bytes: int | None = None,
) -> None:
    """Write a safetensors file; a reader sees the old file or the whole new one, never half.

    Args:
        tensors: By name; made contiguous.
        path: In a folder that exists.
        metadata: The file's ``__metadata__``.
        what: What the file is, for the message, such as ``the teacher cache``.
        exact_bytes: The size that the file was priced at.

    Raises:
        ValueError: It cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the user's umask has it; safetensors' is private
            save_file(whole, temporary, None if metadata is None else dict(metadata))
            temporary.chmod(mode)
            size = temporary.stat().st_size
            assert exact_bytes in (None, size), (size, exact_bytes)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {what + ' ' if what else ''}{path}: {error}") from error


_ENTRY_BYTES = 256  # of a tensor in a header, besides its name: type, rank and offsets


class TensorWriter:
    """Writes the tensors of one safetensors file as they come, so that they never exist together.

    Made by :func:`writing_tensors`.
    """

    def __init__(self, file: BinaryIO, names: Collection[str], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._names = frozenset(names)
        self._header: dict[str, object] = {"__metadata__": dict(metadata)}
        most = len(json.dumps(self._header)) + sum(len(json.dumps(n)) + _ENTRY_BYTES for n in names)
        self._header_bytes = -(-most // 8) * 8
        self._written = 0
        file.seek(8 + self._header_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors that were announced, once."""
        assert name in self._names, name
        assert name not in self._header, name
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._file.write(flat.numpy().data)
        end = self._written + tensor.nbytes
        self._header[name] = {
            "dtype": next(word for word, dtype in STORED_TYPES.items() if dtype == tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [self._written, end],
        }
        self._written = end

    def finish(self) -> None:
        """Write the header, padded to the room that was left for it."""
        text = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._header_bytes)
        assert len(text) == self._header_bytes
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + text)


@contextmanager
def writing_tensors(
    path: Path, names: Collection[str], *, metadata: Mapping[str, str], what: str
) -> Iterator[TensorWriter]:
    """A safetensors file that appears, whole, when the block ends well.

    Args:
        path: In a folder that exists.
        names: Of all tensors that may come; not all of them have to.
        metadata: The file's ``__metadata__``.
        what: What the file is, for the message.

    Raises:
        ValueError: It cannot be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            writer = TensorWriter(file, names, metadata)
            yield writer
            writer.finish()
    except OSError as error:
        raise ValueError(f"cannot write {what} {path}: {error}") from error

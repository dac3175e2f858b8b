"""Tensors on disk, there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
    temporary = path.with_name(f".{path.name}.tmp")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, temporary, None if metadata is None else dict(metadata))
        size = temporary.stat().st_size
        assert exact_bytes in (None, size), (size, exact_bytes)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {what + ' ' if what else ''}{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)

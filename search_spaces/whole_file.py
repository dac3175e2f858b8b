"""Files that are there whole or not at all, also after a crash of the machine. No torch."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block ends well.

    A reader sees the old file or the whole new one. The bytes are on disk before the name is, and
    writers of the same file at the same time do not disturb each other: the last one stays.

    Args:
        path: In a folder that exists.

    Yields:
        Where to write; gone if the block fails.

    Raises:
        OSError: It cannot be written; an older file then stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text as UTF-8, by :func:`replacing`.

    Raises:
        OSError: It cannot be written; an older file then stays as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

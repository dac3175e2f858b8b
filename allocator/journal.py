"""The store of record of a run: an append-only file that survives being killed at any byte.

A run must be able to stop anywhere (kill -9, full disk, power) and go on without losing or counting
twice what it has measured. Each line is ``crc32 in 8 hex digits, space, JSON, newline``; the first
line is the header, which says what the records belong to. A record is on disk (fsync) when
:meth:`Journal.append` returns. The only damage a killed writer can leave is a last line without its
newline, and only that is repaired; everything else is refused with its line number. One process
writes at a time (``flock``: the lock dies with its holder, so it is never stale; over NFS it is
emulated, so keep runs on a local disk). No torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from search_spaces.whole_file import sync

logger = logging.getLogger(__name__)

_ABSENT = object()


class JournalContents(NamedTuple):
    """What a journal holds: its header and its records, oldest first."""

    header: dict[str, Any]
    records: list[dict[str, Any]]


def read_journal(path: Path) -> JournalContents:
    """Read a journal without locking or touching it, also while a run is writing to it.

    Raises:
        ValueError: It cannot be read, is damaged, or holds no whole header.
    """
    lines, _ = _parse(path, _read(path))
    return _contents(path, lines)


class Journal:
    """A journal open for appending, locked until :meth:`close`. Use as a context manager.

    Attributes:
        path: The file.
        header: What its first line says, as plain JSON data.
        records: Every record, oldest first, as a reader will find them (tuples became lists).
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """For :meth:`create` and :meth:`open`; ``descriptor`` is open and locked."""
        self.path = path
        self.header: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._descriptor = descriptor
        self._size = 0

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Start a journal; takes over a file whose creator died before its header was whole.

        Raises:
            ValueError: There is a journal already, another process holds it, or the folder is
                missing or read-only.
            OSError: The header could not be written, as on a full disk.
        """
        journal = cls(path, _open_locked(path, os.O_CREAT))
        try:
            if b"\n" in _read(path):
                raise ValueError(f"{path} exists already; resume that run or use another name")
            os.ftruncate(journal._descriptor, 0)
            (journal.header,) = journal._write([header])
            sync(path.parent)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any] | None = None) -> Self:
        """Open a journal to go on with it, cutting off a record that was not written to its end.

        Args:
            path: The file.
            header: What its header must say; ``None`` accepts what is there.

        Raises:
            ValueError: It cannot be read, is damaged, holds no whole header or another one (the
                differing fields are named), or another process holds it.
        """
        journal = cls(path, _open_locked(path))
        try:
            lines, journal._size = _parse(path, _read(path))
            journal.header, journal.records = _contents(path, lines)
            if header is not None:
                _require_equal(path, journal.header, json.loads(_dump(header)))
            os.ftruncate(journal._descriptor, journal._size)
            os.fsync(journal._descriptor)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is on disk when this returns.

        Raises:
            ValueError: The record holds NaN or an infinity.
            OSError: It could not be written; the file is named and holds what it held before.
        """
        self.append_many([record])

    def append_many(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add several records with one fsync; raises as :meth:`append` does, then adding none.

        A process killed inside leaves the first few of them.
        """
        self.records.extend(self._write(records))

    def close(self) -> None:
        """Unlock and close; closing twice is fine."""
        if self._descriptor >= 0:
            # a forked child may still hold the descriptor, so closing ours would not unlock
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Append lines or, whatever goes wrong, leave none of them; returns what they say."""
        assert self._descriptor >= 0, f"{self.path} is closed"
        bodies = [_dump(record) for record in records]
        block = b"".join(_line(body) for body in bodies)
        try:
            written = 0
            while written < len(block):
                written += os.write(self._descriptor, block[written:])
            os.fsync(self._descriptor)
            self._size += len(block)
        except BaseException as error:
            self._roll_back()
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        return [json.loads(body) for body in bodies]

    def _roll_back(self) -> None:
        """Cut back to the last good size; where even that fails, make further appends impossible.

        Otherwise the next record would follow half a line, which no reader could repair.
        """
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            self.close()


def _dump(record: Mapping[str, Any]) -> bytes:
    """Canonical JSON in ASCII; newlines inside strings are escaped by JSON."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _checksum(body: bytes) -> bytes:
    return b"%08x " % zlib.crc32(body)


def _line(body: bytes) -> bytes:
    return _checksum(body) + body + b"\n"


def _parse(path: Path, raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines' values and the bytes they take; a torn tail is left out and logged."""
    *lines, tail = raw.split(b"\n")
    values = [_decode(path, number, line) for number, line in enumerate(lines, 1)]
    if tail:
        logger.warning(
            "%s: leaving out the last %d bytes, a record that was not written to its end",
            path,
            len(tail),
        )
    return values, len(raw) - len(tail)


def _decode(path: Path, number: int, line: bytes) -> dict[str, Any]:
    prefix, body = line[:9], line[9:]
    try:
        value = json.loads(body) if prefix == _checksum(body) else None
    except ValueError:  # a right checksum over something that is not JSON: not our file
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: line {number} is damaged; restore the file from a copy or start a new run"
        )
    return value


def _contents(path: Path, lines: list[dict[str, Any]]) -> JournalContents:
    if not lines:
        raise ValueError(f"{path} holds no whole header: the run died at its very start; redo it")
    return JournalContents(lines[0], lines[1:])


def _require_equal(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found_differences = differences(found, wanted)
    if found_differences:
        raise ValueError(
            f"{path} belongs to a run with other settings: {'; '.join(found_differences)}; "
            "use the same settings or another name"
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> list[str]:
    """One phrase per differing field, nested fields by dotted path."""
    phrases = []
    for name in sorted({*found, *wanted}):
        old, new = found.get(name, _ABSENT), wanted.get(name, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            phrases += differences(old, new, f"{inside}{name}.")
        elif old != new:
            phrases.append(f"{inside}{name} was {_short(old)}, now {_short(new)}")
    return phrases


def _short(value: object) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the journal {path}: {error.strerror}") from error


def _open_locked(path: Path, flags: int = 0) -> int:
    """Open for reading and appending, and lock; the lock belongs to this process."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)
    except OSError as error:
        raise ValueError(f"cannot open the journal {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(
            f"run folder {path.parent} is in use by another process; "
            "wait for it or use another name"
        ) from error
    return descriptor

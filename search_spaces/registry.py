"""Visible tables of named plug-ins, with helpful errors and entry points for outside packages."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only table name -> plug-in.

    Args:
        kind: What the entries are, in the singular, for error messages ("operator").
        table: Our own entries.
        entry_point_group: Packages outside join by declaring entry points in this group; they are
            loaded when their name is first asked for.
    """

    def __init__(self, kind: str, table: Mapping[str, T], *, entry_point_group: str = "") -> None:
        self._kind = kind
        self._table = dict(table)
        self._outside = (
            {point.name: point for point in entry_points(group=entry_point_group)}
            if entry_point_group
            else {}
        )

    def __getitem__(self, name: str) -> T:
        if name in self._table:
            return self._table[name]
        if name in self._outside:
            loaded: T = self._outside[name].load()
            self._table[name] = loaded
            return loaded
        raise ValueError(unknown_name(self._kind, name, list(self)))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._table, *self._outside}))

    def __len__(self) -> int:
        return len({*self._table, *self._outside})

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._outside


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """One sentence: what was asked for, the nearest name, and the whole list."""
    close = difflib.get_close_matches(name, known, n=1)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{suggestion}; known: {', '.join(known)}"

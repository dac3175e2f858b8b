"""How long work says where it stands, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int, str], None]
"""Told how much of a stage is done, and a few words about the latest result."""


class Reporter(Protocol):
    """Shows stages of a run; the command line draws progress bars, the library is silent."""

    def stage(self, label: str, total: int | None) -> Advance:
        """Begin a stage of ``total`` steps, or of unknown length."""
        ...

    def note(self, text: str) -> None:
        """Say one sentence that a user should read."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, label: str, total: int | None) -> Advance:
        """Begin a stage that nobody sees."""
        del label, total
        return lambda done, text: None

    def note(self, text: str) -> None:
        """Say nothing."""
        del text

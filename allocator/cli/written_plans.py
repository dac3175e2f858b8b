"""Plans that verbs write one per budget: where to, under which names, and how they are listed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.cli.terminal import console
from allocator.plan import Plan, save_plan


@dataclass(frozen=True)
class Destination:
    """A folder that holds plans beside each other."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Destination:
        """The folder, created where it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def save(self, plan: Plan, *words: str | None) -> Path:
        """Write a plan under a name that says what it answers; ``None`` adds nothing to it."""
        name = "-".join(word.strip().replace("%", "pct") for word in words if word is not None)
        path = self.folder / f"plan-{name}.json"
        save_plan(plan, path)
        return path


def print_paths(rows: Iterable[Mapping[str, Any]]) -> None:
    """Each plan's budget and path, on a line that is not broken."""
    for row in rows:
        console.print(f"{row['budget_text']}: {row['plan']}", markup=False, soft_wrap=True)

"""EvoPress: ``plan.txt`` with one ``module: level`` per line, and its database of weights.

The problem: EvoPress swaps in ``DATABASE/module/level.pth`` for every line, where a level is a bare
integer. Here the level of a quantized matrix is its bits, and 16 is the dense one. A level that
would stand for two settings is refused. A module without a line stays dense there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from allocator.exporters.base import (
    DENSE,
    Choice,
    Mismatch,
    Receipt,
    choices,
    fixed_modules,
    read_text,
    write_text,
)
from allocator.plan import Plan
from search_spaces.operators import Keep, RoundToNearest

if TYPE_CHECKING:
    from torch import nn

FILE_NAME = "plan.txt"
DENSE_LEVEL = 16


class EvoPressExporter:
    """Writes ``plan.txt`` for EvoPress; :func:`write_database` adds the weights."""

    name: ClassVar[str] = "evopress"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``plan.txt`` into a folder.

        Raises:
            ValueError: One level would stand for two different settings.
        """
        found = tuple(choices(plan, self.name))
        _require_unambiguous(found)
        # Its reader takes a blank last line for a broken one, but a final newline is none.
        text = "".join(f"{choice.module}: {_level(choice.operator)}\n" for choice in found)
        path = write_text(destination, FILE_NAME, text)
        note = (
            f"EvoPress loads MODULE/LEVEL.pth for every line, {DENSE_LEVEL} for matrices kept "
            "dense; write_database makes that database from the model."
        )
        return Receipt((path,), len(plan.units), (note,))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Read the lines as EvoPress does and compare, also with the database if there is one.

        Raises:
            ValueError: No such file, or a line that EvoPress cannot read.
        """
        levels = _parse(read_text(artefact, FILE_NAME))
        found = tuple(choices(plan, self.name))
        database = artefact if artefact.is_dir() and any(artefact.glob("*/*.pth")) else None
        mismatches = []
        for choice in found:
            level = levels.pop(choice.module, None)
            expected, got = str(_level(choice.operator)), DENSE if level is None else str(level)
            if got != expected:
                mismatches.append(Mismatch(choice.place, expected, got))
            elif database and not (database / choice.module / f"{level}.pth").is_file():
                mismatches.append(Mismatch(choice.place, f"{level}.pth", "no such file"))
        mismatches += [
            Mismatch(module, DENSE, str(levels[module]))
            for module in fixed_modules(plan)
            if module in levels
        ]
        unknown = levels.keys() - set(fixed_modules(plan))
        mismatches += [
            Mismatch(module, "not in the plan", str(levels[module])) for module in sorted(unknown)
        ]
        return mismatches


def write_database(plan: Plan, model: nn.Module, destination: Path) -> Receipt:
    """Write ``plan.txt`` and the compressed weights it names, in the model's own layout and dtype.

    Args:
        plan: What to hand over.
        model: The dense model of the plan; it is not changed.
        destination: The database's folder.

    Raises:
        ValueError: The plan is for another model, a level is ambiguous, or the folder cannot be
            written.
    """
    import torch

    from allocator.apply import check_model, compressed

    check_model(plan, model)
    receipt = EvoPressExporter().write(plan, destination)
    files = list(receipt.files)
    for choice in choices(plan, EvoPressExporter.name):
        path = destination / choice.module / f"{_level(choice.operator)}.pth"
        try:
            path.parent.mkdir(exist_ok=True)
            torch.save(compressed(model, choice.member, choice.operator), path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
            raise ValueError(f"cannot write {path}: {error}") from error
        files.append(path)
    return Receipt(tuple(files), receipt.num_units)


def _level(operator: Keep | RoundToNearest) -> int:
    return DENSE_LEVEL if isinstance(operator, Keep) else operator.bits


def _require_unambiguous(found: tuple[Choice, ...]) -> None:
    settings: dict[int, RoundToNearest] = {}
    for choice in found:
        if isinstance(choice.operator, Keep):
            continue
        level = _level(choice.operator)
        other = settings.setdefault(level, choice.operator)
        if other != choice.operator:
            raise ValueError(
                f"evopress names a setting by its bits alone: level {level} would stand for both "
                f"{other.label} and {choice.operator.label} (module {choice.module!r})"
            )


def _parse(text: str) -> dict[str, int]:
    """Levels by module, as EvoPress's loader splits them."""
    levels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        module, colon, level = line.partition(":")
        try:
            levels[module.strip(" ")] = int(level)
        except ValueError:
            problem = "no level" if not colon else f"level {level.strip()!r} is not an integer"
            raise ValueError(f"line {number} of {FILE_NAME}: {problem}") from None
    return levels

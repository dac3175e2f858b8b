"""EvoPress: ``plan.txt`` with one ``module: level`` per line, and its database of weights.

The problem: EvoPress swaps in ``DATABASE/module/level.pth`` for every line, where a level is a bare
integer. Here the level of a rounded matrix is its bits, and 16 is the dense one. Where bits alone
would not name every setting of a plan (sparsity, ranks, several group sizes), levels are numbered
from 100 in order of their label, and ``levels.json`` says which operator each one is. A module
without a line stays dense there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from allocator.exporters.base import (
    DENSE,
    Mismatch,
    Receipt,
    fixed_modules,
    folder_of,
    num_weight_units,
    read_mapping,
    read_text,
    write_text,
)
from allocator.plan import Plan
from search_spaces.operators import (
    AnyOperator,
    Keep,
    RoundToNearest,
    Statistics,
    operator_from_json,
    operator_to_json,
)

if TYPE_CHECKING:
    from objectives.loading import LoadedModel

FILE_NAME = "plan.txt"
LEVELS_NAME = "levels.json"
DENSE_LEVEL = 16
_FIRST_NUMBERED = 100


@dataclass(frozen=True)
class _Line:
    """One module of the plan."""

    unit: str
    member: str
    module: str
    operator: AnyOperator

    @property
    def place(self) -> str:
        return self.unit if self.module in (self.unit, "") else f"{self.unit} ({self.module})"


class EvoPressExporter:
    """Plan file of EvoPress (``load_state`` of its evaluation scripts) and its database."""

    name: ClassVar[str] = "evopress"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``plan.txt`` and, where levels are numbered, ``levels.json``.

        Raises:
            ValueError: A compressed parameter that is not the weight matrix of its module,
                or a folder that cannot be written.
        """
        receipt = self._write_plan(plan, destination)
        missing = (
            f"EvoPress loads MODULE/LEVEL.pth for every line, {DENSE_LEVEL} for matrices kept "
            "dense; export with --model to make that database."
        )
        return replace(receipt, notes=(missing, *receipt.notes))

    def _write_plan(self, plan: Plan, destination: Path) -> Receipt:
        lines = tuple(_lines(plan))
        levels = _levels(lines)
        text = "".join(f"{line.module}: {levels[line.operator]}\n" for line in lines)
        files = [write_text(destination, FILE_NAME, text)]
        notes = []
        if max(levels.values(), default=0) >= _FIRST_NUMBERED:
            named = {str(levels[o]): operator_to_json(o) for o in levels}
            files.append(write_text(destination, LEVELS_NAME, json.dumps(named, indent=1) + "\n"))
            notes.append(f"levels are numbers of operators: {LEVELS_NAME} says which")
        return Receipt(tuple(files), num_weight_units(plan), tuple(notes))

    def write_model(
        self,
        plan: Plan,
        loaded: LoadedModel,
        destination: Path,
        statistics: Mapping[str, Statistics],
    ) -> Receipt:
        """Write the plan and the compressed weights it names, in the model's layout and dtype.

        Raises:
            ValueError: The plan is for another model, the format cannot say what the plan says,
                statistics are missing, or the folder cannot be written.
        """
        import torch

        from allocator.apply import check_loaded, compressed

        check_loaded(plan, loaded)
        receipt = self._write_plan(plan, destination)
        lines = {line.member: line for line in _lines(plan)}
        levels = _levels(tuple(lines.values()))
        files = list(receipt.files)
        for entry in plan.units:
            if entry.unit.is_cache:
                continue
            made = compressed(loaded.model, entry, statistics)
            for member, tensor in zip(entry.unit.members, made, strict=True):
                line = lines.get(member.name)
                if line is None:
                    continue
                path = destination / line.module / f"{levels[line.operator]}.pth"
                try:
                    path.parent.mkdir(exist_ok=True)
                    torch.save(tensor, path)
                except (OSError, RuntimeError) as error:  # the latter: torch's full disk
                    raise ValueError(f"cannot write {path}: {error}") from error
                files.append(path)
        return replace(receipt, files=tuple(files))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Parse the file as EvoPress does and compare; check that the database has every level.

        The database is looked for only when the artefact is a folder that holds one.

        Raises:
            ValueError: The file is missing or has a line that EvoPress could not read.
        """
        written = _parse(read_text(artefact, FILE_NAME))
        lines = tuple(_lines(plan))
        levels = _levels(lines)
        folder = folder_of(artefact)
        database = folder if artefact.is_dir() and any(folder.glob("*/*.pth")) else None
        mismatches = _check_names(levels, folder)
        for line in lines:
            level = written.pop(line.module, None)
            expected, got = str(levels[line.operator]), DENSE if level is None else str(level)
            if got != expected:
                mismatches.append(Mismatch(line.place, expected, got))
            elif database and not (database / line.module / f"{level}.pth").is_file():
                mismatches.append(Mismatch(line.place, f"{level}.pth", "no such file"))
        fixed = set(fixed_modules(plan))
        return mismatches + [
            Mismatch(module, DENSE if module in fixed else "not in the plan", str(level))
            for module, level in sorted(written.items())
        ]


def _lines(plan: Plan) -> Iterator[_Line]:
    """What the plan says of each module; parameters without a name in the format stay dense."""
    for entry in plan.units:
        if entry.unit.is_cache:
            continue
        operator = entry.choice
        for member in entry.unit.members:
            if member.parameter == "weight" and len(member.shape) == 2:
                yield _Line(entry.name, member.name, member.module, operator)
            elif not isinstance(operator, Keep):
                raise ValueError(
                    f"evopress addresses the weight matrices of modules: it cannot say anything "
                    f"about {member.name!r} of shape {list(member.shape)}"
                )


def _levels(lines: tuple[_Line, ...]) -> dict[AnyOperator, int]:
    """A level for every operator of the plan: its bits where they name it, else a number."""
    operators = list(dict.fromkeys(line.operator for line in lines))
    bits: dict[AnyOperator, int] = {
        operator: DENSE_LEVEL if isinstance(operator, Keep) else operator.bits
        for operator in operators
        if isinstance(operator, Keep | RoundToNearest)
    }
    if len(bits) == len(operators) == len(set(bits.values())):
        return bits
    levels: dict[AnyOperator, int] = {}
    ordered = sorted(operators, key=lambda o: (o.label, json.dumps(operator_to_json(o))))
    for operator in ordered:
        dense = isinstance(operator, Keep) and DENSE_LEVEL not in levels.values()
        levels[operator] = DENSE_LEVEL if dense else _FIRST_NUMBERED + len(levels)
    return levels


def _check_names(levels: Mapping[AnyOperator, int], folder: Path) -> list[Mismatch]:
    """Compare ``levels.json`` with what the plan's levels stand for."""
    if max(levels.values(), default=0) < _FIRST_NUMBERED:
        return []
    named = read_mapping(folder, LEVELS_NAME)
    return [
        Mismatch(f"level {level}", operator.label, str(named.get(str(level))))
        for operator, level in levels.items()
        if str(level) not in named or operator_from_json(named[str(level)]) != operator
    ]


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

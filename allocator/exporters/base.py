"""What an exporter is, and what all of them need.

The problem: toolkits read per-module settings by rules of their own and ignore a name they do not
know without a word. So an exporter writes one exact entry per module, refuses what its format
cannot say, and reads the result back by the toolkit's own matching rules to compare it with the
plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from allocator.plan import Plan
from search_spaces.operators import Keep, RoundToNearest, Statistics
from search_spaces.space import Member
from search_spaces.whole_file import write_whole

if TYPE_CHECKING:
    from objectives.loading import LoadedModel

DENSE = "keep"


@dataclass(frozen=True)
class Receipt:
    """What was written.

    Attributes:
        files: Paths, the one to hand to the toolkit first.
        num_units: Units of the plan that the files speak of.
        notes: Sentences the user should read: what the toolkit will do differently.
    """

    files: tuple[Path, ...]
    num_units: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """One place where an artefact does not say what the plan says.

    Attributes:
        unit: The unit, or the fixed tensor, and the module where the two differ.
        expected: What the plan says, such as ``int4-g64`` or ``keep``.
        got: What the toolkit would do.
    """

    unit: str
    expected: str
    got: str


@runtime_checkable
class Exporter(Protocol):
    """Writes a plan for one toolkit and reads the result back."""

    name: ClassVar[str]

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write the toolkit's files into a folder; does not import the toolkit.

        Raises:
            ValueError: The format cannot say what the plan says, or the folder cannot be written.
        """
        ...

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare a written file, or the folder that holds it, with the plan; empty when equal.

        Raises:
            ValueError: The file is missing or cannot be read.
        """
        ...


@runtime_checkable
class ModelExporter(Protocol):
    """An exporter that can write compressed weights too, given the plan's model."""

    def write_model(
        self,
        plan: Plan,
        loaded: LoadedModel,
        destination: Path,
        statistics: Mapping[str, Statistics],
    ) -> Receipt:
        """Write the toolkit's files and the weights it reads; the model may be changed.

        Args:
            plan: What to hand over.
            loaded: The plan's model, dense, with its tokenizer.
            destination: A folder.
            statistics: By member name, for operators that need them.

        Raises:
            ValueError: The plan is for another model, the format cannot say what the plan says,
                statistics are missing, or the folder cannot be written.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """What a plan says about one parameter, in the two operators that toolkits understand."""

    unit: str
    kind: str
    depth: int | None
    member: Member
    operator: Keep | RoundToNearest

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.member.module

    @property
    def place(self) -> str:
        """The unit and its module, for messages."""
        return self.place_of(self.module)

    def place_of(self, name: str) -> str:
        """The unit and, where that differs, the name by which a runtime knows this part of it."""
        return self.unit if name in (self.unit, "") else f"{self.unit} ({name})"

    @property
    def group_size(self) -> int:
        """Columns of a group, a whole row written out; 0 when dense."""
        if isinstance(self.operator, Keep):
            return 0
        return self.operator.group_size or self.member.matrix_shape[1]

    @property
    def says(self) -> str:
        """The choice as :func:`describe` writes what a toolkit would do."""
        if isinstance(self.operator, Keep):
            return DENSE
        return describe(self.operator.bits, self.group_size, self.operator.symmetric)


def describe(bits: object, group_size: object, symmetric: object) -> str:
    """A setting in few letters, comparable across toolkits: ``int4-g64``, ``int3a-g128``."""
    return f"int{bits}{'' if symmetric else 'a'}-g{group_size}"


def choices(plan: Plan, toolkit: str) -> Iterator[Choice]:
    """The plan parameter by parameter, in its own order.

    Parameters that are not the ``weight`` of their module, such as stacks of fused experts, are
    left out when they stay dense: a toolkit that is not told about them leaves them alone. So are
    caches, which are no part of the model's file: ``transformers-cache`` exports them.

    Raises:
        ValueError: An operator other than ``keep`` and ``round_to_nearest``, or a compressed
            parameter that is not the weight matrix of its module.
    """
    for entry in plan.units:
        if entry.unit.is_cache:
            continue
        operator = entry.choice
        if not isinstance(operator, (Keep, RoundToNearest)):
            raise ValueError(
                f"{toolkit} cannot say {operator.label!r} (unit {entry.name!r}): it takes keep and "
                "round_to_nearest; `allocator apply` writes any plan as a dense checkpoint"
            )
        for member in entry.unit.members:
            if member.parameter != "weight" or len(member.shape) != 2:
                if isinstance(operator, Keep):
                    continue
                raise ValueError(
                    f"{toolkit} addresses the weight matrices of modules: it cannot say anything "
                    f"about {member.name!r} of shape {list(member.shape)}"
                )
            yield Choice(entry.name, entry.kind, entry.depth, member, operator)


def num_weight_units(plan: Plan) -> int:
    """Units of a plan that are part of the model's file."""
    return sum(not entry.unit.is_cache for entry in plan.units)


def require_whole_groups(choice: Choice, toolkit: str) -> None:
    """Refuse groups that do not divide the columns: toolkits fail or fall back on a short group."""
    columns = choice.member.matrix_shape[1]
    if choice.group_size and columns % choice.group_size:
        raise ValueError(
            f"{toolkit} needs groups that divide the columns: module {choice.module!r} has "
            f"{columns} columns and the plan asks for groups of {choice.group_size}"
        )


def fixed_modules(plan: Plan) -> Iterator[str]:
    """Modules whose weight the plan keeps out of the search and dense."""
    for tensor in plan.fixed:
        if len(tensor.shape) >= 2 and tensor.name.endswith(".weight"):
            yield tensor.name.removesuffix(".weight")


def write_text(destination: Path, name: str, text: str) -> Path:
    """Write one file of an export so that it is there whole or not at all.

    Raises:
        ValueError: The folder cannot be made or written to.
    """
    path = destination / name
    try:
        destination.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    return path


def folder_of(artefact: Path) -> Path:
    """The folder of an export, given itself or a file in it."""
    return artefact if artefact.is_dir() else artefact.parent


def read_text(artefact: Path, name: str) -> str:
    """An export's file, given itself or the folder that holds it.

    Raises:
        ValueError: There is none, or it is not text.
    """
    path = artefact / name if artefact.is_dir() else artefact
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: not UTF-8 text") from error


def read_mapping(artefact: Path, name: str) -> dict[str, Any]:
    """The JSON object in an export's file.

    Raises:
        ValueError: There is none, or it is not a JSON object.
    """
    try:
        data = json.loads(read_text(artefact, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{artefact}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{artefact}: expected a JSON object, got {type(data).__name__}")
    return data

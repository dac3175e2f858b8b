"""A run's folder: what it holds, who may use it, and how its name is checked.

``config.yaml`` what was asked; ``journal.jsonl`` the only store of record; ``space.json`` units and
menus; ``calibration.safetensors`` the tokens (``calibration-2`` and so on those of further texts);
``losses.npz`` the loss tables; ``plan.json``, ``frontier.csv`` and ``report.html`` the results;
``cache/`` what may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from allocator.plan import Plan, load_plan
from search_spaces.space import SearchSpace
from search_spaces.whole_file import replacing, write_whole

if TYPE_CHECKING:
    from objectives.sensitivity import LossTable  # loads torch

LONGEST_NAME = 64
"""Characters of a run's name."""
SHARED_TABLES = "losses"
"""Folder beside the runs with loss tables that they share."""
_NAME = re.compile(rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}$")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """What was asked."""
        return self.path / "config.yaml"

    @property
    def exists(self) -> bool:
        """Whether a run is there; nothing without a configuration is one."""
        return self.config.is_file()

    @property
    def journal(self) -> Path:
        """The store of record."""
        return self.path / "journal.jsonl"

    @property
    def space(self) -> Path:
        """Units and menus."""
        return self.path / "space.json"

    @property
    def calibration(self) -> Path:
        """Token ids of the four splits, of the first text."""
        return self.path / "calibration.safetensors"

    def text(self, number: int) -> Path:
        """Token ids of the run's first, second ... text, counted from 0."""
        return self.path / f"calibration-{number + 1}.safetensors" if number else self.calibration

    @property
    def losses(self) -> Path:
        """Loss tables."""
        return self.path / "losses.npz"

    @property
    def plan(self) -> Path:
        """The returned plan."""
        return self.path / "plan.json"

    @property
    def front(self) -> Path:
        """The measured front of a search of several objectives."""
        return self.path / "front.csv"

    @property
    def frontier(self) -> Path:
        """The additive frontier."""
        return self.path / "frontier.csv"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def cache(self) -> Path:
        """Teacher caches; may be deleted at any time."""
        return self.path / "cache"

    @property
    def memory(self) -> Path:
        """What the last session that measured had planned to hold, and the most it held."""
        return self.cache / "memory.json"

    @property
    def begun(self) -> bool:
        """Whether the journal's header is whole: before that nothing was measured."""
        try:
            with self.journal.open("rb") as file:
                return file.readline().endswith(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def make(self) -> None:
        """Create the folder.

        Raises:
            ValueError: It cannot be created or written to.
        """
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot create the run folder {self.path}: {error.strerror}; "
                "choose another with --runs or --name"
            ) from error
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"the run folder {self.path} is read-only; choose another with --runs")


def load_memory(folder: RunFolder) -> dict[str, str]:
    """The memory of a run's last session, as texts by label; empty where it is not known."""
    if not folder.memory.exists():
        return {}
    found: dict[str, str] = json.loads(folder.memory.read_text(encoding="utf-8"))
    return found


def run_folder(runs: Path, name: str) -> RunFolder:
    """The folder of a run by name.

    Raises:
        ValueError: The name has characters that could lead elsewhere.
    """
    if name == SHARED_TABLES:
        raise ValueError(f"{name!r} holds the loss tables that runs share: choose another --name")
    if _NAME.match(name) is None:
        raise ValueError(
            f"{name!r} is not a run name: use up to 64 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return RunFolder(runs / name)


def existing_run(text: str, runs: Path) -> RunFolder:
    """The folder of a run given by its path or, inside ``runs``, by its name.

    Raises:
        ValueError: There is no such run.
    """
    for path in (Path(text), runs / text):
        if (folder := RunFolder(path)).exists:
            return folder
    known = sorted(p.parent.name for p in runs.glob("*/config.yaml")) if runs.is_dir() else []
    listing = f"; runs there: {', '.join(known[:8])}" if known else ""
    raise ValueError(f"no run {text!r} here or in {runs}{listing}")


def finished_plan(folder: RunFolder) -> Plan:
    """The plan that a run ended with.

    Raises:
        ValueError: It has none yet, or it is damaged.
    """
    return load_plan(plan_path(folder))


def plan_path(folder: RunFolder) -> Path:
    """Where the plan is that a run ended with.

    Raises:
        ValueError: It has none yet.
    """
    if not folder.plan.exists():
        raise ValueError(
            f"{folder.path} holds no plan: it is a profile, or a run that has not ended, which "
            f"'allocator resume {folder.path}' continues"
        )
    return folder.plan


def save_space(space: SearchSpace, path: Path) -> None:
    """Write a space as JSON."""
    write_whole(path, json.dumps(space.to_json(), separators=(",", ":")))


def load_space(path: Path) -> SearchSpace:
    """Read a space that :func:`save_space` wrote.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return SearchSpace.from_json(data)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read the run's space {path} ({error}): put it back, or start a new run"
        ) from error


def save_losses(tables: Mapping[str, LossTable], path: Path) -> None:
    """Write loss tables, one flat array a scorer."""
    arrays = {
        f"{table.scorer}:{table.unit}": np.concatenate(table.losses) for table in tables.values()
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, NDArray[np.float64]]:
    """The arrays of an npz file, by name.

    Raises:
        ValueError: It is damaged.
    """
    try:
        # a stream of our own, since numpy leaves one of a damaged file open
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read the tables {path} ({type(error).__name__})") from error


def load_losses(path: Path, space: SearchSpace) -> dict[str, LossTable]:
    """Read loss tables that :func:`save_losses` wrote, the run's own scorer first.

    Raises:
        ValueError: The run has not come so far, or the file does not fit the space.
    """
    from objectives.sensitivity import LossTable

    if not path.is_file():
        raise ValueError(f"{path} does not exist yet: let the run finish (allocator resume)")
    ends = np.cumsum([len(menu) for menu in space.menus])
    tables = {}
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        raise ValueError(f"{error}: 'allocator report' of the run writes them again") from error
    for key, losses in arrays.items():
        scorer, _, unit = key.partition(":")
        if losses.shape != (ends[-1],) or not np.isfinite(losses).all():
            raise ValueError(
                f"{path} does not fit the run's space, or is damaged: 'allocator report' of the "
                "run writes it again"
            )
        tables[scorer] = LossTable(scorer, unit, tuple(np.split(losses, ends[:-1])))
    return tables

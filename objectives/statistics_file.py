"""Statistics of calibration text on disk: what operators saw when their options were measured.

The problem: a plan is plain data, but GPTQ or SparseGPT give other weights from other statistics.
So the statistics of a run are written once and read by every process that compresses: the workers
of the run, resumed sessions, and whoever applies the plan later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from objectives.tensor_file import write_tensors, writing_tensors
from search_spaces.operators import Statistics

FILE_NAME = "statistics.safetensors"
_SEPARATOR = "|"


@dataclass(frozen=True)
class StatisticsFile:
    """Where statistics are kept, and what they speak of.

    Attributes:
        path: The file.
        identity: Of the weights and the text; a file about others is refused.
    """

    path: Path
    identity: str

    def save(self, statistics: Mapping[str, Statistics], kinds: Collection[str]) -> None:
        """Write some kinds of statistics; a reader sees the old file or the whole new one.

        Raises:
            ValueError: The file cannot be written.
        """
        tensors = dict(_named(statistics, kinds))
        self._make_folder()
        write_tensors(tensors, self.path, metadata=self._metadata(kinds), what="the statistics")

    @contextmanager
    def writing(
        self, members: Collection[str], kinds: Collection[str]
    ) -> Iterator[Callable[[Mapping[str, Statistics]], None]]:
        """Write some kinds of statistics of some members as they are handed over, once each.

        Raises:
            ValueError: The file cannot be written.
        """
        self._make_folder()
        names = [f"{member}{_SEPARATOR}{kind}" for member in members for kind in kinds]
        metadata = self._metadata(kinds)
        with writing_tensors(self.path, names, metadata=metadata, what="the statistics") as file:

            def add(statistics: Mapping[str, Statistics]) -> None:
                for name, tensor in _named(statistics, kinds):
                    file.add(name, tensor)

            yield add

    def load(
        self, device_of: Callable[[str], torch.device] = lambda name: torch.device("cpu")
    ) -> tuple[frozenset[str], dict[str, Statistics]]:
        """The kinds that are kept and the statistics by member name; nothing if there is no file.

        Args:
            device_of: Where the statistics of a member are wanted, by its name.

        Raises:
            ValueError: The file cannot be read, or is about other weights or another text.
        """
        if not self.path.exists():
            return frozenset(), {}
        known = {field.name for field in fields(Statistics)}
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                kinds = frozenset(json.loads(metadata.get("kinds", "[]")))
                names = list(file.keys())
                tensors = {
                    name: file.get_tensor(name).to(device_of(name.rpartition(_SEPARATOR)[0]))
                    for name in names
                }
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"cannot read the statistics {self.path} ({error}): delete the file and "
                "'allocator resume' the run, which makes it again"
            ) from error
        if metadata.get("identity") != self.identity or not kinds <= known:
            raise ValueError(
                f"{self.path} holds statistics of other weights or another text than the plan's; "
                "give the folder of the run that made the plan"
            )
        grouped: dict[str, dict[str, object]] = {}
        for name, tensor in tensors.items():
            member, _, kind = name.rpartition(_SEPARATOR)
            grouped.setdefault(member, {})[kind] = tensor
        return kinds, {
            member: Statistics(**values)  # type: ignore[arg-type]
            for member, values in grouped.items()
        }

    def _metadata(self, kinds: Collection[str]) -> dict[str, str]:
        return {"identity": self.identity, "kinds": json.dumps(sorted(kinds))}

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the statistics {self.path}: {error}") from error


def _named(
    statistics: Mapping[str, Statistics], kinds: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some kinds, on the CPU, under their names in the file."""
    for member, found in statistics.items():
        for kind in sorted(kinds):
            value: Tensor | None = getattr(found, kind)
            if value is not None:
                yield f"{member}{_SEPARATOR}{kind}", value.cpu()


def statistics_identity(weights_sha256: str, text_sha256: str) -> str:
    """What a file of statistics is about: the model's weights and the statistics split."""
    return f"{weights_sha256} {text_sha256}"

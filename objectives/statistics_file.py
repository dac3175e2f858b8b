"""Statistics of calibration text on disk: what operators saw when their options were measured.

The problem: a plan is plain data, but GPTQ or SparseGPT give other weights from other statistics.
So the statistics of a run are written once and read by every process that compresses: the workers
of the run, resumed sessions, and whoever applies the plan later.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open

from objectives.tensor_file import write_tensors
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
        tensors = {
            f"{member}{_SEPARATOR}{kind}": value.cpu()
            for member, found in statistics.items()
            for kind in sorted(kinds)
            if (value := getattr(found, kind)) is not None
        }
        metadata = {"identity": self.identity, "kinds": json.dumps(sorted(kinds))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the statistics {self.path}: {error}") from error
        write_tensors(tensors, self.path, metadata=metadata, what="the statistics")

    def load(self, device: str = "cpu") -> tuple[frozenset[str], dict[str, Statistics]]:
        """The kinds that are kept and the statistics by member name; nothing if there is no file.

        Raises:
            ValueError: The file cannot be read, or is about other weights or another text.
        """
        if not self.path.exists():
            return frozenset(), {}
        known = {field.name for field in fields(Statistics)}
        try:
            with safe_open(self.path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                kinds = frozenset(json.loads(metadata.get("kinds", "[]")))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read the statistics {self.path}: {error}") from error
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


def statistics_identity(weights_sha256: str, text_sha256: str) -> str:
    """What a file of statistics is about: the model's weights and the statistics split."""
    return f"{weights_sha256} {text_sha256}"

"""Results on disk: one JSON object a line, one file for each space and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of a file; none if it is not there, and a torn last line is none.

    Raises:
        ValueError: Another line is no result.
    """
    results = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a result ({error})") from error
    return results


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The results of all files of a folder, in the order of their names."""
    return [result for path in sorted(folder.glob("*.jsonl")) for result in read_results(path)]


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Add a result, dropping what an interrupted writer left behind the last whole line."""
    size = sum(map(len, _whole_lines(path)))
    with path.open("ab") as file:
        file.truncate(size)
        file.write(json.dumps(result).encode() + b"\n")


def other_settings(folder: Path, settings: Mapping[str, Any]) -> str:
    """How a folder's results were made otherwise; empty if they were not.

    Results that do not say how they were made, as those of earlier versions, are taken as they are.
    """
    for result in read_folder(folder):
        theirs = result.get("settings", settings)
        for name in sorted({*settings, *theirs}):
            if theirs.get(name) != settings.get(name):
                return f"{name} {theirs.get(name)}, now {settings.get(name)}"
    return ""


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not _is_whole(lines[-1]):
        lines.pop()
    return lines


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")

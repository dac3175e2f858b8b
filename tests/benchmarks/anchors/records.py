"""Results on disk: one JSON object a line, one file for each space and seed; means as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEYS = ("space", "budget", "method", "feasible", "seed")
"""What a result is of; its points come on top."""


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


def write_csv(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """One line per point: tokens, bytes, mean held-out loss and perplexity, where it is noted."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, "tokens", "bytes", "heldout_nats", "perplexity"])
        for result in results:
            for point in result["points"]:
                known = perplexity(point)
                row = [*(result[key] for key in KEYS), point["tokens"], point["bytes"]]
                row.append(f"{_mean(point['heldout']):.6g}")
                writer.writerow([*row, "" if math.isnan(known) else f"{known:.6g}"])


def read_csv(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_csv` wrote, as results: means instead of each sequence's loss, no plans.

    Raises:
        ValueError: The file is not there, or none of these.
    """
    results: dict[tuple[str, ...], dict[str, Any]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(row[name] for name in KEYS)
                about = dict(zip(KEYS, key, strict=True)) | {"seed": int(row["seed"]), "points": []}
                point = {"tokens": int(row["tokens"]), "bytes": int(row["bytes"])}
                point["heldout"] = [float(row["heldout_nats"])]
                if row["perplexity"]:
                    point["cross_entropy"] = [math.log(float(row["perplexity"]))]
                results.setdefault(key, about)["points"].append(point)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no results.csv of this benchmark ({error!r})") from error
    return list(results.values())


def perplexity(point: Mapping[str, Any]) -> float:
    """Of a plan on held-out text; NaN where an earlier version did not note the cross-entropy."""
    return math.exp(_mean(point["cross_entropy"])) if "cross_entropy" in point else math.nan


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


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

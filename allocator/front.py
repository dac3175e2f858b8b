"""The measured front of a search of several objectives, as the run folder's ``front.csv``.

The problem: such a search ends with many assignments, each the best of its bytes, and the run's
plan is one of them. The others are kept here, with what was measured of them, so that a plan can be
made of any without the model.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import FrontPoint
from search_spaces.space import SearchSpace

_TIMED = "latency_seconds"


class FrontRow(NamedTuple):
    """One line: a point, and its latency in seconds where the search minimised it too."""

    point: FrontPoint
    latency_seconds: float | None = None


def front_rows(
    points: Sequence[FrontPoint], latency: Sequence[NDArray[np.float64]]
) -> list[FrontRow]:
    """Points with the latency of each.

    Args:
        points: As the search left them.
        latency: For each unit the seconds of each option; empty where nothing is known of them.
    """
    if not latency:
        return [FrontRow(point) for point in points]
    return [
        FrontRow(p, sum(float(row[i]) for row, i in zip(latency, p.assignment, strict=True)))
        for p in points
    ]


def front_csv(space: SearchSpace, rows: Sequence[FrontRow]) -> str:
    """The rows as CSV, in their order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    timed = [_TIMED] if any(row.latency_seconds is not None for row in rows) else []
    heads = ["searched_bytes", "bits_per_weight", "loss_nats", "standard_error_nats", "sequences"]
    writer.writerow([*heads, *timed, "assignment"])
    for point, seconds in rows:
        bits = f"{space.bits_per_weight(point.bytes):.6g}"
        losses = [f"{nats:.6g}" for nats in (point.loss_nats, point.standard_error_nats)]
        cells = [point.bytes, bits, *losses, point.num_sequences]
        cells += [] if seconds is None else [f"{seconds:.6g}"]
        writer.writerow([*cells, " ".join(map(str, point.assignment))])
    return text.getvalue()


def load_front(path: Path, space: SearchSpace) -> list[FrontRow]:
    """Read what :func:`front_csv` made.

    Raises:
        ValueError: It cannot be read, is no such file, or does not fit the space.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_row(cells, space) for cells in csv.DictReader(file)]
    except OSError as error:
        raise ValueError(f"cannot read the front {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is no front of this run ({type(error).__name__}: {error}): 'allocator report' "
            "of the run writes it again"
        ) from error


def best_within(
    rows: Sequence[FrontRow], most_bytes: int, most_seconds: float | None = None
) -> FrontRow | None:
    """The row of least loss plus one standard error within the limits; ``None`` if none is.

    The standard error is charged as the searches do it: the least of many noisy losses is mostly
    the luckiest.

    Args:
        rows: To choose from.
        most_bytes: Of the searched units.
        most_seconds: Of latency; a row that does not state its own is never within it.
    """
    fitting = [row for row in rows if row.point.bytes <= most_bytes]
    if most_seconds is not None:
        timed = ((row, row.latency_seconds) for row in fitting)
        fitting = [row for row, seconds in timed if seconds is not None and seconds <= most_seconds]
    return min(
        fitting, key=lambda row: row.point.loss_nats + row.point.standard_error_nats, default=None
    )


def _row(cells: dict[str, str], space: SearchSpace) -> FrontRow:
    assignment = tuple(map(int, cells["assignment"].split()))
    size = int(cells["searched_bytes"])
    if len(assignment) != len(space.units) or min(assignment) < 0:
        raise ValueError(f"expected {len(space.units)} options, got {len(assignment)}")
    if space.bytes(assignment) != size:
        raise ValueError(f"says {size} bytes where its options hold {space.bytes(assignment)}")
    point = FrontPoint(
        assignment,
        size,
        float(cells["loss_nats"]),
        float(cells["standard_error_nats"]),
        int(cells["sequences"]),
    )
    seconds = cells.get(_TIMED)
    return FrontRow(point, None if seconds is None else float(seconds))

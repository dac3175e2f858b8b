"""A table of latencies per (matrix shape, operator) and the linear limit it makes. No torch.

The problem: two plans of equal bytes may differ twofold in speed. Where the time of every matrix in
every format is known, measured by :func:`objectives.latency.measure_latencies` or by a runtime's
own benchmark, the time of a plan is a sum over its units, and the MILP solver keeps it under a
limit beside the byte budget.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.problem import LinearConstraint
from search_spaces.space import Assignment, SearchSpace, Unit

_COLUMNS = ("rows", "columns", "operator", "seconds")
_MOST_MISSING = 4

Seconds = Mapping[tuple[tuple[int, int], str], float]
"""By ((rows, columns), operator label)."""


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass through one matrix, by shape and operator label.

    What a pass is (how many tokens, which machine, which kernels) is whoever measured it's to say;
    a limit speaks of the same.
    """

    seconds: Seconds

    def __post_init__(self) -> None:
        for (shape, label), value in self.seconds.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"latency of {label} at {shape[0]}x{shape[1]}: expected seconds, got {value}"
                )

    def costs(self, space: SearchSpace) -> tuple[NDArray[np.float64], ...]:
        """For each unit the (num_options,) seconds of its options; a cache takes none.

        Matrices of a unit add up, and so do stacked experts, each of which is a matrix.

        Raises:
            ValueError: The table lacks a shape under an operator that the space offers there.
        """
        needed = dict.fromkeys(
            (member.matrix_shape, option.operator.label)
            for unit, menu in zip(space.units, space.menus, strict=True)
            if not unit.is_cache
            for member in unit.members
            for option in menu
        )
        missing = [
            f"{s[0]}x{s[1]} {label}" for s, label in needed if (s, label) not in self.seconds
        ]
        if missing:
            more = f" and {len(missing) - _MOST_MISSING} more" * (len(missing) > _MOST_MISSING)
            raise ValueError(
                f"the latencies lack {', '.join(missing[:_MOST_MISSING])}{more}: every matrix "
                "shape needs one under every operator of its menu"
            )
        return tuple(
            np.array([self._unit(unit, option.operator.label) for option in menu], np.float64)
            for unit, menu in zip(space.units, space.menus, strict=True)
        )

    def total(self, space: SearchSpace, assignment: Assignment) -> float:
        """Seconds of a whole assignment."""
        pairs = zip(self.costs(space), assignment, strict=True)
        return math.fsum(float(cost[option]) for cost, option in pairs)

    def _unit(self, unit: Unit, label: str) -> float:
        if unit.is_cache:
            return 0.0
        return math.fsum(m.num_matrices * self.seconds[m.matrix_shape, label] for m in unit.members)


def latency_constraint(
    space: SearchSpace, table: LatencyTable, limit_seconds: float
) -> LinearConstraint:
    """At most so many seconds for all searched matrices together, as a limit for the MILP solver.

    Raises:
        ValueError: The table has gaps, or no assignment is that fast.
    """
    costs = table.costs(space)
    least = math.fsum(float(cost.min()) for cost in costs)
    if least > limit_seconds:
        raise ValueError(
            f"a latency of {limit_seconds:.6g} s cannot be met: the fastest option of every unit "
            f"takes {least:.6g} s together"
        )
    return LinearConstraint("latency", costs, limit_seconds)


def load_latencies(path: Path) -> LatencyTable:
    """Read a table from CSV or JSON.

    CSV has the header ``rows,columns,operator,seconds``; JSON is a list of objects with these keys.

    Raises:
        ValueError: It cannot be read, or a row is faulty or told twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark first
        json_rows = path.suffix == ".json"
        rows: Any = json.loads(text) if json_rows else list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the latencies {path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no latencies: expected rows of {', '.join(_COLUMNS)}")
    found: dict[tuple[tuple[int, int], str], float] = {}
    for number, row in enumerate(rows, start=1):
        key, seconds = _parse(row, f"{path}, row {number}")
        if key in found:
            raise ValueError(f"{path}, row {number}: a second latency of {key[1]} at {key[0]}")
        found[key] = seconds
    return LatencyTable(found)


def save_latencies(table: LatencyTable, path: Path) -> None:
    """Write a table as CSV or, by the name's ending, as JSON."""
    rows = list(_rows(table))
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rows(table: LatencyTable) -> Iterable[dict[str, Any]]:
    for ((rows, columns), label), seconds in table.seconds.items():
        yield dict(zip(_COLUMNS, (rows, columns, label, seconds), strict=True))


def _parse(row: Any, where: str) -> tuple[tuple[tuple[int, int], str], float]:
    try:
        key = (int(row["rows"]), int(row["columns"])), str(row["operator"])
        return key, float(row["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        expected = f"{where}: expected {', '.join(_COLUMNS)}"
        if isinstance(row, dict) and (lacking := [name for name in _COLUMNS if name not in row]):
            raise ValueError(f"{expected}; it lacks {', '.join(lacking)}") from error
        raise ValueError(f"{expected}, two counts, a label and a number; got {row!r}") from error

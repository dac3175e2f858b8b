"""The relaxed problem: what is the best that mixtures of options could do, at every budget?

Each unit's options are points (bytes, loss). Only the lower convex hull of a unit matters to the
linear relaxation, and the relaxation of the whole problem takes the hull steps of all units in
order of loss saved per byte until the budget is spent (Sinha & Zoltners 1979, "The
multiple-choice knapsack problem", section 2). The saving per byte of the first step that no longer
fits is the optimal Lagrange multiplier, and gives the lower bound that every solver here starts
from. Everything is vectorised over units, so millions of rows are as welcome as hundreds of
matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Losses, Solution, Status
from search_spaces.space import Assignment

Indices = NDArray[np.intp]
_Number = TypeVar("_Number", np.int64, np.float64)

_BLOCK_ROWS = 4096  # units wrapped at once: what stays in a processor's cache


@dataclass(frozen=True)
class MenuTable:
    """Menus of unequal length as one rectangle, each row in order of bytes.

    Short menus are filled up with copies of their option 0, which never change an answer. All that
    depends on bytes alone is computed here, once for any number of loss tables.

    Attributes:
        weights: (num_units, num_columns) bytes above the unit's cheapest option, in quanta.
        options: (num_units, num_columns) the option index that each column stands for.
        gather: (num_units, num_columns) where each column's loss lies in the concatenated losses.
        num_options: Options of all units together.
        least_bytes: Bytes of the cheapest assignment.
        quantum_bytes: Greatest common divisor of all byte differences: whatever the budget, only
            whole quanta of it can be used, which tightens the relaxation at no loss.
    """

    weights: Costs
    options: Indices
    gather: Indices
    num_options: int
    least_bytes: int
    quantum_bytes: int

    @classmethod
    def of(cls, bytes_: Sequence[Costs] | Costs) -> MenuTable:
        """The table of some menus.

        Args:
            bytes_: For each unit an int64 (num_options,) array of bytes.
        """
        sizes = np.fromiter((len(menu) for menu in bytes_), dtype=np.intp, count=len(bytes_))
        starts = np.cumsum(sizes) - sizes
        columns = np.arange(int(sizes.max()))
        options = np.where(columns < sizes[:, None], columns, 0)
        padded = _flat(bytes_)[starts[:, None] + options]
        order = np.argsort(padded, axis=1, kind="stable")
        options = np.take_along_axis(options, order, axis=1)
        padded = np.take_along_axis(padded, order, axis=1)
        above = padded - padded[:, :1]
        quantum = int(np.gcd.reduce(above, axis=None)) or 1
        gather = starts[:, None] + options
        least, num_options = int(padded[:, 0].sum()), int(sizes.sum())
        return cls(above // quantum, options, gather, num_options, least, quantum)

    def arrange(self, losses: Sequence[Losses] | Losses) -> Losses:
        """Losses by unit and option -> (num_units, num_columns) in the table's order.

        Raises:
            ValueError: Not one finite loss per option.
        """
        flat = _flat(losses)
        if len(losses) != len(self.gather) or len(flat) != self.num_options:
            raise ValueError(
                f"expected {self.num_options} losses of {len(self.gather)} units, "
                f"got {len(flat)} of {len(losses)}"
            )
        if not np.isfinite(flat).all():
            raise ValueError("losses must be finite")
        return flat[self.gather]

    def capacity(self, budget_bytes: int) -> int:
        """Quanta that can be spent above the cheapest assignment; negative when infeasible."""
        most = int(self.weights[:, -1].sum())
        return min(most, (budget_bytes - self.least_bytes) // self.quantum_bytes)

    def assignment(self, columns: Indices) -> Assignment:
        """(num_units,) columns -> option indices."""
        return tuple(self.options[np.arange(len(columns)), columns].tolist())

    def solution(
        self, columns: Indices, losses: Losses, *, gap: float, statistics: dict[str, int]
    ) -> Solution:
        """A feasible choice of columns as a solution; a gap within rounding is optimal.

        Args:
            columns: (num_units,) columns.
            losses: (num_units, num_columns) in the table's order.
            gap: Its proven distance from the optimum, before rounding is allowed for.
            statistics: Counts of the work done.
        """
        index = np.arange(len(columns))
        loss = float(sum(losses[index, columns].tolist()))  # as Problem.total_loss sums it
        margin = rounding(losses, columns)
        optimal = gap <= margin
        return Solution(
            choice=self.assignment(columns),
            loss=loss,
            bytes=self.least_bytes + self.quantum_bytes * int(self.weights[index, columns].sum()),
            lower_bound=loss if optimal else loss - gap - margin,
            status=Status.OPTIMAL if optimal else Status.FEASIBLE,
            statistics=statistics,
        )


def _flat(rows: Sequence[NDArray[_Number]] | NDArray[_Number]) -> NDArray[_Number]:
    """All rows one after the other; a matrix at no cost."""
    return rows.ravel() if isinstance(rows, np.ndarray) else np.concatenate(rows)


@dataclass(frozen=True)
class HullPath:
    """The convex-hull steps of all units, steepest first.

    Attributes:
        start: (num_units,) column of each unit's cheapest option, the better one of equals.
        units: (num_steps,) the unit that each step upgrades.
        columns: (num_steps,) the column it moves to.
        slopes: (num_steps,) loss saved per quantum, descending.
        spent: (num_steps,) quanta spent up to and including the step.
    """

    start: Indices
    units: Indices
    columns: Indices
    slopes: Losses
    spent: Costs

    def columns_after(self, num_steps: int) -> Indices:
        """(num_units,) columns once the first ``num_steps`` steps are taken."""
        columns = self.start.copy()
        columns[self.units[:num_steps]] = self.columns[:num_steps]  # the last write wins
        return columns


def hull_path(weights: Costs, losses: Losses) -> HullPath:
    """All units' lower convex hulls, merged.

    Args:
        weights: (num_units, num_columns) ascending from 0.
        losses: (num_units, num_columns) in the same order.
    """
    start = np.where(weights == 0, losses, np.inf).argmin(axis=1)
    pieces = []
    for begin in range(0, len(start), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        pieces += _wrap(weights[block], losses[block], start[block], begin)
    units, columns, slopes, widths = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    order = np.argsort(-slopes, kind="stable")  # equal steps of one unit stay in order
    spent = np.cumsum(widths[order].astype(np.int64))
    return HullPath(start, units[order], columns[order], slopes[order], spent)


def _wrap(
    weights: Costs, losses: Losses, here: Indices, first_unit: int
) -> list[tuple[Indices, Indices, Losses, Losses]]:
    """Wrap the hulls of a block of units at once, one hull point of each per round.

    Args:
        weights: (num_rows, num_columns) ascending from 0.
        losses: (num_rows, num_columns) in the same order.
        here: (num_rows,) where the hulls begin.
        first_unit: Number of the block's first unit.

    Returns:
        For each round the units, the columns stepped to, slopes and widths of the steps.
    """
    quanta = weights.astype(np.float64)
    units, steepest = first_unit + np.arange(len(here)), np.full(len(here), np.inf)
    rounds = []
    first = 0  # columns before it lie behind every hull point reached, and have been cut off
    while len(units):
        index = np.arange(len(units))
        width = quanta - quanta[index, here, None]
        # Nothing at or behind a hull point has less loss, so whatever saves is ahead.
        slope = (losses[index, here, None] - losses) / np.maximum(width, 1.0)
        there = slope.argmax(axis=1)  # the first of equals: collinear points stay on the path
        steep = np.minimum(slope[index, there], steepest)  # rounding must not reorder a hull
        step = width[index, there]
        going = np.flatnonzero((steep > 0) & (step > 0))
        units, there, steepest = units[going], there[going], steep[going]
        rounds.append((units, there + first, steepest, step[going]))
        quanta, losses = quanta[going, 1:], losses[going, 1:]
        here, first = there - 1, first + 1
    return rounds


@dataclass(frozen=True)
class Relaxation:
    """The relaxed optimum at one budget, and what every option costs beyond it.

    For any assignment ``x``, with ``left`` the quanta it leaves unspent, exactly

        loss(x) = bound + sum of reduced[i, x_i] + multiplier * left,

    and no term of it is negative when ``x`` is feasible: the search for the optimum is a search
    for the least such excess over the bound.

    Attributes:
        columns: (num_units,) the relaxed optimum rounded down to a feasible choice; its reduced
            losses are 0.
        multiplier: Optimal loss per quantum; 0 when every unit has its best option.
        left: Quanta that ``columns`` leaves unspent.
        unit: The unit of the first step that does not fit, -1 when all fit.
        column: Where that step leads.
    """

    columns: Indices
    multiplier: float
    left: int
    unit: int
    column: int

    def reduced(self, weights: Costs, losses: Losses) -> tuple[Costs, Losses]:
        """Each column's (quanta, reduced loss) relative to ``columns``, for a subset of units."""
        index = np.arange(len(losses))
        extra = weights - weights[index, self.columns, None]
        change = losses - losses[index, self.columns, None] + self.multiplier * extra
        return extra, np.maximum(change, 0.0)


def relax(path: HullPath, capacity: int) -> Relaxation:
    """Follow the path until the next step no longer fits."""
    num_steps = int(np.searchsorted(path.spent, capacity, side="right"))
    columns = path.columns_after(num_steps)
    left = capacity - (int(path.spent[num_steps - 1]) if num_steps else 0)
    if num_steps == len(path.spent):
        return Relaxation(columns, 0.0, left, -1, -1)
    unit, column = int(path.units[num_steps]), int(path.columns[num_steps])
    return Relaxation(columns, float(path.slopes[num_steps]), left, unit, column)


def rounding(losses: Losses, columns: Indices) -> float:
    """Differences of summed losses below this are rounding: 1e-14 of the magnitudes summed."""
    return 1e-14 * float(np.abs(losses[np.arange(len(columns)), columns]).sum())


@dataclass(frozen=True)
class Frontier:
    """Least loss against bytes: the lower convex hull over all budgets.

    Every point is an exact optimum of the problem at its own bytes: it minimises
    ``loss + multiplier * bytes`` for some multiplier, so nothing within its bytes has less loss.
    Between two points exact optima may lie above the hull; ``DynamicProgram.solve_many`` finds
    them.

    Attributes:
        bytes: (num_points,) exact bytes, strictly ascending.
        losses: (num_points,) summed losses, strictly descending.
    """

    bytes: Costs
    losses: Losses
    _table: MenuTable
    _path: HullPath

    @classmethod
    def of(cls, table: MenuTable, losses: Losses, path: HullPath) -> Frontier:
        """All points of a path; ``losses`` are in the table's order."""
        first = float(losses[np.arange(len(losses)), path.start].sum())
        saved = np.cumsum(path.slopes * np.diff(path.spent, prepend=0))
        spent = np.concatenate([[0], path.spent])
        return cls(
            table.least_bytes + table.quantum_bytes * spent,
            first - np.concatenate([[0.0], saved]),
            table,
            path,
        )

    def choice(self, point: int) -> Assignment:
        """The assignment at one point.

        Raises:
            ValueError: No such point.
        """
        if not 0 <= point < len(self.bytes):
            raise ValueError(f"the frontier has {len(self.bytes)} points, got index {point}")
        return self._table.assignment(self._path.columns_after(point))

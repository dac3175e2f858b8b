"""The joint problem of millions of rows: one multiplier for every row of every matrix.

Row-wise allocation makes each row of each matrix a unit with a menu of a few options. Python
objects per row, or a float64 table with all its temporaries, are out of the question at 20 million
rows, and an exact search is not needed: the relaxation leaves a gap of less than one upgrade of
one row. So: wrap the lower convex hull of every row, find the multiplier by counting upgrades in
two radix passes over their slopes, take every upgrade that saves more per byte, and spend what is
left. Slopes are kept in float32, which only ever costs a little of the gap: bytes are integers,
and the bound is computed from the losses themselves in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Losses, Problem, Status
from allocator.row_problem import RowChoice, RowLosses, RowProblem, RowSolution
from allocator.solvers.dynamic import DynamicProgram

_Keys = NDArray[np.int32]

_BLOCK_ROWS = 1 << 15  # rows worked on at once: what stays in a processor's cache
_BATCH = 1 << 19  # upgrades counted at once
_DIGIT_BITS = 15  # a non-negative float32 has 31 bits: a coarse digit of 16 and a fine one of 15
_FINE = (1 << _DIGIT_BITS) - 1
_LEAST_SAVING = np.float32(2.0**-120)  # below it a saving, scaled to at most 1, is none
_CORE_ROWS = 48  # rows solved exactly at the end
_CORE_STATES = 5_000


def solve_rows(problem: RowProblem) -> RowSolution:
    """The best multiplier's choice with its proven bound; equal problems, equal answers.

    Its bytes never exceed the budget, and stay below it by less than one upgrade of one row unless
    no upgrade is left that saves anything. Memory: one float32 per row and option at most, besides
    the problem.
    """
    least_bytes = problem.least_bytes
    if problem.budget_bytes < least_bytes:
        nothing = np.zeros(0, dtype=np.uint8)
        return RowSolution(nothing, math.inf, 0, math.inf, Status.INFEASIBLE, 0.0)
    matrices = [_Matrix(*pair) for pair in zip(problem.bytes, problem.losses, strict=True)]
    exponent = _exponent(problem.losses)
    quantum_bytes = 0
    keys = []
    for matrix in matrices:
        found, quantum_bytes = _hull_keys(matrix, exponent, quantum_bytes)
        keys.append(found)
    room = min(problem.budget_bytes, problem.most_bytes) - least_bytes
    capacity = room - room % quantum_bytes if quantum_bytes else 0
    critical, room = _critical_key(matrices, keys, capacity)
    columns, left, multiplier = _take_upgrades(matrices, keys, critical, room)
    del keys
    return _Ending(matrices, multiplier, left).solution(columns)


@dataclass(frozen=True)
class _Block:
    """Some rows of a matrix, their options in order of bytes, laid out option by option.

    Attributes:
        weights: (num_options, num_rows) bytes, or (num_options, 1) where all rows share them.
        losses: (num_options, num_rows); options of equal bytes have the least loss among them.
        options: The option that each entry stands for, of the shape of ``weights`` or ``losses``.
    """

    weights: Costs
    losses: NDArray[Any]
    options: NDArray[np.intp]


class _Matrix:
    """One matrix of a problem, read block by block."""

    def __init__(self, bytes_: Costs, losses: RowLosses) -> None:
        self.num_rows, self.num_options = losses.shape
        self._bytes = bytes_
        self._losses = losses

    def rows(self, num_rows: int) -> Iterator[slice]:
        """All rows, so many at a time."""
        for begin in range(0, self.num_rows, num_rows):
            yield slice(begin, min(begin + num_rows, self.num_rows))

    def order(self, rows: slice) -> NDArray[np.intp]:
        """(num_options, num_rows or 1) options in order of bytes; a column where rows agree."""
        own = self._own(rows)
        if (own[:, 1:] >= own[:, :-1]).all():
            return np.arange(self.num_options)[:, None]
        return np.argsort(own, axis=1, kind="stable").T

    def weights(self, rows: slice, order: NDArray[np.intp]) -> Costs:
        """(num_options, num_rows or 1) bytes in this order."""
        own = self._own(rows)
        if order.shape[1] == len(own):
            return np.take_along_axis(own.T, order, axis=0)
        return np.ascontiguousarray(own.T)

    def widths(self, rows: slice) -> Costs:
        """(num_options - 1, num_rows or 1) bytes from each option to the next dearer one."""
        return np.diff(self.weights(rows, self.order(rows)), axis=0)

    def _own(self, rows: slice) -> Costs:
        """(num_rows or 1, num_options) bytes as the problem has them."""
        return self._bytes[None] if self._bytes.ndim == 1 else self._bytes[rows]

    def menu(self, row: int) -> tuple[Costs, Losses]:
        """(num_options,) bytes and losses of one row, in order of options."""
        own = self._bytes if self._bytes.ndim == 1 else self._bytes[row]
        return own, self._losses[row].astype(np.float64)

    def block(self, rows: slice) -> _Block:
        """Some rows in order of bytes."""
        order = self.order(rows)
        weights = self.weights(rows, order)
        if order.shape[1] == 1:
            losses = np.ascontiguousarray(self._losses[rows].T[order[:, 0]])
        else:
            losses = np.take_along_axis(self._losses[rows].T, order, axis=0)
        same = weights[1:] == weights[:-1]
        if same.any():
            order = np.broadcast_to(order, losses.shape).copy()
            last = self.num_options - 1
            for step in range(last):
                better = same[step] & (losses[step] <= losses[step + 1])
                _copy_where(better, step, step + 1, losses, order)
            for step in reversed(range(last)):
                _copy_where(same[step], step + 1, step, losses, order)
        return _Block(weights, losses, order)


def _copy_where(where: NDArray[np.bool_], source: int, target: int, *arrays: NDArray[Any]) -> None:
    for array in arrays:
        np.copyto(array[target], array[source], where=where)


def _exponent(losses: tuple[RowLosses, ...]) -> int:
    """A power of two that no difference of losses within a matrix exceeds."""
    return math.frexp(max(float(loss.max()) - float(loss.min()) for loss in losses))[1]


def _hull_keys(matrix: _Matrix, exponent: int, quantum_bytes: int) -> tuple[_Keys, int]:
    """Wrap the hulls of a matrix.

    Args:
        matrix: Its rows.
        exponent: Losses are scaled by ``2**-exponent``.
        quantum_bytes: Greatest common divisor of the byte differences so far.

    Returns:
        (num_options - 1, num_rows) what the hull saves per byte from each option to the next, as
        the bits of a float32, which order like the numbers; and the divisor with this matrix.
    """
    keys = np.empty((matrix.num_options - 1, matrix.num_rows), dtype=np.int32)
    for rows in matrix.rows(_BLOCK_ROWS):
        block = matrix.block(rows)
        if quantum_bytes != 1 and (block.weights.shape[1] > 1 or not rows.start):
            above = block.weights[1:] - block.weights[:1]
            quantum_bytes = int(np.gcd.reduce(above, axis=None, initial=quantum_bytes))
        keys[:, rows] = _savings(block, exponent).view(np.int32)
    return keys, quantum_bytes


def _savings(block: _Block, exponent: int) -> NDArray[np.float32]:
    """(num_options - 1, num_rows) scaled loss that the lower convex hull saves per byte.

    From option j to the next it is the least, over all starts a <= j, of the steepest descent from
    a to any end b > j (the max-min formula of isotonic regression). It needs no branches, and falls
    along each row whatever the rounding.
    """
    losses = block.losses
    if abs(exponent) > 100:  # beyond what float32 can scale
        losses = losses.astype(np.float64)
    num_options, num_rows = losses.shape
    least = np.full((num_options - 1, num_rows), np.inf, dtype=losses.dtype)
    slope, steepest = np.empty_like(losses[0]), np.empty_like(losses[0])
    scale = math.ldexp(1.0, -exponent)
    for start in range(num_options - 1):
        steepest.fill(-np.inf)
        for end in reversed(range(start + 1, num_options)):
            width = block.weights[end] - block.weights[start]
            # No width means equal losses: a step of nothing, whatever its slope.
            inverse = np.where(width > 0, scale / np.maximum(width, 1), 0.0)
            np.subtract(losses[start], losses[end], out=slope)
            np.multiply(slope, inverse.astype(losses.dtype), out=slope)
            np.maximum(steepest, slope, out=steepest)
            np.minimum(least[end - 1], steepest, out=least[end - 1])
    savings: NDArray[np.float32] = least.astype(np.float32, copy=False)
    savings[savings < _LEAST_SAVING] = 0.0
    return savings


def _critical_key(matrices: list[_Matrix], keys: list[_Keys], capacity: int) -> tuple[int, int]:
    """The greatest key whose upgrades, with all above it, no longer all fit.

    Returns:
        The key, 0 when everything that saves fits, and the bytes left for the upgrades at it.
    """
    spent = _spent_from(matrices, keys, None)
    # Digit 0 holds the upgrades that save nothing, which are never bought.
    coarse = int(np.count_nonzero(spent[1:] > capacity))
    room = capacity - int(spent[coarse + 1])
    if not coarse:
        return 0, room
    spent = _spent_from(matrices, keys, coarse)
    fine = int(np.count_nonzero(spent > room)) - 1
    return coarse << _DIGIT_BITS | fine, room - int(spent[fine + 1])


def _spent_from(matrices: list[_Matrix], keys: list[_Keys], coarse: int | None) -> Costs:
    """(num_digits + 1,) bytes of all upgrades whose digit is at least so much.

    Args:
        matrices: Their widths.
        keys: Of each matrix.
        coarse: None for the coarse digits of all keys, or else the fine ones of keys with this one.
    """
    num_digits = 1 << (_DIGIT_BITS + 1 if coarse is None else _DIGIT_BITS)
    spent = np.zeros(num_digits + 1, dtype=np.int64)
    for steps, widths in _batches(matrices, keys):
        digits = steps >> _DIGIT_BITS
        if coarse is not None:
            where = np.flatnonzero(digits == coarse)
            digits, widths = steps[where] & _FINE, widths[where]
        # Sums of whole numbers: exact in float64.
        spent[:-1] += np.bincount(digits, widths, num_digits).astype(np.int64)
    total: Costs = spent[::-1].cumsum()[::-1]
    return total


def _batches(matrices: list[_Matrix], keys: list[_Keys]) -> Iterator[tuple[_Keys, Losses]]:
    """All keys and their widths, flat, many at a time: a count of digits costs as much as many."""
    parts: list[tuple[_Keys, Losses]] = []
    size = 0
    for matrix, own in zip(matrices, keys, strict=True):
        for rows in matrix.rows(_BLOCK_ROWS):
            steps = own[:, rows]
            widths = np.broadcast_to(matrix.widths(rows).astype(np.float64), steps.shape)
            parts.append((steps.ravel(), widths.ravel()))
            size += steps.size
            if size >= _BATCH:
                yield _joined(parts)
                parts, size = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[tuple[_Keys, Losses]]) -> tuple[_Keys, Losses]:
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([w for _, w in parts])


def _take_upgrades(
    matrices: list[_Matrix], keys: list[_Keys], critical: int, room: int
) -> tuple[list[RowChoice], int, float]:
    """Take all upgrades above the critical key, and those at it, in order of rows, until one fails.

    Returns:
        For each matrix (num_rows,) positions in order of bytes, the bytes still left, and the loss
        per byte of the upgrade that failed: the multiplier, 0 if there is none.
    """
    taken, multiplier = [], 0.0
    buying = critical > 0
    for matrix, own in zip(matrices, keys, strict=True):
        columns = np.zeros(matrix.num_rows, dtype=np.uint8)
        for rows in matrix.rows(_BLOCK_ROWS):
            block = own[:, rows]
            np.sum(block > critical, axis=0, dtype=np.uint8, out=columns[rows])
            row, step = np.nonzero((block == critical).T) if buying else ((), ())
            if len(row):
                widths = np.broadcast_to(matrix.widths(rows), block.shape)[step, row]
                spent = np.cumsum(widths)
                num_fitting = int(np.searchsorted(spent, room, side="right"))
                if num_fitting < len(row):
                    buying, failed = False, int(row[num_fitting])
                    steps = step[row == failed]
                    one = slice(rows.start + failed, rows.start + failed + 1)
                    multiplier = _slope(matrix.block(one), int(steps[0]), int(steps[-1]) + 1)
                counts = np.bincount(row[:num_fitting], minlength=block.shape[1])
                columns[rows] += counts.astype(np.uint8)
                room -= int(spent[num_fitting - 1]) if num_fitting else 0
        taken.append(columns)
    return taken, room, multiplier


def _slope(block: _Block, start: int, end: int) -> float:
    """Loss that a block of one row saves per byte between two positions."""
    saving = float(block.losses[start, 0]) - float(block.losses[end, 0])
    return max(0.0, saving / int(block.weights[end, 0] - block.weights[start, 0]))


class _Ending:
    """The last pass: sums up a choice and its bound, then improves it where that is easiest.

    For any choice within the budget, with ``left`` the bytes it leaves unspent,
    ``loss = bound + sum of reduced losses + multiplier * left``, as in `hull.py`. What ``left``
    wastes is won back by solving a few rows exactly: those with the cheapest deviations.
    """

    def __init__(self, matrices: list[_Matrix], multiplier: float, left: int) -> None:
        self._matrices = matrices
        self._multiplier = multiplier
        self._left = left
        self._loss: list[float] = []
        self._magnitude: list[float] = []
        self._excess = [multiplier * left]
        self._bytes = 0
        self._core: list[tuple[float, int, int]] = []

    def solution(self, columns: list[RowChoice]) -> RowSolution:
        """Go over all rows once, then improve.

        Args:
            columns: For each matrix (num_rows,) positions in order of bytes; overwritten with
                options.
        """
        for index, (matrix, own) in enumerate(zip(self._matrices, columns, strict=True)):
            for rows in matrix.rows(_BLOCK_ROWS):
                own[rows] = self._add(matrix.block(rows), own[rows], (index, rows.start))
        loss, bytes_ = math.fsum(self._loss), self._bytes
        excess, margin = math.fsum(self._excess), 1e-14 * math.fsum(self._magnitude)
        if excess > margin and self._core:
            saving, extra = self._solve_core(columns)
            loss, excess, bytes_ = loss - saving, excess - saving, bytes_ + extra
        optimal = excess <= margin
        return RowSolution(
            choice=np.concatenate(columns),
            loss=loss,
            bytes=bytes_,
            lower_bound=loss if optimal else loss - excess - margin,
            status=Status.OPTIMAL if optimal else Status.FEASIBLE,
            multiplier=self._multiplier,
        )

    def _add(self, block: _Block, columns: RowChoice, place: tuple[int, int]) -> RowChoice:
        """Take a block into the sums; returns the (num_rows,) options of its columns."""
        index = columns[None].astype(np.intp)
        shape = block.losses.shape
        losses = np.take_along_axis(block.losses, index, axis=0)[0].astype(np.float64)
        weights = np.take_along_axis(np.broadcast_to(block.weights, shape), index, axis=0)[0]
        options = np.take_along_axis(np.broadcast_to(block.options, shape), index, axis=0)[0]
        self._loss.append(float(losses.sum()))
        self._bytes += int(weights.sum())
        price = losses + self._multiplier * (weights - block.weights[0])
        reduced, deviation = np.zeros_like(price), np.full_like(price, np.inf)
        magnitude = np.abs(losses)  # of what the reduced losses are differences of
        for own, weight in zip(block.losses, block.weights, strict=True):
            change = own + self._multiplier * (weight - block.weights[0]) - price
            np.copyto(magnitude, np.abs(own), where=change < -reduced)
            np.maximum(reduced, -change, out=reduced)
            np.minimum(deviation, np.where(weight == weights, np.inf, change), out=deviation)
        self._magnitude.append(float(magnitude.sum()))
        self._excess.append(float(reduced.sum()))
        if self._left:
            num_kept = min(_CORE_ROWS, len(deviation))
            rows = np.argpartition(deviation, num_kept - 1)[:num_kept]
            found = zip(deviation[rows].tolist(), rows.tolist(), strict=True)
            self._core += [(value, place[0], place[1] + row) for value, row in found]
            self._core = sorted(self._core)[:_CORE_ROWS]
        chosen: RowChoice = options.astype(np.uint8)
        return chosen

    def _solve_core(self, columns: list[RowChoice]) -> tuple[float, int]:
        """Solve the rows of the core exactly; returns the loss saved and the bytes added."""
        places = [(index, row) for _, index, row in self._core]
        menus = [self._matrices[index].menu(row) for index, row in places]
        before = tuple(int(columns[index][row]) for index, row in places)
        now = Problem(tuple(m[0] for m in menus), tuple(m[1] for m in menus), 0)
        now = replace(now, budget_bytes=now.total_bytes(before) + self._left)
        found = DynamicProgram(most_states=_CORE_STATES).solve(now)
        saving = now.total_loss(before) - found.loss
        if saving <= 0:
            return 0.0, 0
        for (index, row), option in zip(places, found.choice, strict=True):
            columns[index][row] = option
        return saving, found.bytes - now.total_bytes(before)

"""The additive problem whose units are rows: arrays instead of objects. No torch, no randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Status

RowLosses = NDArray[np.float32] | NDArray[np.float64]
RowChoice = NDArray[np.uint8]

MOST_OPTIONS = 256


@dataclass(frozen=True)
class RowProblem:
    """Choose one option per row: least summed loss within a byte budget.

    Attributes:
        bytes: For each matrix int64 (num_options,) where its rows share their menu, or else
            (num_rows, num_options).
        losses: For each matrix float32 or float64 (num_rows, num_options), finite.
        budget_bytes: Most bytes that all rows together may use.
    """

    bytes: tuple[Costs, ...]
    losses: tuple[RowLosses, ...]
    budget_bytes: int

    def __post_init__(self) -> None:
        if len(self.bytes) != len(self.losses) or not self.losses:
            raise ValueError(f"{len(self.bytes)} matrices priced, {len(self.losses)} with losses")
        for index, (cost, loss) in enumerate(zip(self.bytes, self.losses, strict=True)):
            where = f"matrix {index}"
            if loss.ndim != 2 or not loss.size or loss.shape[1] > MOST_OPTIONS:
                raise ValueError(
                    f"{where}: losses must be (rows, 1 to {MOST_OPTIONS} options), got {loss.shape}"
                )
            if loss.dtype not in (np.float32, np.float64) or cost.dtype != np.int64:
                raise ValueError(
                    f"{where}: expected int64 bytes and float32 or float64 losses, "
                    f"got {cost.dtype} and {loss.dtype}"
                )
            if cost.shape not in (loss.shape, loss.shape[1:]):
                raise ValueError(f"{where}: {cost.shape} bytes but {loss.shape} losses")
            if cost.min() < 0:
                raise ValueError(f"{where}: bytes must not be negative")
            if not (math.isfinite(loss.min()) and math.isfinite(loss.max())):
                raise ValueError(f"{where}: losses must be finite")

    @property
    def num_rows(self) -> int:
        """Rows of all matrices."""
        return sum(len(loss) for loss in self.losses)

    @property
    def least_bytes(self) -> int:
        """Bytes when every row takes its cheapest option."""
        return self._total(np.minimum)

    @property
    def most_bytes(self) -> int:
        """Bytes when every row takes its dearest option."""
        return self._total(np.maximum)

    def split(self, choice: RowChoice) -> list[RowChoice]:
        """(num_rows,) choice -> a view for each matrix."""
        ends = np.cumsum([len(loss) for loss in self.losses])
        return np.split(choice, ends[:-1].tolist())

    def _total(self, extreme: np.ufunc) -> int:
        total = 0
        for cost, loss in zip(self.bytes, self.losses, strict=True):
            of_rows = extreme.reduce(cost, axis=-1)
            total += int(of_rows) * len(loss) if cost.ndim == 1 else int(of_rows.sum())
        return total


@dataclass(frozen=True)
class RowSolution:
    """An answer to a :class:`RowProblem`.

    Attributes:
        choice: (num_rows,) option of each row, matrix after matrix; empty when infeasible.
        loss: Its summed loss, in the unit of the problem's losses.
        bytes: Its exact bytes.
        lower_bound: No choice within the budget has a smaller summed loss (Lagrangian dual).
        status: How it came out.
        multiplier: Loss per byte at which upgrades stopped being bought.
    """

    choice: RowChoice = field(repr=False)
    loss: float
    bytes: int
    lower_bound: float
    status: Status
    multiplier: float

    @property
    def gap(self) -> float:
        """``loss - lower_bound``: how far from optimal the choice can be at most."""
        return max(0.0, self.loss - self.lower_bound)

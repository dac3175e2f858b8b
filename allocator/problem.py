"""The additive allocation problem and its solution. No torch, no model, no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from search_spaces.space import Assignment

Costs = NDArray[np.int64]
Losses = NDArray[np.float64]


class Status(Enum):
    """How a solution came out; the value is the sentence shown to users."""

    OPTIMAL = "proved optimal for the additive model"
    FEASIBLE = "feasible, within the stated gap of the additive optimum"
    INFEASIBLE = "no assignment fits the budget"


@dataclass(frozen=True)
class LinearConstraint:
    """One more linear limit besides the byte budget, such as latency.

    Attributes:
        name: For messages.
        costs: For each unit a (num_options,) array of what each option uses up.
        limit: Most that an assignment may use.
    """

    name: str
    costs: tuple[NDArray[np.float64], ...]
    limit: float


@dataclass(frozen=True)
class Problem:
    """Choose one option per unit: least summed loss within a byte budget.

    Attributes:
        bytes: For each unit an int64 (num_options,) array.
        losses: For each unit a float64 (num_options,) array, finite, lower is better.
        budget_bytes: Most bytes an assignment may use.
        constraints: Further linear limits; only the MILP solver takes them.
        ties: Groups of units that must take the same option index; only the MILP solver takes them.
    """

    bytes: tuple[Costs, ...]
    losses: tuple[Losses, ...]
    budget_bytes: int
    constraints: tuple[LinearConstraint, ...] = ()
    ties: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.bytes) != len(self.losses) or not self.bytes:
            raise ValueError(f"{len(self.bytes)} units priced, {len(self.losses)} with losses")
        for index, (cost, loss) in enumerate(zip(self.bytes, self.losses, strict=True)):
            if cost.shape != loss.shape or cost.ndim != 1 or not len(cost):
                raise ValueError(f"unit {index}: {cost.shape} bytes but {loss.shape} losses")
            if not np.isfinite(loss).all():
                raise ValueError(f"unit {index}: losses must be finite")
            if (cost < 0).any():
                raise ValueError(f"unit {index}: bytes must not be negative")

    @property
    def least_bytes(self) -> int:
        """Bytes of the cheapest assignment."""
        return sum(int(cost.min()) for cost in self.bytes)

    @property
    def most_bytes(self) -> int:
        """Bytes of the dearest assignment."""
        return sum(int(cost.max()) for cost in self.bytes)

    def total_bytes(self, choice: Sequence[int]) -> int:
        """Exact bytes of an assignment."""
        return sum(int(cost[i]) for cost, i in zip(self.bytes, choice, strict=True))

    def total_loss(self, choice: Sequence[int]) -> float:
        """Summed loss of an assignment."""
        return float(sum(float(loss[i]) for loss, i in zip(self.losses, choice, strict=True)))


@dataclass(frozen=True)
class Solution:
    """An answer to a :class:`Problem`.

    Attributes:
        choice: One option index per unit; empty when infeasible.
        loss: Its summed loss, in the unit of the problem's losses.
        bytes: Its exact bytes.
        lower_bound: No assignment within the budget has a smaller summed loss.
        status: How it came out.
        statistics: Counts of the work done, for curious users.
    """

    choice: Assignment
    loss: float
    bytes: int
    lower_bound: float
    status: Status
    statistics: dict[str, int] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """``loss - lower_bound``: how far from optimal the choice can be at most."""
        return max(0.0, self.loss - self.lower_bound)

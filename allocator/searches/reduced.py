"""A reduced space: a few multipliers on the loss table, decoded by the exact solver.

Samplers gain nothing over the DP plan in hundreds of raw coordinates. But tables are mostly wrong
in common: a whole projection class, or the early blocks, matter more than the table says. So one
log factor per kind and one per depth band (7 kinds and 4 bands: 11 numbers) multiply the losses of
a unit by ``exp(factor of its kind + factor of its band)``, and the DP chooses the options. Every
point decodes to an assignment within the budget, and zero decodes to the DP plan.

There is a way back for assignments that come from elsewhere. It is taken only where the point found
decodes to nearly the same assignment: what was measured is then said of the point as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Losses
from allocator.searches.base import SearchSetting
from allocator.searches.multiplier_fit import fit_multipliers
from allocator.searches.repair import check_setting
from allocator.searches.sampled import Axis
from allocator.solvers.dynamic import Oracle
from search_spaces.space import Assignment

_MOST_MOVED = 0.05  # share of an assignment's bytes that its point may put elsewhere


_WIDEST = 50.0  # beyond it multiplied losses overflow


@dataclass(frozen=True)
class ReducedOptions:
    """How the reduced space is cut, for every search on it.

    Attributes:
        num_bands: Depth bands, each with one multiplier.
        log_range: Multipliers lie within ``exp(-log_range)`` and ``exp(log_range)``.
        remeasure_every: Every so many asks the best so far is measured on further sequences;
            0 never does.
    """

    num_bands: int = 4
    log_range: float = 1.5
    remeasure_every: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.log_range <= _WIDEST:
            raise ValueError(f"expected a log range of 0 to {_WIDEST:g}, got {self.log_range}")
        if self.num_bands < 1:
            raise ValueError(f"expected at least one depth band, got {self.num_bands}")
        if self.remeasure_every < 0:
            raise ValueError("the remeasuring interval must not be negative")


@dataclass(frozen=True)
class ReducedSpace:
    """Log multipliers of groups of units.

    Attributes:
        oracle: The exact solver for the menus' bytes.
        bytes: For each unit the bytes of its options.
        losses: The loss table that is multiplied.
        budget_bytes: Most bytes of an assignment.
        factors: Names of the factors, ``kind NAME`` and ``band INDEX``; empty when there is
            nothing to tell apart.
        members: (num_units, num_factors) 1 where a factor applies to a unit, else 0.
        log_range: Most that a log multiplier is off 0.
        least_bytes: Bytes of the cheapest assignment.
    """

    oracle: Oracle
    bytes: tuple[Costs, ...]
    losses: tuple[Losses, ...]
    budget_bytes: int
    factors: tuple[str, ...]
    members: NDArray[np.float64]
    log_range: float
    least_bytes: int

    @classmethod
    def from_setting(cls, setting: SearchSetting, options: ReducedOptions) -> ReducedSpace:
        """Factors for the kinds and depth bands of the units that have a choice.

        Bands hold equally many depths. Units outside the blocks (depth -1) are in none.

        Raises:
            ValueError: A setting that no search can work on.
        """
        check_setting(setting)
        num_bands = options.num_bands
        free = [unit for unit, cost in enumerate(setting.problem.bytes) if len(cost) > 1]
        depths = sorted({setting.depths[unit] for unit in free if setting.depths[unit] >= 0})
        band = {depth: i * num_bands // len(depths) for i, depth in enumerate(depths)}
        groups: dict[str, list[int]] = {}
        for unit in free:
            groups.setdefault(f"kind {setting.kinds[unit]}", []).append(unit)
            if setting.depths[unit] in band:
                groups.setdefault(f"band {band[setting.depths[unit]]}", []).append(unit)
        # A factor of every free unit rescales the whole table, which changes no plan.
        factors = tuple(sorted(name for name, units in groups.items() if len(units) < len(free)))
        members = np.zeros((len(setting.problem.bytes), len(factors)))
        for column, name in enumerate(factors):
            members[groups[name], column] = 1.0
        problem = setting.problem
        oracle = Oracle(problem.bytes)
        return cls(
            oracle=oracle,
            bytes=problem.bytes,
            losses=problem.losses,
            budget_bytes=problem.budget_bytes,
            factors=factors,
            members=members,
            log_range=options.log_range,
            least_bytes=problem.least_bytes,
        )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """One per factor."""
        return tuple(Axis(name, -self.log_range, self.log_range) for name in self.factors)

    @property
    def seeds(self) -> tuple[tuple[float, ...], ...]:
        """The DP plan."""
        return ((0.0,) * len(self.factors),)

    def decode(self, point: NDArray[np.float64], budget_bytes: int | None = None) -> Assignment:
        """The DP plan of the multiplied table.

        Args:
            point: (num_factors,) natural logarithms of the multipliers, in the order of
                ``factors``.
            budget_bytes: Another budget than the setting's; the cheapest assignment must fit.
        """
        weights = np.exp(self.members @ point)
        losses = [loss * weight for loss, weight in zip(self.losses, weights, strict=True)]
        budget = self.budget_bytes if budget_bytes is None else budget_bytes
        solution = self.oracle.solve(losses, budget)
        assert solution.choice, "the setting's starts fit the budget, so the problem is feasible"
        return solution.choice

    def encode(
        self, assignment: Assignment, budget_bytes: int | None = None
    ) -> tuple[float, ...] | None:
        """The point that decodes to nearly an assignment.

        Args:
            assignment: Option index of each unit.
            budget_bytes: Another budget than the setting's to decode at.

        Returns:
            (num_factors,), or ``None`` where even the nearest point found puts more than a
            twentieth of the assignment's bytes elsewhere.
        """
        fitted = fit_multipliers(self.bytes, self.losses, self.members, assignment)
        point = np.clip(fitted, -self.log_range, self.log_range)
        decoded = self.decode(point, budget_bytes)
        pairs = [
            (int(cost[i]), int(cost[j]))
            for cost, i, j in zip(self.bytes, assignment, decoded, strict=True)
        ]
        # what moves is counted where it is missed and where it is added
        moved = sum(abs(wanted - found) for wanted, found in pairs) / 2
        if moved > _MOST_MOVED * sum(wanted for wanted, _ in pairs):
            return None
        return tuple(map(float, point))

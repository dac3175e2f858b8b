"""A reduced space: a few multipliers on the loss table, decoded by the exact solver.

Samplers gain nothing over the DP plan in hundreds of raw coordinates. But tables are mostly wrong
in common: a whole projection class, or the early blocks, matter more than the table says. So one
log factor per kind and one per depth band (7 kinds and 4 bands: 11 numbers) multiply the losses of
a unit by ``exp(factor of its kind + factor of its band)``, and the DP chooses the options. Every
point decodes to an assignment within the budget, and zero decodes to the DP plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Losses
from allocator.searches.base import SearchSetting
from allocator.solvers.dynamic import Oracle
from search_spaces.space import Assignment


@dataclass(frozen=True)
class ReducedSpace:
    """Log multipliers of groups of units.

    Attributes:
        oracle: The exact solver for the menus' bytes.
        losses: The loss table that is multiplied.
        budget_bytes: Most bytes of an assignment.
        factors: Names of the factors, ``kind NAME`` and ``band INDEX``; empty when there is
            nothing to tell apart.
        members: (num_units, num_factors) 1 where a factor applies to a unit, else 0.
    """

    oracle: Oracle
    losses: tuple[Losses, ...]
    budget_bytes: int
    factors: tuple[str, ...]
    members: NDArray[np.float64]

    @classmethod
    def from_setting(cls, setting: SearchSetting, num_bands: int) -> ReducedSpace:
        """Factors for the kinds and ``num_bands`` depth bands of the units that have a choice.

        Bands hold equally many depths. Units outside the blocks (depth -1) are in none.
        """
        if num_bands < 1:
            raise ValueError(f"expected at least one depth band, got {num_bands}")
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
        return cls(oracle, problem.losses, problem.budget_bytes, factors, members)

    def decode(self, log_multipliers: NDArray[np.float64]) -> Assignment:
        """The DP plan of the multiplied table.

        Args:
            log_multipliers: (num_factors,) natural logarithms, in the order of ``factors``.
        """
        weights = np.exp(self.members @ log_multipliers)
        losses = [loss * weight for loss, weight in zip(self.losses, weights, strict=True)]
        solution = self.oracle.solve(losses, self.budget_bytes)
        assert solution.choice, "the setting's starts fit the budget, so the problem is feasible"
        return solution.choice

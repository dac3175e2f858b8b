"""Optspa's space under TPE: one ratio per group of decoder layers, and cache levels per group.

The space as published: contiguous groups of layers, each with a ratio within 0.05 of the target in
five steps (in fine mode one per group and projection class), and a level of the KV cache for each
group. Published code draws ratios freely and throws away the third of all trials that misses the
target; here every point is moved onto the budget by one common shift of the ratios
(:func:`~allocator.ratio_plans.nearest_assignment`), so no trial is wasted. What is nearest to the
ratios may leave bytes that a single larger option would fit into; they are left, since filling them
would take a unit off its group's ratio. Neither a loss table nor what others measured is used: it
is there to compare with.

LMM adaptive sparsity with KV-cache compression, "Optspa", ICME 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from allocator.ratio_plans import nearest_assignment
from allocator.searches.base import SearchSetting
from allocator.searches.repair import check_setting
from allocator.searches.sampled import Axis, Sampled
from allocator.searches.tpe import tpe_sampler
from search_spaces.space import Assignment

_CACHES = ("cache", "keys_cache", "values_cache")  # kinds of units that are caches


@dataclass(frozen=True)
class OptspaOptions:
    """The published space and sampler.

    Attributes:
        num_groups: Contiguous groups of decoder layers; leftover layers go to the first ones.
        fine: One ratio per group and projection class instead of one per group.
        radius: Most that a ratio is off the target.
        step: Distance between two values of a ratio.
        num_startup_trials: Finished trials before the sampler models anything.
        num_ei_candidates: Points drawn for each proposal, of which the best is taken.
        remeasure_every: Every so many asks the best so far is measured on further sequences;
            0 never does, as published.
    """

    num_groups: int = 8
    fine: bool = False
    radius: float = 0.05
    step: float = 0.025
    num_startup_trials: int = 10
    num_ei_candidates: int = 24
    remeasure_every: int = 4

    def __post_init__(self) -> None:
        if min(self.num_groups, self.num_ei_candidates) < 1:
            raise ValueError("expected at least one group and one candidate per proposal")
        if not (math.isfinite(self.radius) and 0 < self.step <= self.radius):
            raise ValueError(
                f"expected a positive step up to the radius, got {self.step} and {self.radius}"
            )
        if min(self.num_startup_trials, self.remeasure_every) < 0:
            raise ValueError("startup trials and the remeasuring interval must not be negative")


_DEFAULTS = OptspaOptions()


class Optspa(Sampled):
    """TPE, each coordinate on its own as published, over ratios of groups of layers.

    Args:
        setting: What to search.
        options: The space and the sampler.
    """

    name: ClassVar[str] = "optspa"

    def __init__(self, setting: SearchSetting, options: OptspaOptions = _DEFAULTS) -> None:
        super().__init__(
            setting,
            GroupSpace.from_setting(setting, options),
            lambda: tpe_sampler(
                setting.seed,
                multivariate=False,
                num_startup_trials=options.num_startup_trials,
                num_ei_candidates=options.num_ei_candidates,
            ),
            remeasure_every=options.remeasure_every,
        )


@dataclass(frozen=True)
class GroupSpace:
    """Ratios and cache levels of groups of layers.

    Attributes:
        problem: Bytes and budget.
        removed: For each unit the ratio that each option removes.
        axes: The ratios' deviations from the target and the caches' levels.
        members: For each axis the units it steers.
        caches: Which units are caches with a choice.
    """

    problem: Problem
    removed: tuple[NDArray[np.float64], ...]
    axes: tuple[Axis, ...]
    members: tuple[tuple[int, ...], ...]
    caches: frozenset[int]

    @classmethod
    def from_setting(cls, setting: SearchSetting, options: OptspaOptions) -> GroupSpace:
        """Groups of the units that have a choice; those outside the blocks keep to the target.

        Raises:
            ValueError: A setting that no search can work on.
        """
        check_setting(setting)
        bytes_ = setting.problem.bytes
        free = [unit for unit, cost in enumerate(bytes_) if len(cost) > 1]
        caches = frozenset(unit for unit in free if setting.kinds[unit] in _CACHES)
        depths = sorted({setting.depths[unit] for unit in free if setting.depths[unit] >= 0})
        groups = np.array_split(depths, min(options.num_groups, len(depths))) if depths else []
        radius = options.step * round(options.radius / options.step)
        steered: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            for unit in (unit for unit in free if setting.depths[unit] in group):
                name = f"group {number}"
                if options.fine or unit in caches:
                    name += f" {setting.kinds[unit]}"
                steered.setdefault(name, []).append(unit)
        axes = tuple(
            Axis(name, 0.0, max(len(bytes_[unit]) for unit in units) - 1.0, 1.0)
            if units[0] in caches
            else Axis(name, -radius, radius, options.step)
            for name, units in steered.items()
        )
        members = tuple(map(tuple, steered.values()))
        return cls(setting.problem, setting.ratios, axes, members, caches)

    @property
    def seeds(self) -> tuple[tuple[float, ...], ...]:
        """Every ratio at the target, caches at their dearest."""
        steered = zip(self.axes, self.members, strict=True)
        return (tuple(a.high if units[0] in self.caches else 0.0 for a, units in steered),)

    def decode(self, point: NDArray[np.float64]) -> Assignment:
        """Caches at their levels, lowered where the weights would not fit; weights get the rest.

        Args:
            point: (num_axes,) deviations from the target, positive where more is removed; levels
                of caches.
        """
        choice = [0] * len(self.problem.bytes)
        ratios = np.zeros(len(choice))
        for value, units in zip(point, self.members, strict=True):
            for unit in units:
                if unit in self.caches:
                    choice[unit] = min(round(value), len(self.problem.bytes[unit]) - 1)
                else:
                    ratios[unit] = value
        weights = [unit for unit in range(len(choice)) if unit not in self.caches]
        budget = self.problem.budget_bytes - self._lower_caches(choice, weights)
        if weights:
            bytes_ = [self.problem.bytes[unit] for unit in weights]
            removed = [self.removed[unit] for unit in weights]
            found = nearest_assignment(bytes_, removed, ratios[weights], budget)
            for unit, option in zip(weights, found, strict=True):
                choice[unit] = option
        return tuple(choice)

    def encode(self, assignment: Assignment) -> tuple[float, ...] | None:
        """``None``: the baseline learns from its own trials only, as published."""
        return None

    def _lower_caches(self, choice: list[int], weights: list[int]) -> int:
        """Lower the dearest cache until the cheapest weights fit beside; the caches' bytes."""
        bytes_ = self.problem.bytes
        least = sum(int(bytes_[unit][0]) for unit in weights)
        spent = {unit: int(bytes_[unit][choice[unit]]) for unit in sorted(self.caches)}
        while least + sum(spent.values()) > self.problem.budget_bytes:
            unit = max((u for u in spent if choice[u]), key=spent.__getitem__)
            choice[unit] -= 1
            spent[unit] = int(bytes_[unit][choice[unit]])
        return sum(spent.values())

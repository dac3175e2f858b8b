"""Search for the expression that gives each layer its share of the budget, on the measured loss.

The problem: closed forms for a layer's sparsity (outlier ratios, spectra, influences) are guesses
that suit some models. DSA evolves the closed form itself, once, on a small model; what is found is
a :class:`~allocator.searches.expression.Formula` that other models apply without a search.

Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models",
NeurIPS 2024. The population, rates and selection of its runs are not published: here parents are
drawn from the best formulas so far, stages are crossed and one part is mutated. Signs, the mapper's
spread and whether blocks or single units get a ratio are searched too. Ratios become assignments
within the byte budget by :func:`~allocator.ratio_plans.nearest_assignment`.

What others measured was given by no formula, so none is learned from it: it may be the best, and it
says how difficult the text is, but parents are formulas only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from allocator.ratio_plans import nearest_assignment
from allocator.searches.base import SearchSetting
from allocator.searches.expression import GROUPS, POST, PRE, REDUCTIONS, SIGNS, Formula
from allocator.searches.paired import PairedSearch
from search_spaces.space import Assignment

T = TypeVar("T")

_MOST_DRAWS = 60  # formulas made until one gives a new assignment
_SPREAD_STEP = 0.25  # standard deviation of a mutation's log factor
_EXAMPLES = (
    Formula(("abs_log",), "variance", ("atan", "asin")),
    Formula(("abs",), "variance", ("identity",)),
)
"""Formulas in DSA's code."""


@dataclass(frozen=True)
class FormulaOptions:
    """Tuning of :class:`FormulaSearch`.

    Attributes:
        num_random: Formulas measured before any is bred; the published examples come first.
        num_parents: Parents are drawn from so many of the best.
        crossover: Chance that the stages come from two parents.
        spreads: What the mapper's spread is drawn from at first; 0.08 is published.
        groups: What may get one ratio; ``("block",)`` is published.
        remeasure_every: Every so many proposals the best so far is measured on more text.
    """

    num_random: int = 16
    num_parents: int = 6
    crossover: float = 0.5
    spreads: tuple[float, ...] = (0.04, 0.08, 0.15, 0.25, 0.4)
    groups: tuple[str, ...] = GROUPS
    remeasure_every: int = 5

    def __post_init__(self) -> None:
        if min(self.num_random, self.num_parents, self.remeasure_every) < 1:
            raise ValueError("expected at least one random formula, parent and step to remeasure")
        if not self.spreads or not self.groups or set(self.groups) - set(GROUPS):
            raise ValueError(f"expected spreads, and groups of {GROUPS}, got {self.groups}")
        if not all(0 < spread <= 0.5 for spread in self.spreads):
            raise ValueError(f"expected spreads above 0, at most 0.5, got {self.spreads}")
        if not 0 <= self.crossover <= 1:
            raise ValueError(f"expected a crossover of 0 to 1, got {self.crossover}")


_DEFAULTS = FormulaOptions()


class Layers:
    """What formulas are applied to: the importances of a setting's blocks and units.

    Args:
        setting: Its problem, depths and importances.

    Raises:
        ValueError: It has no importances, or not as many values for every unit.
    """

    def __init__(self, setting: SearchSetting) -> None:
        sizes = {len(sample) for sample in setting.importances}
        if not setting.importances:
            raise ValueError(
                "formula needs importances of the weights, which this run has not collected: "
                "choose another search"
            )
        if len(setting.importances) != len(setting.depths) or len(sizes) != 1:
            raise ValueError(
                f"expected samples of one size for {len(setting.depths)} units, got "
                f"{len(setting.importances)} of {sorted(sizes)} values"
            )
        self._setting = setting
        self._rows = list(setting.ratios)
        taken = [row[i] for row, i in zip(self._rows, setting.starts[0], strict=True)]
        self._removed = min(max(float(np.mean(taken)), 0.0), 1.0)

    def assignment(self, formula: Formula) -> Assignment:
        """The assignment within the budget that is nearest to a formula's ratios.

        Their mean is what the setting's first start removes, before they are moved to the budget.

        Raises:
            ValueError: The formula is infinite on these layers.
        """
        samples, members = self.groups[formula.group]
        ratios = formula.ratios(samples, self._removed)[members]
        problem = self._setting.problem
        return nearest_assignment(problem.bytes, self._rows, ratios, problem.budget_bytes)

    @cached_property
    def groups(self) -> dict[str, tuple[list[NDArray[np.float64]], NDArray[np.int64]]]:
        """For each kind of group: a sample per group, and the group of each unit.

        A block's sample pools those of its units by the units' bytes; units outside the blocks are
        groups of their own.
        """
        setting = self._setting
        keys = [depth if depth >= 0 else -1 - u for u, depth in enumerate(setting.depths)]
        found: dict[int, list[int]] = {}
        for unit, key in enumerate(keys):
            found.setdefault(key, []).append(unit)
        order = list(found)
        blocks = [self._pool(found[key]) for key in order]
        members = np.array([order.index(key) for key in keys], np.int64)
        own = np.arange(len(setting.depths), dtype=np.int64)
        return {"block": (blocks, members), "unit": (list(setting.importances), own)}

    def _pool(self, units: Sequence[int]) -> NDArray[np.float64]:
        """Quantiles of several units' importances, units weighted by their dense bytes."""
        samples = [self._setting.importances[unit] for unit in units]
        count = len(samples[0])
        sizes = [float(self._setting.problem.bytes[unit].max()) for unit in units]
        values = np.concatenate(samples)
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(np.repeat(sizes, count)[order])
        middles = (np.arange(count) + 0.5) / count * reached[-1]
        return np.asarray(values[order][np.searchsorted(reached, middles)], np.float64)


class FormulaSearch(PairedSearch):
    """DSA's search as ask/tell.

    Args:
        setting: What to search, with importances.
        options: Tuning.

    Raises:
        ValueError: The setting has no importances.
    """

    name: ClassVar[str] = "formula"
    needs_importances: ClassVar[bool] = True
    """A setting without them is refused."""

    def __init__(self, setting: SearchSetting, options: FormulaOptions = _DEFAULTS) -> None:
        super().__init__(setting, remeasure_every=options.remeasure_every)
        self._options = options
        self._layers = Layers(setting)
        self._formulas: dict[Assignment, Formula] = {}
        self._examples = [f for f in _EXAMPLES if f.group in options.groups]

    @property
    def formula(self) -> Formula | None:
        """The best formula so far; ``None`` before one was measured."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _ranked(self) -> list[Formula]:
        """The measured formulas, best first."""
        losses = {
            formula: sum(self._ledger.adjusted(assignment))
            for assignment in self._ledger
            if (formula := self._formulas.get(assignment)) is not None
        }
        return sorted(losses, key=losses.__getitem__)

    def _draw(self) -> Assignment | None:
        """What a new formula gives; one that gives what is known already is thrown away."""
        ranked = self._ranked()[: self._options.num_parents]
        for _ in range(_MOST_DRAWS):
            formula = self._make(ranked)
            try:
                assignment = self._layers.assignment(formula)
            except ValueError:  # infinite on these layers
                continue
            self._formulas.setdefault(assignment, formula)
            if assignment not in self._asked:
                return assignment
        return None

    def _make(self, parents: Sequence[Formula]) -> Formula:
        """An example, then random formulas, then children of the best."""
        if self._examples:
            return self._examples.pop(0)
        if len(self._formulas) < self._options.num_random or not parents:
            return self._random()
        first, second = (self._choose(parents) for _ in range(2))
        crossed = self._rng.random() < self._options.crossover
        child = replace(first, pre=second.pre, reduction=second.reduction) if crossed else first
        return self._mutate(child)

    def _random(self) -> Formula:
        return Formula(
            self._chain(PRE, 0),
            self._choose(tuple(REDUCTIONS)),
            self._chain(POST, 1),
            self._choose(SIGNS),
            self._choose(self._options.spreads),
            self._choose(self._options.groups),
        )

    def _mutate(self, formula: Formula) -> Formula:
        """Draw one part anew; the spread is stretched a little."""
        fresh, part = self._random(), int(self._rng.integers(6))
        if part == 0:
            return replace(formula, pre=fresh.pre)
        if part == 1:
            return replace(formula, reduction=fresh.reduction)
        if part == 2:
            return replace(formula, post=fresh.post)
        if part == 3:
            return replace(formula, sign=-formula.sign)
        if part == 4:
            return replace(formula, group=fresh.group)
        spread = formula.spread * float(np.exp(self._rng.normal(0, _SPREAD_STEP)))
        return replace(formula, spread=min(spread, 0.5))

    def _chain(self, table: Collection[str], least: int) -> tuple[str, ...]:
        """``least`` to 2 names."""
        names = tuple(table)
        return tuple(self._choose(names) for _ in range(int(self._rng.integers(least, 3))))

    def _choose(self, items: Sequence[T]) -> T:
        return items[int(self._rng.integers(len(items)))]

"""A run's search: made from the tables, told what an earlier run knows, read at its end.

The problem: searches are told as little as possible (a setting, then evaluations), while a run has
more: tables whose dominated options need not be searched, an earlier journal, samples of weights
that only some searches look at. What goes in and what comes out beyond the best is gathered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.accounts import Records, inherited_evaluations, spending
from allocator.bench import Bench
from allocator.config import SearchConfig
from allocator.latencies import load_latencies
from allocator.problem import Problem
from allocator.reporter import Reporter
from allocator.searches import (
    NO_OPTIONS,
    check_latencies,
    check_options,
    make_search,
    needs_importances,
    refuse_caches,
)
from allocator.searches.base import FrontPoint, Noting, Search, SearchSetting
from allocator.searches.ledger import Ledger
from allocator.searches.local_table import LocalTable
from allocator.searches.options import Scalar
from allocator.searches.posterior_sampling import corrected_table
from allocator.searches.thinning import Kept, Thinned, thinned_setting, undominated, widen
from allocator.searches.warm import WarmStarted
from objectives.evaluation import Evaluation
from objectives.importance_samples import importance_samples
from objectives.sensitivity import LossTable
from search_spaces.space import Assignment, SearchSpace

NUM_SAMPLES = 256


def check_search(search: SearchConfig, space: SearchSpace) -> None:
    """Refuse what a search cannot be made of, before a model is loaded.

    Raises:
        ValueError: An unknown search or option, a space with caches or latencies for a search that
            has no use for them, or latencies with gaps.
    """
    check_options(search.name, search.options)
    refuse_caches(search.name, space)
    if search.latencies is not None:
        check_latencies(search.name)
        load_latencies(Path(search.latencies)).costs(space)


@dataclass(frozen=True)
class Found:
    """What a search says besides its best.

    Attributes:
        notes: Finite numbers, such as a hypervolume.
        ended: Why it proposes nothing more, as a phrase; empty where it has nothing to say.
        front: Of loss against bytes, the cheapest first; empty for searches of one objective.
        formula: The expression that a formula search found, as JSON.
    """

    notes: dict[str, float]
    ended: str
    front: tuple[FrontPoint, ...]
    formula: dict[str, Any] | None


@dataclass(frozen=True)
class BuiltSearch:
    """A search over full menus, and what it was made of.

    Attributes:
        search: What the loop asks and tells.
        inner: The search by name, over the options that are left.
        kept: Those options.
        setting: With full menus.
    """

    search: Search
    inner: Search
    kept: Kept
    setting: SearchSetting

    def found(self) -> Found:
        """What the search says at its end."""
        notes = self.inner.notes() if isinstance(self.inner, Noting) else {}
        ended: str = getattr(self.inner, "ended", "")
        front: Sequence[FrontPoint] = getattr(self.inner, "front", ())
        formula = getattr(self.inner, "formula", None)
        points = (p._replace(assignment=widen(p.assignment, self.kept)) for p in front)
        return Found(notes, ended, tuple(points), None if formula is None else formula.to_json())


def build_search(
    name: str,
    setting: SearchSetting,
    tables: Sequence[LossTable],
    *,
    records: Records,
    reporter: Reporter,
    options: Mapping[str, Scalar] = NO_OPTIONS,
) -> BuiltSearch:
    """The search of a name, or of several with commas between them.

    Args:
        name: Of the search.
        setting: With full menus.
        tables: An option that another one beats in bytes and in all of them is not searched.
        records: The journal; may hold what an earlier run measured.
        reporter: Told how many options are left out.
        options: Of the search, by name.
    """
    known = inherited_evaluations(records.records)
    always = [*setting.starts, *(e.assignment for e in known)]
    kept = undominated(setting.problem, tables, always, setting.latency)
    offered, left = (sum(map(len, rows)) for rows in (setting.problem.bytes, kept))
    if left < offered:
        reporter.note(
            f"{offered - left:,} of {offered:,} options are left out of the search: another one of "
            f"their unit is no larger and no worse by {', '.join(t.scorer for t in tables)}"
        )
    inner = make_search(name, thinned_setting(setting, kept), options)
    search: Search = Thinned(inner, kept)
    if known:
        search = WarmStarted(search, setting, known)
    return BuiltSearch(search, inner, kept, setting)


def warm_starts(records: Records, problem: Problem) -> list[Assignment]:
    """Assignments of an earlier run that fit the budget, best first, where losses do not carry."""
    for record in records.records:
        if record["type"] == "warm_start" and not record["evaluations"]:
            starts = (tuple(start) for start in record["starts"])
            return [s for s in starts if problem.total_bytes(s) <= problem.budget_bytes][:8]
    return []


def with_samples(
    name: str,
    setting: SearchSetting,
    space: SearchSpace,
    *,
    records: Records,
    bench: Callable[[], Bench],
) -> SearchSetting:
    """The setting with samples of the weights' importances, if a search of that name reads them.

    Raises:
        ValueError: Inputs of a unit cannot be observed.
    """
    if not needs_importances(name):
        return setting
    recorded = next((r["samples"] for r in records.records if r["type"] == "importances"), None)
    if recorded is None:
        live = bench()
        with spending(live.meter, records, "importances"):
            statistics = live.observe({"second_moment"})
        found = importance_samples(space, live.bank, statistics, num_samples=NUM_SAMPLES)
        recorded = [[float(f"{value:.5g}") for value in row] for row in found]
        records.append({"type": "importances", "samples": recorded})
    samples = tuple(np.array(row, float) for row in recorded)
    return replace(setting, importances=samples)


def with_latencies(
    source: str | None, setting: SearchSetting, space: SearchSpace, records: Records
) -> SearchSetting:
    """The setting with every option's latency, if the run minimises it; the journal keeps them.

    Raises:
        ValueError: The table cannot be read, or lacks a shape.
    """
    if source is None:
        return setting
    recorded = next((r["seconds"] for r in records.records if r["type"] == "latencies"), None)
    if recorded is None:
        costs = load_latencies(Path(source)).costs(space)
        recorded = [[float(value) for value in row] for row in costs]
        records.append({"type": "latencies", "seconds": recorded})
    return replace(setting, latency=tuple(np.array(row, float) for row in recorded))


def refit(
    setting: SearchSetting, evaluations: Sequence[Evaluation]
) -> tuple[NDArray[np.float64], ...] | None:
    """The table of a setting corrected by everything that was measured, in nats per token.

    It is the posterior mean of :mod:`allocator.searches.surrogate`, for solving other budgets with
    what this run has learned, around where slopes were measured last; without slopes, around what
    was measured on most text. ``None`` unless that was enough.
    """
    local = LocalTable(setting.problem)
    for evaluation in evaluations:
        if evaluation.slopes is not None:
            local.tell(evaluation)
    if local.centre is not None:
        setting = local.around(setting)
    else:
        setting = replace(setting, starts=(_most_measured(setting, evaluations),))
    table = corrected_table(setting)
    table.tell(evaluations)
    return table.losses()


def _most_measured(setting: SearchSetting, evaluations: Sequence[Evaluation]) -> Assignment:
    """What was measured on most of the text: where equal, the earlier start, else the earlier."""
    ledger = Ledger(setting.num_sequences)
    for evaluation in evaluations:
        ledger.add(evaluation)
    known = [*(start for start in setting.starts if start in ledger), *ledger]
    return max(known, key=ledger.num_sequences, default=setting.starts[0])

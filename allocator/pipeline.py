"""From a priced space to a guarded choice: tables, solver, search, guard, held-out report.

The problem this file solves: every allocator that stops at an additive score can return something
worse than uniform. Here the additive optimum is only where the search starts, and the choice among
{uniform, every table's DP plan, search result} is made on text that the search never saw.
Everything measured goes through the journal, so running this again on the same journal continues
where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.accounts import (
    Records,
    Spent,
    all_spent,
    inherited_evaluations,
    recorded_evaluations,
    undisturbed_tokens,
)
from allocator.budget import Budget
from allocator.loop import NOTHING_MORE, History, Limits, Progress, run_search
from allocator.measuring import Lazy, Measuring
from allocator.problem import Problem, Solution
from allocator.ratio_plans import removed_ratios
from allocator.search_build import (
    BuiltSearch,
    Found,
    build_search,
    refit,
    warm_starts,
    with_latencies,
    with_samples,
)
from allocator.searches.base import SearchSetting
from allocator.solvers.dynamic import DynamicProgram
from allocator.stage import Stage
from allocator.tables import Wanted, build_tables
from objectives.evaluation import Evaluation
from objectives.sensitivity import LossTable
from search_spaces.space import Assignment, SearchSpace

REFIT = "refit"
"""Name of the table that a search has corrected, beside the scorers' own."""


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        tables: Loss tables by scorer; the first is the run's own.
        solution: Of the additive problem with the run's own table.
        one_shots: The DP plan of every scorer's table.
        history: What the search was told.
        candidates: ``dp``, ``search``, where one fits ``uniform``, and what other scorers' tables
            have for other plans as ``dp:SCORER``.
        returned: Which of them had the least loss on the guard's text.
        evaluations: For ``guard`` and ``heldout``, the full measurement of each candidate; for
            ``heldout`` every table's plan as ``dp:SCORER``.
        num_search_sequences: Sequences in the search split.
        spent: Tokens and block-tokens by kind.
        found: What the search says besides its best.
        refit: The run's own table corrected by everything that was measured, where it could be.
        latency: For each unit the seconds of each option, where the run minimised them.
        inherited: What a warm start brought along.
    """

    tables: dict[str, LossTable]
    solution: Solution
    one_shots: dict[str, Assignment]
    history: History
    candidates: dict[str, Assignment]
    returned: str
    evaluations: dict[str, dict[str, Evaluation]]
    num_search_sequences: int
    spent: Spent = field(default_factory=lambda: Spent({}, {}))
    found: Found = field(default_factory=lambda: Found({}, "", (), None))
    refit: LossTable | None = None
    latency: tuple[NDArray[np.float64], ...] = ()
    inherited: tuple[Evaluation, ...] = ()


def run_pipeline(stage: Stage) -> Outcome:
    """Run every stage that the journal does not already hold.

    Raises:
        ValueError: Nothing could be measured: every candidate failed; with the first reason.
    """
    scorers = list(dict.fromkeys([stage.search.scorer, *stage.search.scorers]))
    uniform = stage.space.uniform(stage.budget.searched_bytes)
    tables = build_tables(
        stage.bench,
        Wanted(stage.space, scorers, uniform),
        records=stage.records,
        store=stage.store,
        reporter=stage.reporter,
    )
    solutions = {
        name: DynamicProgram().solve(additive_problem(stage.space, table, stage.budget))
        for name, table in tables.items()
    }
    solution = solutions[stage.search.scorer]
    if uniform is None:
        stage.reporter.note("no uniform assignment fits the budget: there is nothing to compare to")
    measuring = Measuring(stage)
    try:
        one_shots = {name: found.choice for name, found in solutions.items()}
        history, built, best = _search(stage, tables, one_shots, uniform, measuring)
        candidates = {"dp": solution.choice}
        if uniform is not None:
            candidates["uniform"] = uniform
        plans = {f"dp:{name}": choice for name, choice in one_shots.items()}
        for name, plan in plans.items():
            if plan not in candidates.values():
                candidates[name] = plan
        candidates["search"] = best
        guard = measuring.all(candidates, "guard")
        earlier = _earlier_best(measuring.cache.values(), candidates)
        if earlier is not None and earlier.loss_nats < guard["search"].loss_nats:
            stage.reporter.note(
                "what an earlier session of this run had found is better on the guard's text than "
                "what the search ends with now: it stays the search's plan"
            )
            candidates["search"], guard["search"] = earlier.assignment, earlier
        returned = _choose(guard)
        heldout = measuring.all(candidates | plans, "heldout")
    finally:
        measuring.close()
    inherited = inherited_evaluations(stage.records.records)
    return Outcome(
        tables=tables,
        solution=solution,
        one_shots=one_shots,
        history=history,
        candidates=candidates,
        returned=returned,
        evaluations={"guard": guard, "heldout": heldout},
        num_search_sequences=stage.num_sequences["search"],
        found=built.found(),
        refit=_refit(built.setting, [*inherited, *history.evaluations]),
        spent=_spent(stage),
        latency=built.setting.latency,
        inherited=inherited,
    )


def additive_problem(space: SearchSpace, table: LossTable, budget: Budget) -> Problem:
    """The additive problem of one loss table at one budget."""
    costs = tuple(np.array([option.bytes for option in menu], np.int64) for menu in space.menus)
    return Problem(costs, table.losses, budget.searched_bytes)


def _search(
    stage: Stage,
    tables: Mapping[str, LossTable],
    one_shots: Mapping[str, Assignment],
    uniform: Assignment | None,
    measuring: Measuring,
) -> tuple[History, BuiltSearch, Assignment]:
    """Run the search on measured losses; returns its history, itself and its best assignment."""
    built = _build(stage, tables, one_shots, uniform)
    search = built.search
    ended = _ended(stage.records)
    if stage.extend and ended is not None:
        _refuse_lower_caps(stage, ended["told"])
        stage.records.append({"type": "extended"})
        ended = None
    tokens = None
    if ended is None:
        _search_tokens(stage)  # refuses early
        measuring.start()  # before the search, whose clock it would eat, and whose tokens
        tokens = _search_tokens(stage)
    limits = Limits(
        window=stage.search.window,
        tokens_per_sequence=stage.tokens_per_sequence,
        trials=stage.caps.trials if ended is None else max(1, ended["told"]),
        tokens=tokens,
        seconds=stage.caps.seconds if ended is None else None,
        free=frozenset(e.key for e in inherited_evaluations(stage.records.records)),
    )
    if ended is not None and not ended["told"]:
        history = History((), 0, ended["stopped"])  # its time was over before anything was told
    else:
        history = run_search(
            search,
            Lazy(measuring),
            limits=limits,
            cache=measuring.cache,
            record=measuring.record,
            progress=_shown(stage, limits),
        )
    if history.evaluations and history.num_failed == len(history.evaluations):
        reason = history.evaluations[0].error  # not marked as searched: resuming tries again
        raise ValueError(f"no candidate could be measured; the first failed with: {reason}")
    if ended is not None:
        history = replace(history, stopped=ended["stopped"])
    else:
        told = len(history.evaluations)
        found = built.found()
        if history.stopped == NOTHING_MORE and found.ended:
            history = replace(history, stopped=found.ended)
        stage.records.append(
            {"type": "searched", "told": told, "stopped": history.stopped, "notes": found.notes}
        )
    best = search.best
    return history, built, built.setting.starts[0] if best is None else best


def _build(
    stage: Stage,
    tables: Mapping[str, LossTable],
    one_shots: Mapping[str, Assignment],
    uniform: Assignment | None,
) -> BuiltSearch:
    """The run's search, from the DP plan, uniform, other scorers' plans and earlier runs' best."""
    problem = additive_problem(stage.space, tables[stage.search.scorer], stage.budget)
    starts = [one_shots[stage.search.scorer], *([] if uniform is None else [uniform])]
    starts += [*one_shots.values(), *warm_starts(stage.records, problem)]
    setting = SearchSetting(
        problem=problem,
        starts=tuple(dict.fromkeys(starts)),
        depths=tuple(-1 if unit.depth is None else unit.depth for unit in stage.space.units),
        kinds=tuple(unit.kind for unit in stage.space.units),
        num_sequences=stage.num_sequences["search"],
        batch_sequences=min(stage.batch, stage.num_sequences["search"]),
        seed=stage.search.seed,
        removed=tuple(removed_ratios(stage.space)),
        labels=stage.space.labels,
        tables=tuple(t.losses for name, t in tables.items() if name != stage.search.scorer),
        slopes=stage.has_slopes and stage.search.slopes and not stage.space.has_caches,
    )
    setting = with_samples(
        stage.search.name, setting, stage.space, records=stage.records, bench=stage.bench
    )
    setting = with_latencies(stage.search.latencies, setting, stage.space, stage.records)
    return build_search(
        stage.search.name,
        setting,
        list(tables.values()),
        records=stage.records,
        reporter=stage.reporter,
        options=stage.search.options,
    )


def _spent(stage: Stage) -> Spent:
    """Tokens of this run, also of what was measured and never told; not those of an earlier run."""
    return all_spent(stage.records, recorded_evaluations(stage.records.records).values())


def _refit(setting: SearchSetting, evaluations: Sequence[Evaluation]) -> LossTable | None:
    """The run's own table, corrected by what was measured."""
    rows = refit(setting, evaluations)
    return None if rows is None else LossTable(REFIT, "nats", rows)


def _shown(stage: Stage, limits: Limits) -> Callable[[Progress], None]:
    """Shows the search against the cap that will end it: trials, else tokens, else the clock."""
    total = limits.trials or limits.tokens or int(limits.seconds or 0) or None
    advance = stage.reporter.stage(f"search: {stage.search.name}", total)
    lowest = float("inf")

    def show(state: Progress) -> None:
        nonlocal lowest
        lowest = min(lowest, state.evaluation.loss_nats)
        done = state.num_told
        if limits.trials is None and limits.tokens is not None:
            done = state.num_tokens
        elif limits.trials is None and limits.seconds is not None:
            done = int(state.seconds)
        advance(done, f"{state.num_told}: least {lowest:.4g}")

    return show


def _ended(records: Records) -> dict[str, Any] | None:
    """Where the search ended. The clock may have ended it, so only the journal can say."""
    marks = [record for record in records.records if record["type"] in ("searched", "extended")]
    return marks[-1] if marks and marks[-1]["type"] == "searched" else None


def _refuse_lower_caps(stage: Stage, told: int) -> None:
    """A finished search can go on, and cannot be taken back.

    Raises:
        ValueError: A cap is below what the search has used.
    """
    if stage.caps.trials is not None and stage.caps.trials < told:
        raise ValueError(
            f"the search has told {told} trials already: expected --trials of at least that, "
            f"got {stage.caps.trials}"
        )
    evaluations = recorded_evaluations(stage.records.records).values()
    read = sum(e.num_tokens for e in evaluations if e.fidelity.split == "search")
    left = _search_tokens(stage)
    if left is not None and left < read:
        raise ValueError(
            f"the cap of {stage.caps.tokens:,} tokens leaves {left:,} for the search, which has "
            f"read {read:,} already: raise it"
        )


def _search_tokens(stage: Stage) -> int | None:
    """What is left of the token cap for the search, after statistics and teacher."""
    if stage.caps.tokens is None:
        return None
    # A pass that a crash made the run repeat is charged once: the cap is part of the history.
    once = undisturbed_tokens(stage.records)
    once["teacher"] = sum(stage.num_sequences.values()) * stage.tokens_per_sequence
    spent = sum(once.values())
    left = stage.caps.tokens - spent
    if left < min(stage.batch, stage.num_sequences["search"]) * stage.tokens_per_sequence:
        raise ValueError(
            f"the cap of {stage.caps.tokens:,} tokens leaves {max(left, 0):,} for the search after "
            f"{spent:,} for statistics and the dense model; raise it or lower the splits' sizes"
        )
    return left


def _earlier_best(
    known: Iterable[Evaluation], candidates: Mapping[str, Assignment]
) -> Evaluation | None:
    """The best on the guard's text that an earlier session ended with; ``None`` if none did."""
    guarded = (e for e in known if e.ok and e.fidelity.split == "guard")
    others = (e for e in guarded if e.assignment not in candidates.values())
    return min(others, key=lambda evaluation: evaluation.loss_nats, default=None)


def _choose(guard: Mapping[str, Evaluation]) -> str:
    """The candidate with the least guard loss; the simpler one when equal."""
    others = [name for name in guard if name.startswith("dp:")]
    order = ["uniform", "dp", *others, "search"]
    measured = [name for name in order if name in guard and guard[name].ok]
    if not measured:
        raise ValueError(f"no candidate could be measured on the guard text: {guard['dp'].error}")
    return min(measured, key=lambda name: guard[name].loss_nats)

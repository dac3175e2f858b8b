"""Gather what a report shows from a finished run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.budget import Budget
from allocator.config import MeasureConfig, RunConfig, SearchConfig
from allocator.pipeline import Outcome, additive_problem
from allocator.plan import Plan
from allocator.plan_build import predicted_loss
from allocator.report.view import FrontierPoint, Measurement, RunView
from allocator.run_folder import RunFolder, load_memory
from allocator.searches import preferred_sequences
from allocator.searches.ledger import Ledger
from allocator.solvers.dynamic import DynamicProgram
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment, SearchSpace

_MOST_FRONTIER_POINTS = 200


def gather_view(
    folder: RunFolder, config: RunConfig, space: SearchSpace, outcome: Outcome, plan: Plan
) -> RunView:
    """Everything the report of one run needs."""
    memory = load_memory(folder)
    measurements, correlation = _measurements(outcome, config.search.scorer)
    num_elements = sum(unit.num_elements for unit in space.units)
    unit = outcome.tables[plan.scorer].unit
    return RunView(
        name=folder.name,
        plan=plan,
        dp_plan_labels=tuple(o.label for o in space.operators(outcome.solution.choice)),
        num_weights=space.num_weights or num_elements,
        dense_searched_bytes=2 * num_elements,
        container_bytes=plan.achieved_bytes - plan.searched_bytes - space.fixed_bytes,
        frontier=_frontier(space, outcome, plan),
        measurements=measurements,
        rank_correlation=correlation,
        settings=_settings(config, plan, memory),
        notes=_notes(outcome),
        front=outcome.found.front,
        predicted_unit=plan.loss_unit if unit == "nats" else unit,
        method_bytes={name: space.bytes(a) for name, a in outcome.candidates.items()},
    )


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ``None`` where it is not defined."""
    from scipy.stats import spearmanr  # slow to load

    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)


def _measurements(outcome: Outcome, scorer: str) -> tuple[tuple[Measurement, ...], float | None]:
    """The told evaluations with adjusted losses, and how well the table ranked them."""
    table = outcome.tables[scorer]
    ledger = Ledger(outcome.num_search_sequences)
    for evaluation in outcome.history.evaluations:
        ledger.add(evaluation)
    starts = set(outcome.one_shots.values())
    seen: set[str] = set()
    tokens = 0
    shown = []
    distinct: dict[Assignment, tuple[float, float]] = {}
    for evaluation in outcome.history.evaluations:
        if evaluation.key not in seen:
            tokens += evaluation.num_tokens
            seen.add(evaluation.key)
        predicted = predicted_loss(table, evaluation.assignment)
        nats, error = ledger.adjusted(evaluation.assignment) if evaluation.ok else (None, 0.0)
        if nats is not None:
            distinct[evaluation.assignment] = (predicted, nats)
        origin = _origin(evaluation, outcome, starts)
        shown.append(Measurement(tokens, nats, error, predicted, origin))
    pairs = list(distinct.values())
    correlation = rank_correlation([p for p, _ in pairs], [m for _, m in pairs])
    return tuple(shown), correlation


def _origin(evaluation: Evaluation, outcome: Outcome, starts: set[Assignment]) -> str:
    if evaluation.assignment == outcome.candidates["dp"]:
        return "dp"
    if evaluation.assignment == outcome.candidates.get("uniform"):
        return "uniform"
    return "start" if evaluation.assignment in starts else "search"


def _frontier(space: SearchSpace, outcome: Outcome, plan: Plan) -> tuple[FrontierPoint, ...]:
    """The hull of the run's own table, thinned to what a plot can show."""
    table = outcome.tables[plan.scorer]
    budget = Budget(plan.budget_text, plan.budget_bytes, space.most_bytes)
    frontier = DynamicProgram().frontier(additive_problem(space, table, budget))
    count = len(frontier.bytes)
    kept = np.unique(np.linspace(0, count - 1, min(count, _MOST_FRONTIER_POINTS)).astype(int))
    return tuple(FrontierPoint(int(frontier.bytes[i]), float(frontier.losses[i])) for i in kept)


def _settings(config: RunConfig, plan: Plan, memory: dict[str, str]) -> dict[str, str]:
    data, search, measure = config.data, config.search, config.measure
    caps = config.caps
    limits = [
        f"{value:,} {name}"
        for name, value in (("trials", caps.trials), ("tokens", caps.tokens))
        if value is not None
    ]
    if caps.seconds is not None:
        limits.append(f"{caps.seconds:g} s of search")
    return {
        "Model": config.model,
        "Budget": config.budget,
        "Space": f"{plan.space}, ties: {plan.ties}",
        "Pins": ", ".join(f"{glob}={label}" for glob, label in config.space.pins) or "none",
        "Excluded": ", ".join(config.space.exclude) or "none",
        "Text": _texts(config),
        "Sequences": (
            f"{data.statistics} statistics, {data.search} search, {data.guard} guard, "
            f"{data.heldout} held-out, of {data.sequence_length} tokens"
        ),
        "Objective": _objective(config),
        "Precision": f"{measure.dtype} on {_place(measure)}, {measure.threads} threads",
        "Search": f"{search.name}, seed {search.seed}, window {search.window}, "
        f"{search.batch or preferred_sequences(search.name)} sequence(s) per evaluation",
        **_options(search),
        "Scorers": ", ".join(search.scorers),
        "Limits": "; ".join(limits) or "none",
        "Executor": f"{config.execution.executor}, {config.execution.workers} worker(s)",
        **memory,
    }


def _options(search: SearchConfig) -> dict[str, str]:
    """The search's options, where any is not as usual."""
    pairs = [f"{key}={value}" for key, value in search.options.items()]
    return {"Search options": ", ".join(pairs)} if pairs else {}


def _place(measure: MeasureConfig) -> str:
    found = measure.device_map
    return measure.device if found is None else f"several devices ({found})"


def _texts(config: RunConfig) -> str:
    data = config.data
    if not data.also:
        return data.text
    pairs = zip(data.texts, data.weights, strict=True)
    return "; ".join(f"{text} (weight {weight:g})" for text, weight in pairs)


def _objective(config: RunConfig) -> str:
    measure = config.measure
    if measure.objective != "kl":
        return measure.objective
    return f"kl, top-{measure.top_k}" if measure.top_k else "kl, full"


def _notes(outcome: Outcome) -> tuple[str, ...]:
    notes = []
    if "uniform" not in outcome.candidates:
        notes.append("No uniform assignment fits the budget, so there is nothing to compare with.")
    if outcome.history.num_failed:
        failed = next(e for e in outcome.history.evaluations if not e.ok)
        notes.append(
            f"{outcome.history.num_failed} evaluations failed; the first with: {failed.error}."
        )
    return tuple(notes)

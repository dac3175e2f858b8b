"""``allocator solve``: new budgets from a finished run, without the model and without measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from allocator.budget import Budget, parse_budgets, resolve_budget
from allocator.cli.options import RUNS, Budgets, FinishedRun, Json, PlansFolder, Runs
from allocator.cli.terminal import console, parse_latency, print_json
from allocator.cli.written_plans import Destination, print_paths
from allocator.latencies import LatencyTable, latency_constraint, load_latencies
from allocator.plan import Plan
from allocator.problem import LinearConstraint, Problem, Solution, Status
from allocator.run_folder import existing_run, finished_plan, load_losses, load_space
from allocator.solvers import SOLVERS
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from objectives.sensitivity import LossTable  # loads torch


def solve(
    run: FinishedRun,
    budget: Budgets,
    scorer: Annotated[str | None, typer.Option(help="Whose table; else the run's own.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="See 'allocator list solvers'; else dynamic, or milp with --limit."),
    ] = None,
    latencies: Annotated[
        Path | None, typer.Option(help="CSV or JSON: rows,columns,operator,seconds.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Most latency of all matrices together, such as 12ms.")
    ] = None,
    output: PlansFolder = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Solve new budgets from a run's loss table, without the model and without measuring."""
    from allocator.pipeline import REFIT  # these load torch
    from allocator.plan_build import PlanFacts, solved_plan

    folder = existing_run(run, runs)
    space = load_space(folder.space)
    tables = load_losses(folder.losses, space)
    plan = finished_plan(folder)
    name = scorer or plan.scorer
    if name not in tables:
        why = (
            ": its search measured too little to correct one, 'allocator resume' with more trials"
            if name == REFIT
            else ""
        )
        raise ValueError(f"the run has no table of {name!r}{why}; it has {', '.join(tables)}")
    facts = PlanFacts(plan.model, plan.calibration, plan.objective, plan.dtype)
    timing = _timing(latencies, limit)
    limits = [] if timing is None else [latency_constraint(space, *timing)]
    chosen = SOLVERS[solver or ("milp" if limits else "dynamic")]()
    words_of = {word: resolve_budget(word, space) for word in parse_budgets(budget)}
    destination = Destination.make(output or folder.path)
    rows = []
    for word, resolved in words_of.items():
        problem = _problem(space, tables[name], resolved, limits)
        solution = _solved(chosen.solve(problem), word, limit)
        made = solved_plan(space, resolved, tables[name], solution, facts)
        words = [name, word, limit, None if solver == "dynamic" else solver]
        path = destination.save(made, *words)
        row: dict[str, Any] = {"plan": str(path)}
        row |= made.model_dump(mode="json", exclude={"units", "fixed"})
        if timing is not None:
            row["latency_seconds"] = timing[0].total(space, solution.choice)
        rows.append(row)
    if as_json:
        print_json(rows)
    else:
        _print(rows, tables[name], plan)


def _timing(latencies: Path | None, limit: str | None) -> tuple[LatencyTable, float] | None:
    """The table and the most seconds, if both are given."""
    if latencies is None and limit is None:
        return None
    if latencies is None or limit is None:
        raise ValueError("--latencies and --limit go together: a table, and the most it may sum to")
    return load_latencies(latencies), parse_latency(limit)


def _problem(
    space: SearchSpace, table: LossTable, budget: Budget, limits: Sequence[LinearConstraint]
) -> Problem:
    from allocator.pipeline import additive_problem  # loads torch

    return replace(additive_problem(space, table, budget), constraints=tuple(limits))


def _solved(solution: Solution, budget: str, limit: str | None) -> Solution:
    """The solution, if there is one: a budget alone was checked when it was resolved."""
    if solution.status is Status.INFEASIBLE:
        raise ValueError(
            f"no assignment within {budget} takes at most {limit}, though each limit can be met "
            "alone: raise one of them"
        )
    return solution


def _print(rows: Sequence[dict[str, Any]], losses: LossTable, plan: Plan) -> None:
    timed = "latency_seconds" in rows[0]
    unit = plan.loss_unit if losses.unit == "nats" else losses.unit
    table = Table("budget", "stored bytes", "bits/weight", f"predicted ({unit})", "lower bound")
    if timed:
        table.add_column("latency")
    for row in rows:
        cells = [
            row["budget_text"],
            f"{row['achieved_bytes']:,}",
            f"{row['bits_per_weight']:.4f}",
            f"{row['predicted_nats']:.5g}",
            f"{row['lower_bound_nats']:.5g}",
            *([f"{1e3 * row['latency_seconds']:.4g} ms"] if timed else []),
        ]
        table.add_row(*cells)
    console.print(table)
    print_paths(rows)

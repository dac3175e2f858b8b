"""``allocator pick``: plans of a front that a run has measured, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from allocator.budget import parse_budgets, resolve_budget
from allocator.cli.options import RUNS, Budgets, FinishedRun, Json, PlansFolder, Runs
from allocator.cli.terminal import console, parse_latency, print_json
from allocator.cli.written_plans import Destination, print_paths
from allocator.front import FrontRow, best_within, load_front
from allocator.plan import Plan
from allocator.run_folder import RunFolder, existing_run, finished_plan, load_space
from search_spaces.space import SearchSpace


def pick(
    run: FinishedRun,
    budget: Budgets,
    limit: Annotated[
        str | None,
        typer.Option(help="Most latency, such as 12ms; of a run with --latencies."),
    ] = None,
    output: PlansFolder = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Make plans of the best measured points of a run's front within budgets, without the model."""
    from allocator.plan_build import picked_plan  # loads torch

    folder = existing_run(run, runs)
    space, plan = load_space(folder.space), finished_plan(folder)
    rows = _front(folder, space)
    seconds = None if limit is None else parse_latency(limit)
    if seconds is not None and rows[0].latency_seconds is None:
        raise ValueError(f"--limit: the front of {folder.path} knows no latencies; drop it")
    chosen = [
        (word, resolved, _within(rows, space, word, resolved.searched_bytes, limit, seconds))
        for word in parse_budgets(budget)
        for resolved in [resolve_budget(word, space)]
    ]
    destination = Destination.make(output or folder.path)
    found = []
    for word, resolved, row in chosen:
        made = picked_plan(space, resolved, row.point, plan)
        path = destination.save(made, "front", word, limit)
        shown: dict[str, Any] = {"plan": str(path), "num_sequences": row.point.num_sequences}
        if row.latency_seconds is not None:
            shown["latency_seconds"] = row.latency_seconds
        found.append(shown | made.model_dump(mode="json", exclude={"units", "fixed"}))
    if as_json:
        print_json(found)
    else:
        _print(found, plan)


def _front(folder: RunFolder, space: SearchSpace) -> list[FrontRow]:
    """The run's front.

    Raises:
        ValueError: It has none.
    """
    found = load_front(folder.front, space) if folder.front.exists() else []
    if not found:
        raise ValueError(
            f"{folder.path} has no measured front: --search nsga2, nsga3 and surrogate_nsga2 make "
            "one; 'allocator solve' answers other budgets from any run's loss table"
        )
    return found


def _within(
    rows: Sequence[FrontRow],
    space: SearchSpace,
    budget: str,
    most_bytes: int,
    limit: str | None,
    seconds: float | None,
) -> FrontRow:
    """The best row within the limits.

    Raises:
        ValueError: There is none; says what the front reaches down to.
    """
    found = best_within(rows, most_bytes, seconds)
    if found is not None:
        return found
    least = min(row.point.bytes for row in rows)
    reaches = f"{least + space.overhead_bytes:,} bytes ({space.bits_per_weight(least):.4g} bpw)"
    if limit is not None:
        fastest = min(row.latency_seconds for row in rows if row.latency_seconds is not None)
        reaches += f" and to {1e3 * fastest:.4g} ms, not always together"
        budget += f" and {limit}"
    raise ValueError(
        f"no measured point of the front is within {budget}: it reaches down to {reaches}"
    )


def _print(rows: Sequence[dict[str, Any]], plan: Plan) -> None:
    table = Table("budget", "stored bytes", "bits/weight", f"measured ({plan.loss_unit})")
    timed = "latency_seconds" in rows[0]
    if timed:
        table.add_column("latency")
    table.add_column("sequences")
    for row in rows:
        (measured,) = row["search_nats"].values()
        table.add_row(
            row["budget_text"],
            f"{row['achieved_bytes']:,}",
            f"{row['bits_per_weight']:.4f}",
            f"{measured['nats']:.4f} ± {measured['standard_error_nats']:.4f}",
            *([f"{1e3 * row['latency_seconds']:.4g} ms"] if timed else []),
            f"{row['num_sequences']}",
        )
    console.print(table)
    console.print(
        "measured on the search's own text, which flatters: 'allocator evaluate' measures another",
        markup=False,
    )
    print_paths(rows)

"""Run the main job on a language model: stages, results; and resume it.

The problem this file solves: the same code must start a run, continue one after a crash and rebuild
the results of a finished one. All three open a session and run the pipeline; they differ in whether
a model may be loaded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass

from allocator.bench import BenchPool
from allocator.budget import Budget
from allocator.config import RunConfig, load_config
from allocator.front import front_csv, front_rows
from allocator.journal import Journal
from allocator.pipeline import REFIT, Outcome, additive_problem, run_pipeline
from allocator.plan import Plan, save_plan
from allocator.plan_build import PlanFacts, build_plan
from allocator.report import write_report
from allocator.report.gather import gather_view
from allocator.reporter import Reporter
from allocator.run_folder import RunFolder, save_losses
from allocator.session import Session, begin, reopen, unfinished
from allocator.solvers.dynamic import DynamicProgram
from allocator.stage import Stage
from search_spaces.space import SearchSpace
from search_spaces.whole_file import write_whole

_MEASURED_SPLITS = ("search", "guard", "heldout")


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, plan and everything behind it."""

    folder: RunFolder
    plan: Plan
    outcome: Outcome
    space: SearchSpace


def start_run(
    config: RunConfig, folder: RunFolder, reporter: Reporter, pool: BenchPool | None = None
) -> Finished:
    """Run the main job in a new folder.

    Args:
        config: What to run.
        folder: New or empty.
        reporter: Shown the progress.
        pool: Shared by runs that differ in their budget only.

    Raises:
        ValueError: The budget cannot be met, the text is too short, the folder already holds a run
            or cannot be written; before anything is measured.
    """
    with begin(config, folder, reporter, pool) as (session, journal):
        return _finish(session, journal)


def resume_run(
    folder: RunFolder,
    reporter: Reporter,
    *,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
    extend: bool = False,
    offline: bool = False,
) -> Finished:
    """Continue a run, or rebuild the results of a finished one.

    Args:
        folder: Of a run; one that stopped before anything was measured starts anew.
        reporter: Shown the progress.
        change: New caps or another executor; the rest of the configuration may not change.
        extend: Search on where an earlier session's search had ended.
        offline: Load no model: fail if anything is still to be measured.

    Raises:
        ValueError: The run is in use, damaged, has lost its journal, or was made with another
            configuration; or something is missing and ``offline``.
    """
    if not folder.begun:
        if offline:
            raise ValueError(unfinished(folder))
        if folder.plan.exists() or folder.losses.exists():
            raise ValueError(
                f"{folder.path} holds results, and its journal {folder.journal.name}, from which a "
                "run is continued, is missing or empty: put it back, or start a new run"
            )
        return start_run(change(load_config(folder.config)), folder, reporter)
    with reopen(folder, reporter, change=change, offline=offline) as (session, journal):
        return _finish(session, journal, extend=extend)


def _finish(session: Session, journal: Journal, *, extend: bool = False) -> Finished:
    """Run the pipeline and write the results."""
    stage = Stage(
        space=session.space,
        budget=session.budget,
        search=session.config.search,
        caps=session.config.caps,
        records=journal,
        bench=lambda: session.bench,
        executor=session.executor,
        num_sequences={split: len(session.texts[0].splits[split]) for split in _MEASURED_SPLITS},
        tokens_per_sequence=session.tokens_per_sequence,
        has_slopes=True,  # as every objective of a run has
        store=session.store(),
        reporter=session.reporter,
        extend=extend,
    )
    outcome = run_pipeline(stage)
    if not session.offline:
        session.keep_statistics()
    session.save_memory()
    facts = PlanFacts(
        model=session.identity,
        calibration=session.record,
        objective=session.config.measure.objective,
        dtype=session.config.measure.dtype,
    )
    plan = build_plan(session.space, session.budget, session.config.search, outcome, facts)
    finished = Finished(session.folder, plan, outcome, session.space)
    _write(session, finished)
    return finished


def _write(session: Session, finished: Finished) -> None:
    """Write everything that is derived from the journal."""
    outcome = finished.outcome
    session.reporter.stage("writing plan and report", None)
    corrected = {} if outcome.refit is None else {REFIT: outcome.refit}
    save_losses(outcome.tables | corrected, session.folder.losses)
    if outcome.found.formula is not None:
        formula = json.dumps(outcome.found.formula, indent=1) + "\n"
        write_whole(session.folder.path / "formula.json", formula)
    if outcome.found.front:
        rows = front_rows(outcome.found.front, outcome.latency)
        write_whole(session.folder.front, front_csv(session.space, rows))
    write_whole(session.folder.frontier, frontier_csv(session.space, outcome, session.budget))
    save_plan(finished.plan, session.folder.plan)
    view = gather_view(session.folder, session.config, session.space, outcome, finished.plan)
    write_report(view, session.folder.report)


def frontier_csv(space: SearchSpace, outcome: Outcome, budget: Budget) -> str:
    """The additive frontier as CSV: exact optima at every point of the convex hull."""
    table = next(iter(outcome.tables.values()))
    frontier = DynamicProgram().frontier(additive_problem(space, table, budget))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["searched_bytes", "stored_bytes_at_most", "bits_per_weight", "predicted_loss"])
    for size, loss in zip(frontier.bytes.tolist(), frontier.losses.tolist(), strict=True):
        bits = f"{space.bits_per_weight(size):.6g}"
        writer.writerow([size, size + space.overhead_bytes, bits, f"{loss:.9g}"])
    return text.getvalue()

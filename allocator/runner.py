"""Run the main job on a language model: folder, journal, stages, results; and resume it.

The problem this file solves: the same code must start a run, continue one after a crash and rebuild
the results of a finished one. All three open the journal and run the pipeline; they differ in
whether a model may be loaded.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from allocator.bench import Bench, BenchPool, LanguageBenchFactory, load_model_for, resolve_threads
from allocator.budget import Budget, resolve_budget
from allocator.config import RunConfig, SpaceConfig, load_config, save_config
from allocator.executors import EXECUTORS, Executor, InProcess, WorkerSetting
from allocator.journal import Journal
from allocator.pipeline import Outcome, Stage, additive_problem, run_pipeline
from allocator.plan import CalibrationRecord, ModelIdentity, Plan, SplitRecord, save_plan
from allocator.plan_build import PlanFacts, build_plan
from allocator.report import write_report
from allocator.report.gather import gather_view
from allocator.reporter import Reporter
from allocator.run_folder import RunFolder, load_space, save_losses, save_space, write_text
from allocator.solvers.dynamic import DynamicProgram
from allocator.tables import TableStore
from objectives.calibration import SPLITS, Calibration, CalibrationRequest, build_calibration
from objectives.loading import LoadedModel, find_model, resolve_device, resolve_dtype
from objectives.statistics_file import FILE_NAME as STATISTICS_NAME
from objectives.statistics_file import StatisticsFile, statistics_identity
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models import skeleton
from search_spaces.space import SearchSpace

logger = logging.getLogger(__name__)

_FORMAT = 1
_MEASURED_SPLITS = ("search", "guard", "heldout")


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, plan and everything behind it."""

    folder: RunFolder
    plan: Plan
    outcome: Outcome
    space: SearchSpace


def price(config: RunConfig) -> tuple[SearchSpace, Budget]:
    """The space and the budget in bytes, from the model's configuration alone.

    Raises:
        ValueError: No such model, a faulty space, or a budget that cannot be met.
    """
    space = price_space(config.model, config.space)
    return space, resolve_budget(config.budget, space)


def price_space(model: str, wish: SpaceConfig) -> SearchSpace:
    """The space of a model, from its configuration alone.

    Raises:
        ValueError: No such model, or a faulty space.
    """
    request = SpaceRequest(**wish.model_dump())  # the fields of both are the same
    return build_space(skeleton(find_model(model)), request)


def check_start(config: RunConfig, folder: RunFolder) -> tuple[SearchSpace, Budget]:
    """Refuse what can be refused before the model is loaded; else the space and the budget.

    Raises:
        ValueError: As :func:`price`, or the folder already holds a run.
    """
    if folder.begun:
        raise ValueError(
            f"the run folder {folder.path} already holds a run: continue it with "
            f"'allocator resume {folder.path}' or choose another name with --name"
        )
    return price(config)


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
    space, budget = check_start(config, folder)
    advance = reporter.stage("loading model and text", 2)
    threads = resolve_threads(config.measure.threads, config.execution.workers)
    pool = pool or BenchPool()
    loaded = pool.load(config.model, config.measure, threads)
    advance(1, "")
    data = config.data
    request = CalibrationRequest(
        data.text,
        sequence_length=data.sequence_length,
        num_statistics=data.statistics,
        num_search=data.search,
        num_guard=data.guard,
        num_heldout=data.heldout,
        seed=data.seed,
    )
    calibration = build_calibration(request, loaded.tokenizer)
    advance(2, "")
    # Settled now, so that resuming on another machine cannot silently measure differently.
    device = resolve_device(config.measure.device)
    dtype = str(resolve_dtype(config.measure.dtype, device)).removeprefix("torch.")
    settled = config.measure.model_copy(update={"dtype": dtype, "threads": threads})
    config = config.model_copy(update={"measure": settled})
    folder.make()
    calibration.save(folder.calibration)
    save_space(space, folder.space)
    save_config(config, folder.config)
    identity = _identity(loaded)
    header = _header(config, identity, space, calibration)
    with Journal.create(folder.journal, header) as journal:
        run = _Run(
            folder, config, space, budget, calibration, identity, reporter, loaded, pool=pool
        )
        return run.finish(journal)


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
        ValueError: The run is in use, damaged, or was made with another configuration; or
            something is missing and ``offline``.
    """
    config = change(load_config(folder.config))
    if not folder.begun:
        if offline:
            raise ValueError(_unfinished(folder))
        return start_run(config, folder, reporter)
    space = load_space(folder.space)
    budget = resolve_budget(config.budget, space)
    calibration = Calibration.load(folder.calibration)
    with Journal.open(folder.journal) as journal:
        identity = ModelIdentity(**journal.header["model"])
        wanted = _header(config, identity, space, calibration)
        if wanted != journal.header:
            changed = sorted(k for k in wanted if wanted[k] != journal.header.get(k))
            raise ValueError(
                f"{folder.path} was started with another {', '.join(changed)}: "
                "start a new run instead"
            )
        if config != load_config(folder.config):
            save_config(config, folder.config)
        run = _Run(folder, config, space, budget, calibration, identity, reporter, None, offline)
        return run.finish(journal, extend=extend)


@dataclass(frozen=True)
class _Run:
    """The parts of one session."""

    folder: RunFolder
    config: RunConfig
    space: SearchSpace
    budget: Budget
    calibration: Calibration
    identity: ModelIdentity
    reporter: Reporter
    loaded: LoadedModel | None
    offline: bool = False
    pool: BenchPool | None = None

    @cached_property
    def bench(self) -> Bench:
        """The live bench of this process."""
        if self.offline:
            raise ValueError(_unfinished(self.folder))
        pool = self.pool or BenchPool()
        header = _header(self.config, self.identity, self.space, self.calibration)
        about = {key: header[key] for key in ("model", "space", "calibration")}
        key = json.dumps([about, self.config.measure.model_dump(mode="json")])
        return pool.get(key, self._factory.statistics, self._fresh_bench)

    def _fresh_bench(self) -> Bench:
        loaded = self.loaded
        if loaded is None:
            advance = self.reporter.stage("loading model", 1)
            loaded = load_model_for(self.config.model, self.config.measure, self._factory.threads)
            advance(1, "")
        if _identity(loaded).weights_sha256 != self.identity.weights_sha256:
            raise ValueError(
                f"the model {self.config.model!r} has changed since the run was started: "
                "start a new run"
            )
        return self._factory.bench(loaded)

    @property
    def _factory(self) -> LanguageBenchFactory:
        return LanguageBenchFactory(
            model=self.config.model,
            measure=self.config.measure,
            calibration=self.folder.calibration.resolve(),
            space=self.folder.space.resolve(),
            cache=self.folder.cache.resolve(),
            threads=self.config.measure.threads,
            statistics=StatisticsFile(
                self.folder.cache.resolve() / STATISTICS_NAME,
                statistics_identity(
                    self.identity.weights_sha256, self.calibration.hashes["statistics"]
                ),
            ),
        )

    def executor(self) -> Executor:
        """What measures; in this process it uses the bench that is already there."""
        execution = self.config.execution
        if execution.executor == "in-process" and execution.workers == 1:
            return InProcess(lambda: self.bench.evaluator)
        setting = WorkerSetting(
            workers=execution.workers,
            address=execution.address,
            num_gpus=execution.gpus_per_worker,
            threads=self.config.measure.threads,
        )
        return EXECUTORS[execution.executor](self._factory, setting)

    def finish(self, journal: Journal, *, extend: bool = False) -> Finished:
        """Run the pipeline and write the results."""
        tensors = self.calibration.splits
        identity = (
            f"{self.identity.weights_sha256} {self.calibration.hashes['statistics']} "
            f"{self.config.measure.dtype}"
        )
        if any(unit.is_cache for unit in self.space.units):  # whose losses are measured
            identity += f" {self.config.measure.objective} {self.config.measure.top_k}"
        stage = Stage(
            space=self.space,
            budget=self.budget,
            search=self.config.search,
            caps=self.config.caps,
            records=journal,
            bench=lambda: self.bench,
            executor=self.executor,
            num_sequences={split: len(tensors[split]) for split in _MEASURED_SPLITS},
            tokens_per_sequence=int(tensors["search"].shape[1]),
            store=TableStore(self.folder.path.parent / "losses", identity),
            reporter=self.reporter,
            extend=extend,
        )
        outcome = run_pipeline(stage)
        facts = PlanFacts(
            model=self.identity,
            calibration=_calibration_record(self.calibration),
            objective=self.config.measure.objective,
            dtype=self.config.measure.dtype,
        )
        plan = build_plan(self.space, self.budget, self.config.search, outcome, facts)
        finished = Finished(self.folder, plan, outcome, self.space)
        self._write(finished)
        return finished

    def _write(self, finished: Finished) -> None:
        """Write everything that is derived from the journal."""
        outcome = finished.outcome
        save_losses(outcome.tables, self.folder.losses)
        write_text(self.folder.frontier, frontier_csv(self.space, outcome, self.budget))
        save_plan(finished.plan, self.folder.plan)
        view = gather_view(self.folder.name, self.config, self.space, outcome, finished.plan)
        write_report(view, self.folder.report)


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


def calibration_splits(calibration: Calibration) -> dict[str, SplitRecord]:
    """Size and hash of each split."""
    return {
        name: SplitRecord(
            num_sequences=len(calibration.splits[name]),
            sequence_length=int(calibration.splits[name].shape[1]),
            sha256=calibration.hashes[name],
        )
        for name in SPLITS
    }


def _calibration_record(calibration: Calibration) -> CalibrationRecord:
    return CalibrationRecord(source=calibration.source, splits=calibration_splits(calibration))


def _identity(loaded: LoadedModel) -> ModelIdentity:
    return ModelIdentity(
        name=loaded.name,
        architecture=loaded.architecture,
        config_sha256=loaded.config_sha256,
        weights_sha256=loaded.weights_sha256,
    )


def _unfinished(folder: RunFolder) -> str:
    return (
        f"the run {folder.path} is not finished: continue it with 'allocator resume {folder.path}'"
    )


def _header(
    config: RunConfig, identity: ModelIdentity, space: SearchSpace, calibration: Calibration
) -> dict[str, Any]:
    """What a journal is about; a resumed run must agree on every field."""
    return {
        "format": _FORMAT,
        "config": config.identity,
        "model": identity.model_dump(mode="json"),
        "space": space.sha256,
        "calibration": calibration.hashes,
    }


def default_name(model: str, budget: str) -> str:
    """A run's name from what it does: the model's last path part and the budget."""
    base = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model).name)
    return f"{base.strip('.-_') or 'run'}-{budget.replace('%', 'pct')}"[:64]

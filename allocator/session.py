"""A session of a run: its folder, journal, configuration and live bench, begun or taken up again.

The problem: a search and a profile start alike (price the space, refuse what cannot be, load model
and text, settle what must not change later, create the journal) and resume alike (open the journal,
compare what it is about). What they do then differs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from allocator.bench import Bench, BenchPool, LanguageBenchFactory, load_model_for, resolve_threads
from allocator.budget import Budget, resolve_budget
from allocator.config import RunConfig, SpaceConfig, load_config, save_config
from allocator.executors import EXECUTORS, Executor, InProcess, WorkerSetting
from allocator.journal import Journal, differences
from allocator.plan import CalibrationRecord, ModelIdentity
from allocator.reporter import Reporter
from allocator.run_folder import (
    LONGEST_NAME,
    SHARED_TABLES,
    RunFolder,
    load_space,
    save_space,
)
from allocator.run_texts import (
    build_texts,
    find_weights,
    load_texts,
    record_weighing,
    text_record,
)
from allocator.same_run import lasting
from allocator.search_build import check_search
from allocator.study_storage import without_password
from allocator.tables import TableStore
from allocator.warm_start import read_warm_start
from objectives.calibration import SPLITS, Calibration
from objectives.device_map import devices_of
from objectives.loading import LoadedModel, find_model, resolve_device, resolve_dtype
from objectives.peak_memory import PeakMemory
from objectives.statistics_file import FILE_NAME as STATISTICS_NAME
from objectives.statistics_file import StatisticsFile, statistics_identity
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models import skeleton
from search_spaces.space import SearchSpace
from search_spaces.whole_file import write_whole

logger = logging.getLogger(__name__)

_FORMAT = 1


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
        ValueError: As :func:`price`, options that the search does not have, the folder already
            holds a run, or its search cannot serve the space.
    """
    if folder.begun:
        raise ValueError(
            f"the run folder {folder.path} already holds a run: continue it with "
            f"'allocator resume {folder.path}' or choose another name with --name"
        )
    space, budget = price(config)
    check_search(config.search, space)
    return space, budget


@contextmanager
def begin(
    config: RunConfig, folder: RunFolder, reporter: Reporter, pool: BenchPool | None = None
) -> Iterator[tuple[Session, Journal]]:
    """Start a session in a new folder; the journal is closed at the end.

    Args:
        config: What to do.
        folder: New or empty.
        reporter: Shown the progress.
        pool: Shared by sessions that differ in their budget only.

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
    texts = build_texts(config.data, loaded)
    advance(2, "")
    # Settled now, so that resuming on another machine cannot silently measure differently.
    device = resolve_device(config.measure.device)
    dtype = str(resolve_dtype(config.measure.dtype, device)).removeprefix("torch.")
    settled = config.measure.model_copy(update={"dtype": dtype, "threads": threads})
    source = config.search.warm_start
    config = lasting(config).model_copy(update={"measure": settled})
    meter = TokenMeter()
    if config.data.also and not config.data.weights:
        reporter.stage("weighing the texts", None)
        weights, meter = find_weights(config.measure, loaded, space, texts)
        weighed = config.data.model_copy(update={"weights": weights})
        config = config.model_copy(update={"data": weighed})
    identity = identify(loaded)
    header = _header(config, identity, space, text_record(config.data, texts))
    carried = None if source is None else _carry_over(source, space, header, folder, reporter)
    folder.make()
    for number, text in enumerate(texts):
        text.save(folder.text(number))
    save_space(space, folder.space)
    save_config(config, folder.config)
    with Journal.create(folder.journal, header) as journal:
        record_weighing(meter, journal)
        if carried is not None:
            journal.append(carried)
        parts = (folder, config, space, budget, texts, identity, reporter, loaded)
        yield Session(*parts, pool=pool), journal


def _carry_over(
    source: str,
    space: SearchSpace,
    header: Mapping[str, Any],
    folder: RunFolder,
    reporter: Reporter,
) -> dict[str, Any]:
    """The record of what an earlier run or study says, so that resuming does not need it."""
    known = read_warm_start(source, space, header, runs=folder.path.parent)
    if known.differs:
        reporter.note(
            f"{source} was measured with another {', '.join(known.differs)}: its "
            f"{len(known.starts)} assignments carry over, not their losses"
        )
    return {
        "type": "warm_start",
        "source": without_password(source),
        "starts": [list(start) for start in known.starts],
        "evaluations": [evaluation.to_json() for evaluation in known.evaluations],
        "differs": list(known.differs),
    }


@contextmanager
def reopen(
    folder: RunFolder,
    reporter: Reporter,
    *,
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
    offline: bool = False,
) -> Iterator[tuple[Session, Journal]]:
    """Take up a session that has begun; the journal is closed at the end.

    Args:
        folder: Of a run whose journal has begun.
        reporter: Shown the progress.
        change: New caps or another executor; the rest of the configuration may not change.
        offline: Load no model: fail if anything is still to be measured.

    Raises:
        ValueError: The run is in use, damaged, or was made with another configuration.
    """
    config = change(load_config(folder.config))
    space = load_space(folder.space)
    budget = resolve_budget(config.budget, space)
    texts = load_texts(config.data, folder)
    with Journal.open(folder.journal) as journal:
        identity = ModelIdentity(**journal.header["model"])
        wanted = _header(config, identity, space, text_record(config.data, texts))
        if wanted != journal.header:
            changed = "; ".join(differences(journal.header, json.loads(json.dumps(wanted))))
            raise ValueError(
                f"{folder.path} was started otherwise ({changed}): take that back, or start a new "
                "run"
            )
        if config.search.warm_start is not None and not any(
            record["type"] == "warm_start" for record in journal.records
        ):  # the first session ended in between
            journal.append(
                _carry_over(config.search.warm_start, space, journal.header, folder, reporter)
            )
        parts = (folder, config, space, budget, texts, identity, reporter, None)
        with _saved(config, folder):
            yield Session(*parts, offline=offline), journal


@contextmanager
def _saved(config: RunConfig, folder: RunFolder) -> Iterator[None]:
    """A changed configuration is the run's from now on, unless what is inside refuses it."""
    before = load_config(folder.config)
    if config != before:
        save_config(config, folder.config)
    try:
        yield
    except ValueError:
        if config != before:
            save_config(before, folder.config)
        raise


@dataclass(frozen=True)
class Session:
    """The parts of one session."""

    folder: RunFolder
    config: RunConfig
    space: SearchSpace
    budget: Budget
    texts: tuple[Calibration, ...]
    identity: ModelIdentity
    reporter: Reporter
    loaded: LoadedModel | None
    offline: bool = False
    pool: BenchPool | None = None

    @property
    def record(self) -> CalibrationRecord:
        """What the plan says of the texts."""
        return text_record(self.config.data, self.texts)

    @cached_property
    def bench(self) -> Bench:
        """The live bench of this process."""
        if self.offline:
            raise ValueError(unfinished(self.folder))
        pool = self.pool or BenchPool()
        header = _header(self.config, self.identity, self.space, self.record)
        about = {key: header[key] for key in ("model", "space", "calibration")}
        key = json.dumps([about, self.config.measure.model_dump(mode="json")])
        return pool.get(key, self._factory.statistics, self._fresh_bench)

    def _fresh_bench(self) -> Bench:
        loaded = self.loaded
        if loaded is None:
            advance = self.reporter.stage("loading model", 1)
            loaded = load_model_for(self.config.model, self.config.measure, self._factory.threads)
            advance(1, "")
        found, known = identify(loaded), self.identity
        if (found.weights_sha256, found.config_sha256) != (
            known.weights_sha256,
            known.config_sha256,
        ):
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
            texts=tuple(self.folder.text(i).resolve() for i in range(len(self.texts))),
            weights=self.config.data.weights,
            space=self.folder.space.resolve(),
            cache=self.folder.cache.resolve(),
            threads=self.config.measure.threads,
            statistics=StatisticsFile(
                self.folder.cache.resolve() / STATISTICS_NAME,
                statistics_identity(
                    self.identity.weights_sha256,
                    self.record.statistics_identity(self.config.measure.objective),
                ),
            ),
        )

    def keep_statistics(self) -> None:
        """Make the statistics again that operators compress with, where their file is gone."""
        if self.space.needs and not self._factory.statistics.path.exists():
            self.bench.observe()

    def save_memory(self) -> None:
        """Write down the memory that this session planned and used, if it had a model at all.

        It differs from machine to machine, so it is no part of the journal.
        """
        if "bench" not in self.__dict__:
            return
        bench = self.bench
        peaks = {device: PeakMemory.measure(device) for device in devices_of(bench.model)}
        text = f"{max(peak.host_bytes for peak in peaks.values()) / 2**30:.2f} GiB of the host"
        for device, peak in peaks.items():
            if peak.device_bytes:
                text += f", {peak.device_bytes / 2**30:.2f} GiB of {device}"
        found = {"Memory plan": str(bench.bank.plan), "Peak memory": text}
        write_whole(self.folder.memory, json.dumps(found))

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

    def store(self) -> TableStore:
        """Loss tables of earlier runs on the same model, text and precision."""
        measure = self.config.measure
        identity = (  # some scorers measure, and caches are measured by all
            f"{self.identity.weights_sha256} {self.record.identity('statistics')} "
            f"{measure.dtype} {measure.objective} {measure.top_k}"
        )
        return TableStore(self.folder.path.parent / SHARED_TABLES, identity)

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens that one sequence of every text sends through the model."""
        return len(self.texts) * int(self.texts[0].splits["search"].shape[1])


def identify(loaded: LoadedModel) -> ModelIdentity:
    """What a plan says of a loaded model."""
    return ModelIdentity(
        name=loaded.name,
        architecture=loaded.architecture,
        config_sha256=loaded.config_sha256,
        weights_sha256=loaded.weights_sha256,
    )


def unfinished(folder: RunFolder) -> str:
    """What is said where only finished runs will do."""
    return (
        f"the run {folder.path} is not finished: continue it with 'allocator resume {folder.path}'"
    )


def _header(
    config: RunConfig, identity: ModelIdentity, space: SearchSpace, texts: CalibrationRecord
) -> dict[str, Any]:
    """What a journal is about; a resumed run must agree on every field."""
    return {
        "format": _FORMAT,
        "config": config.identity,
        "model": identity.model_dump(mode="json"),
        "space": space.sha256,
        "calibration": {split: texts.identity(split) for split in SPLITS},
    }


def default_name(model: str, *words: str) -> str:
    """A run's name from what it does: the model's last path part, cut where need be, and words."""
    base = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model).name)
    end = "".join(map(name_word, words))
    return (base.strip(".-_") or "run")[: max(1, LONGEST_NAME - len(end))] + end


def name_word(word: str) -> str:
    """A word, such as a budget, as the end of a run's name."""
    return f"-{word.replace('%', 'pct').replace(' ', '')}"

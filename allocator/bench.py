"""Everything live that measuring needs: the model with its bank, task and token counts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from allocator.apply import round_fixed
from allocator.config import MeasureConfig
from allocator.executors import Measure
from objectives.bank import Bank
from objectives.calibration import Calibration
from objectives.evaluator import Evaluator
from objectives.language_objectives import TaskOptions, language_tasks
from objectives.loading import LoadedModel, load_model
from objectives.prefix import find_blocks
from objectives.statistics import Progress, collect_statistics
from objectives.statistics_file import StatisticsFile
from objectives.task import Task, TokenMeter
from search_spaces.operators import Statistics
from search_spaces.space import SearchSpace
from search_spaces.whole_file import replacing


@dataclass(frozen=True)
class Bench:
    """A model on the bench: dense until the evaluator swaps something in.

    Attributes:
        model: The live model.
        task: What is measured on it.
        space: What may be swapped.
        bank: Compressed parameters.
        meter: Tokens spent in this process.
        evaluator: Measures assignments.
        kept: Where the statistics that operators need are kept between processes, if anywhere.
    """

    model: nn.Module
    task: Task
    space: SearchSpace
    bank: Bank
    meter: TokenMeter
    evaluator: Evaluator
    kept: StatisticsFile | None = None

    @classmethod
    def build(
        cls,
        model: nn.Module,
        task: Task,
        space: SearchSpace,
        *,
        kept: StatisticsFile | None = None,
    ) -> Bench:
        """Put a dense model on the bench.

        Tensors that are not searched are rounded to the type they will be stored in, so that what
        is measured is what a packed file holds.
        """
        round_fixed(model, space.fixed)
        folder = None if kept is None else kept.path.parent
        bank = Bank(model, space, folder=folder)
        meter = TokenMeter(len(find_blocks(model, space)))
        evaluator = Evaluator(model, task, bank, meter)
        return cls(model, task, space, bank, meter, evaluator, kept)

    def observe(
        self, needs: Collection[str] = (), progress: Progress = lambda done, total: None
    ) -> Mapping[str, Statistics]:
        """Statistics of the dense model, and those that operators need handed to the bank.

        The operators' own are collected once for all processes of a run.

        Args:
            needs: Kinds wanted besides the operators'.
            progress: Told (sequences done, sequences in all).
        """
        if self.space.needs and not self.bank.statistics and self.kept:
            # a model may be spread over devices
            kinds, kept = self.kept.load(lambda name: self.model.get_parameter(name).device)
            if self.space.needs <= kinds:
                self.bank.use_statistics(kept)
        known = self.bank.statistics
        lacking = set(needs) - (self.space.needs if known else set())
        if not known:
            lacking |= self.space.needs
        if not lacking:
            return known
        self.bank.restore()
        fresh = collect_statistics(
            self.model, self.task, self.space, needs=lacking, meter=self.meter, progress=progress
        )
        merged = {name: _merged(own, known.get(name)) for name, own in fresh.items()}
        if self.space.needs and not known:
            if self.kept:
                self.kept.save(merged, self.space.needs)
            self.bank.use_statistics(merged)
        return merged


class BenchPool:
    """Benches that runs of one process share: budgets differ, what they measure on does not."""

    def __init__(self) -> None:
        self._benches: dict[str, Bench] = {}
        self._loaded: dict[str, LoadedModel] = {}

    def load(self, name: str, measure: MeasureConfig, threads: int) -> LoadedModel:
        """The model as a run measures it, loaded the first time."""
        key = json.dumps([name, threads, measure.model_dump(mode="json")])
        if key not in self._loaded:
            self._loaded.clear()  # one model at a time
            self._loaded[key] = load_model_for(name, measure, threads)
        return self._loaded[key]

    def get(self, key: str, kept: StatisticsFile, make: Callable[[], Bench]) -> Bench:
        """The bench of a key, made the first time; statistics are handed on to ``kept``.

        Args:
            key: Equal only where model, text, space and precision are.
            kept: Where this run keeps its statistics.
            make: Makes the bench.
        """
        if key not in self._benches:
            self._benches.clear()
            self._benches[key] = make()
        bench = self._benches[key]
        if bench.kept and bench.kept.path.exists() and not kept.path.exists():
            kept.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept.path) as temporary:
                shutil.copyfile(bench.kept.path, temporary)
        return replace(bench, kept=kept)


def _merged(fresh: Statistics, kept: Statistics | None) -> Statistics:
    """What was kept wins: everyone must compress with the same numbers."""
    if kept is None:
        return fresh
    values = {field.name: getattr(kept, field.name) for field in fields(Statistics)}
    return replace(fresh, **{kind: value for kind, value in values.items() if value is not None})


@dataclass(frozen=True)
class LanguageBenchFactory:
    """Builds the bench of a language model from files, in whichever process measures.

    Attributes:
        model: Name, folder or hub id.
        measure: How losses are measured; dtype and device may be ``auto``.
        texts: Files written by :meth:`Calibration.save`.
        weights: How much each text's loss counts.
        space: File with the space's JSON.
        cache: Folder for teacher caches.
        threads: Torch threads of the process.
        statistics: Where the statistics that operators need are kept.
    """

    model: str
    measure: MeasureConfig
    texts: tuple[Path, ...]
    weights: tuple[float, ...]
    space: Path
    cache: Path
    threads: int
    statistics: StatisticsFile

    def __call__(self) -> Measure:
        """Load everything and return the evaluator."""
        bench = self.bench(load_model_for(self.model, self.measure, self.threads))
        bench.observe()
        return bench.evaluator

    def bench(self, loaded: LoadedModel) -> Bench:
        """The bench of a model that is already loaded."""
        task = language_tasks(
            self.measure.objective,
            [Calibration.load(path) for path in self.texts],
            self.weights,
            TaskOptions(self.measure.top_k, self.measure.batch_size, self.cache),
        )
        space = SearchSpace.from_json(json.loads(self.space.read_text(encoding="utf-8")))
        return Bench.build(loaded.model, task, space, kept=self.statistics)


def load_model_for(name: str, measure: MeasureConfig, threads: int) -> LoadedModel:
    """Load a model as a run measures it, on this many torch threads."""
    torch.set_num_threads(threads)
    return load_model(
        name, dtype=measure.dtype, device=measure.device, device_map=measure.device_map
    )


def resolve_threads(threads: int, workers: int) -> int:
    """Torch threads of each measuring process; 0 shares this process's cores between workers."""
    return threads or max(1, len(os.sched_getaffinity(0)) // workers)

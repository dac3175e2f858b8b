"""Everything live that measuring needs: the model with its bank, task and token counts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from allocator.apply import STORED_TYPES
from allocator.config import MeasureConfig
from allocator.executors import Measure
from objectives.bank import Bank
from objectives.calibration import Calibration
from objectives.evaluator import Evaluator
from objectives.language_task import LanguageTask
from objectives.loading import LoadedModel, load_model
from objectives.task import Task, TokenMeter
from search_spaces.space import SearchSpace


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
    """

    model: nn.Module
    task: Task
    space: SearchSpace
    bank: Bank
    meter: TokenMeter
    evaluator: Evaluator

    @classmethod
    def build(cls, model: nn.Module, task: Task, space: SearchSpace) -> Bench:
        """Put a dense model on the bench.

        Tensors that are not searched are rounded to the type they will be stored in, so that what
        is measured is what a packed file holds.
        """
        with torch.no_grad():
            for stored in space.fixed:
                tensor = _tensor(model, stored.name)
                tensor.copy_(tensor.to(STORED_TYPES[stored.dtype]))
        bank, meter = Bank(model, space), TokenMeter()
        return cls(model, task, space, bank, meter, Evaluator(model, task, bank, meter))


@dataclass(frozen=True)
class LanguageBenchFactory:
    """Builds the bench of a language model from files, in whichever process measures.

    Attributes:
        model: Name, folder or hub id.
        measure: How losses are measured; dtype and device may be ``auto``.
        calibration: File written by :meth:`Calibration.save`.
        space: File with the space's JSON.
        cache: Folder for teacher caches.
        threads: Torch threads of the process.
    """

    model: str
    measure: MeasureConfig
    calibration: Path
    space: Path
    cache: Path
    threads: int

    def __call__(self) -> Measure:
        """Load everything and return the evaluator."""
        return self.bench(load_model_for(self.model, self.measure, self.threads)).evaluator

    def bench(self, loaded: LoadedModel) -> Bench:
        """The bench of a model that is already loaded."""
        task = LanguageTask(
            Calibration.load(self.calibration),
            top_k=self.measure.top_k,
            batch_size=self.measure.batch_size,
            objective=self.measure.objective,
            cache_folder=self.cache,
        )
        space = SearchSpace.from_json(json.loads(self.space.read_text(encoding="utf-8")))
        return Bench.build(loaded.model, task, space)


def load_model_for(name: str, measure: MeasureConfig, threads: int) -> LoadedModel:
    """Load a model as a run measures it, on this many torch threads."""
    torch.set_num_threads(threads)
    return load_model(name, dtype=measure.dtype, device=measure.device)


def resolve_threads(threads: int, workers: int) -> int:
    """Torch threads of each measuring process; 0 shares this process's cores between workers."""
    return threads or max(1, len(os.sched_getaffinity(0)) // workers)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its full name."""
    module, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(module), leaf)
    assert isinstance(tensor, torch.Tensor), name
    return tensor

"""The main job as one call, on any ``nn.Module`` with a forward and a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from allocator.apply import apply_plan
from allocator.bench import Bench
from allocator.budget import resolve_budget
from allocator.config import CapsConfig, SearchConfig
from allocator.executors import InProcess
from allocator.pipeline import Outcome, run_pipeline
from allocator.plan import ModelIdentity, Plan, save_plan
from allocator.plan_build import PlanFacts, build_plan
from allocator.reporter import Reporter, Silent
from allocator.search_build import check_search
from allocator.stage import Stage
from objectives.function_task import FunctionTask, LossFunction, split_batches
from objectives.loading import hash_module
from objectives.task import Task
from search_spaces.build import SpaceRequest, build_space

_MEASURED_SPLITS = ("search", "guard", "heldout")


@dataclass(frozen=True)
class AllocateOptions:
    """Everything that has a sensible default.

    Attributes:
        space: What may be chosen; a preset's name inside a request.
        search: Search with its options, scorers, seed, window, batches per evaluation.
        caps: Where the search stops.
        name: How the plan calls the model.
        reporter: Shown the progress.
    """

    space: SpaceRequest = field(default_factory=SpaceRequest)
    search: SearchConfig = field(default_factory=SearchConfig)
    caps: CapsConfig = field(default_factory=lambda: CapsConfig(trials=100))
    name: str = "module"
    reporter: Reporter = field(default_factory=Silent)


@dataclass(frozen=True)
class Allocation:
    """A plan and everything that was measured on the way to it."""

    plan: Plan
    outcome: Outcome

    def apply(self, model: nn.Module) -> None:
        """Compress a dense copy of the model in place, as the plan says."""
        apply_plan(model, self.plan)

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        save_plan(self.plan, path)


class _Memory:
    """A journal that lives as long as the call."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))


def allocate(
    model: nn.Module,
    budget: str,
    *,
    data: Sequence[Any] | Mapping[str, Sequence[Any]],
    loss: LossFunction,
    options: AllocateOptions | None = None,
) -> Allocation:
    """Find the allocation that loses least on the caller's own loss, within a budget.

    Args:
        model: Dense, in evaluation mode, on its device. Its weights are as before when this
            returns, except that tensors which are not searched are rounded to the 16 bits they will
            be stored in.
        budget: ``90MB``, ``3.25bpw``, ``40%``; see :func:`allocator.budget.resolve_budget`.
        data: Batches of any type: one list, which is cut into statistics, search, guard and
            held-out parts, or a mapping with these four keys.
        loss: (model, batch) -> scalar tensor, lower is better, mean over the batch.
        options: What may be chosen, how it is searched and for how long.

    Returns:
        The plan with its baselines, bounds and held-out losses.

    Raises:
        ValueError: The budget cannot be met, there is too little data, or nothing could be
            measured.
    """
    splits = data if isinstance(data, Mapping) else split_batches(data)
    return allocate_task(model, budget, task=FunctionTask(loss, splits), options=options)


def allocate_task(
    model: nn.Module, budget: str, *, task: Task, options: AllocateOptions | None = None
) -> Allocation:
    """Find the allocation that loses least on a task, within a budget.

    For losses that are more than a function of a batch: representations, accuracy, several tasks.

    Args:
        model: As for :func:`allocate`; what it must offer besides is the task's to say.
        budget: As for :func:`allocate`.
        task: What is measured, with its data.
        options: What may be chosen, how it is searched and for how long.

    Returns:
        The plan with its baselines, bounds and held-out losses.

    Raises:
        ValueError: The budget cannot be met, the search has no such options, or nothing could be
            measured.
    """
    chosen = options or AllocateOptions()
    space = build_space(model, chosen.space)
    check_search(chosen.search, space)
    resolved = resolve_budget(budget, space)
    identity = ModelIdentity(
        name=chosen.name,
        architecture=type(model).__name__,
        config_sha256="",
        weights_sha256=hash_module(model),
    )
    bench = Bench.build(model, task, space)
    stage = Stage(
        space=space,
        budget=resolved,
        search=chosen.search,
        caps=chosen.caps,
        records=_Memory(),
        bench=lambda: bench,
        executor=lambda: InProcess(lambda: bench.evaluator),
        num_sequences={name: task.num_sequences(name) for name in _MEASURED_SPLITS},
        tokens_per_sequence=task.tokens_per_sequence,
        has_slopes=task.has_slopes,
        store=None,
        reporter=chosen.reporter,
    )
    try:
        outcome = run_pipeline(stage)
    finally:
        bench.bank.restore()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    facts = PlanFacts(identity, None, task.name, dtype)
    return Allocation(build_plan(space, resolved, chosen.search, outcome, facts), outcome)

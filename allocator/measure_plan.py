"""Measure a plan on a text of the user's choice, beside the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from allocator.apply import NO_STATISTICS, StatisticsByName, apply_plan, check_loaded
from allocator.bench import load_model_for, resolve_threads
from allocator.config import MeasureConfig
from allocator.plan import Measured, Plan
from allocator.plan_build import measure
from allocator.reporter import Reporter
from objectives.calibration import (
    Calibration,
    CalibrationRequest,
    build_calibration,
    hash_tokens,
)
from objectives.evaluation import Evaluation, Fidelity, round_significant
from objectives.kv_cache import CacheSwitch
from objectives.language_task import LanguageTask
from objectives.loading import check_length
from search_spaces.space import Assignment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPLIT = "heldout"


def measure_plan(
    model: str,
    plan: Plan,
    *,
    request: CalibrationRequest,
    threads: int,
    reporter: Reporter,
    statistics: StatisticsByName = NO_STATISTICS,
) -> dict[str, Measured]:
    """Losses of the dense model and of the plan on the request's held-out sequences.

    Raises:
        ValueError: The model is not the plan's, or the text is too short.
    """
    config = MeasureConfig(dtype=plan.dtype, threads=threads)  # type: ignore[arg-type]
    loaded = load_model_for(model, config, resolve_threads(threads, 1))
    check_loaded(plan, loaded)
    num_sequences, length = request.num_heldout, request.sequence_length
    check_length(loaded.model, length)
    calibration = build_calibration(request, loaded.tokenizer)
    if not _is_new(calibration, request, loaded.tokenizer, plan):
        reporter.note(
            f"the plan's search may have read some of these sequences of {request.source}: another "
            "text, or the run's own seed, length and at most its number of held-out sequences, "
            "gives a held-out figure"
        )
    task = LanguageTask(calibration, top_k=0)
    advance = reporter.stage("dense model and plan", 3)
    task.prepare(loaded.model, _SPLIT)
    advance(1, "")
    found = {}
    for done, name in enumerate(("dense", "plan"), start=2):
        if name == "plan":
            apply_plan(loaded.model, plan, statistics)
            caches = CacheSwitch(loaded.model)
            for entry in plan.units:
                if entry.unit.is_cache:
                    caches.choose(entry.unit, entry.choice)
        losses = task.sequence_losses(loaded.model, _SPLIT, range(num_sequences))
        choice: Assignment = ()
        found[name] = measure(
            Evaluation(
                choice,
                Fidelity(_SPLIT, 0, num_sequences),
                tuple(round_significant(value) for value in losses.nats),
                tuple(round_significant(value) for value in losses.cross_entropy_nats),
                num_sequences * length,
            )
        )
        advance(done, "")
    return found


def _is_new(
    calibration: Calibration,
    request: CalibrationRequest,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
) -> bool:
    """Whether the plan's run certainly held these sequences out, or never knew the text."""
    for text in plan.calibration.texts if plan.calibration else ():
        heldout = text.splits[_SPLIT]
        if text.source != request.source:
            continue
        if heldout.sequence_length != request.sequence_length:
            return False
        if heldout.num_sequences < request.num_heldout:
            return False
        tokens = calibration.splits[_SPLIT]
        if heldout.num_sequences > len(tokens):  # the hash is of the whole split
            whole = replace(request, num_heldout=heldout.num_sequences)
            tokens = build_calibration(whole, tokenizer).splits[_SPLIT]
        if hash_tokens(tokens) != heldout.sha256:
            return False
    return True

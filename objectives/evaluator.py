"""Measure whole assignments: swap them in, run the task, count the tokens."""

from __future__ import annotations

import math

from torch import nn

from objectives.bank import Bank
from objectives.evaluation import Evaluation, Fidelity, round_significant
from objectives.task import Task, TokenMeter
from search_spaces.space import Assignment


class Evaluator:
    """Measures assignments on one live model.

    Args:
        model: The model whose parameters the bank swaps.
        task: What is measured; its splits are prepared on the dense model when first used.
        bank: Compressed parameters of the same model.
        meter: Where tokens are counted.
    """

    def __init__(self, model: nn.Module, task: Task, bank: Bank, meter: TokenMeter) -> None:
        self._model = model
        self._task = task
        self._bank = bank
        self._meter = meter
        self._prepared: set[str] = set()

    def prepare(self, split: str) -> None:
        """Run the dense model on a split where the task needs it, once."""
        if split not in self._prepared:
            self._bank.restore()
            self._meter.add("teacher", self._task.prepare(self._model, split))
            self._prepared.add(split)

    def __call__(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Measure one assignment; a non-finite loss is a failed evaluation."""
        self.prepare(fidelity.split)
        indices = fidelity.indices(self._task.num_sequences(fidelity.split))
        self._bank.swap(assignment)
        losses = self._task.sequence_losses(self._model, fidelity.split, indices)
        tokens = len(indices) * self._task.tokens_per_sequence
        self._meter.add(fidelity.split, tokens)
        bad = [value for value in losses.nats if not math.isfinite(value)]
        if bad:
            error = f"non-finite loss {bad[0]}"
            return Evaluation(assignment, fidelity, num_tokens=tokens, error=error)
        return Evaluation(
            assignment,
            fidelity,
            tuple(round_significant(value) for value in losses.nats),
            tuple(round_significant(value) for value in losses.cross_entropy_nats),
            tokens,
        )

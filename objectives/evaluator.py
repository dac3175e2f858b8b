"""Measure whole assignments: swap them in, run the blocks that differ, count the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from objectives.bank import Bank
from objectives.evaluation import Evaluation, Fidelity, Slopes, non_finite, round_significant
from objectives.prefix import DEFAULT_PREFIX_BYTES, PrefixReuse
from objectives.slopes import SlopeReader
from objectives.task import SequenceLosses, Task, TokenMeter
from search_spaces.space import Assignment


class Evaluator:
    """Measures assignments on one live model.

    Args:
        model: The model whose parameters the bank swaps.
        task: What is measured; its splits are prepared on the dense model when first used.
        bank: Compressed parameters of the same model.
        meter: Where tokens are counted.
        prefix_bytes: Cap of the hidden states that measurements share; 0 runs every forward in
            full. The numbers are the same.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        bank: Bank,
        meter: TokenMeter,
        *,
        prefix_bytes: int = DEFAULT_PREFIX_BYTES,
    ) -> None:
        self._model = model
        self._task = task
        self._bank = bank
        self._meter = meter
        self._prefix = PrefixReuse(model, bank.space, most_bytes=prefix_bytes)
        self._prepared: set[str] = set()
        self._statistics = bank.statistics
        self._slopes: SlopeReader | None = None
        self._known: dict[tuple[Assignment, Fidelity], Evaluation] = {}

    def prepare(self, split: str) -> None:
        """Run the dense model on a split where the task needs it, once."""
        if split not in self._prepared:
            self._bank.restore()
            self._meter.add("teacher", self._task.prepare(self._model, split))
            self._prepared.add(split)

    def once(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Measure, or hand out what was measured before with the same compressed weights."""
        self._forget_old_weights()
        key = (assignment, fidelity)
        if key not in self._known:
            self._known[key] = self(assignment, fidelity)
        return self._known[key]

    def __call__(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Measure one assignment; a non-finite loss is a failed evaluation."""
        self._forget_old_weights()
        self.prepare(fidelity.split)
        indices = fidelity.indices(self._task.num_sequences(fidelity.split))
        if fidelity.slopes:
            return self._differentiate(assignment, fidelity, indices)
        self._bank.swap(assignment)
        with self._prefix.measuring(assignment) as work:
            losses = self._task.sequence_losses(self._model, fidelity.split, indices)
        tokens = len(indices) * self._task.tokens_per_sequence
        block_tokens = round(tokens * self._prefix.num_blocks * work.share)
        self._meter.add(fidelity.split, tokens, block_tokens)
        if work.num_checked:
            checked = tokens * work.num_checked / work.num_full
            self._meter.add("check", round(checked), round(checked * self._prefix.num_blocks))
        return evaluation_of(
            assignment, fidelity, losses, num_tokens=tokens, num_block_tokens=block_tokens
        )

    def _forget_old_weights(self) -> None:
        """What was learned of weights that were compressed with other statistics is of no use."""
        if self._statistics is not self._bank.statistics:
            self._statistics, self._known, self._slopes = self._bank.statistics, {}, None
            self._prefix.clear()

    def _differentiate(
        self, assignment: Assignment, fidelity: Fidelity, indices: Sequence[int]
    ) -> Evaluation:
        """Measure with slopes, in full forwards."""
        if self._slopes is None:
            self._slopes = SlopeReader(self._model, self._task, self._bank)
        self._bank.swap(assignment)
        losses, slopes = self._slopes.read(assignment, fidelity.split, indices)
        forward = len(indices) * self._task.tokens_per_sequence
        tokens = fidelity.num_passes * self._task.tokens_per_sequence
        self._meter.add(fidelity.split, forward)
        self._meter.add(f"{fidelity.split}_backward", tokens - forward)
        return evaluation_of(
            assignment,
            fidelity,
            losses,
            slopes,
            num_tokens=tokens,
            num_block_tokens=tokens * self._prefix.num_blocks,
        )


def evaluation_of(
    assignment: Assignment,
    fidelity: Fidelity,
    losses: SequenceLosses,
    slopes: Slopes | None = None,
    *,
    num_tokens: int,
    num_block_tokens: int,
) -> Evaluation:
    """What was measured, rounded; a non-finite loss or slope is a failed evaluation."""
    numbers = () if slopes is None else itertools.chain(*slopes.nats, *slopes.moves)
    error = non_finite({"loss": losses.nats, "slope": numbers})
    found = error is None
    return Evaluation(
        assignment,
        fidelity,
        tuple(round_significant(v) for v in losses.nats) if found else (),
        tuple(round_significant(v) for v in losses.cross_entropy_nats) if found else (),
        num_tokens,
        num_block_tokens,
        error,
        slopes if found else None,
    )

"""Measure whole assignments on a streamed model: each block is read once for all of them.

The problem: reading a block of a large model costs more than running it on a few sequences. So one
pass measures any number of assignments: what every one of them makes of the hidden states is kept
side by side, once for those that agree so far, while a block is resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from objectives.bank import Bank
from objectives.evaluation import Evaluation, Fidelity
from objectives.evaluator import evaluation_of
from objectives.hidden_states import DEFAULT_HIDDEN_BYTES, HiddenStates
from objectives.streaming import Batch, Part, StreamedModel, part_of_space
from objectives.task import SequenceLosses, Task, TokenMeter
from search_spaces.operators import Statistics
from search_spaces.space import Assignment, SearchSpace

Choices = tuple[int, ...] | None
"""Options of the units of one part; ``None`` for the dense weights."""

Prefix = tuple[Choices, ...]
"""Of everything around the blocks, then of each block up to some depth."""


class StreamedEvaluator:
    """Measures assignments as :class:`objectives.evaluator.Evaluator` does, block by block.

    Args:
        stream: The model; from now on tensors that the space fixes are rounded as they are stored.
        task: What is measured.
        space: Units and menus.
        meter: Where tokens are counted.
        statistics: By member name, for operators that need them.
        hidden_bytes: Most memory of the hidden states between blocks; the rest is in files.

    Raises:
        ValueError: The space has caches, or units that are spread over blocks.
    """

    def __init__(
        self,
        stream: StreamedModel,
        task: Task,
        space: SearchSpace,
        meter: TokenMeter,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        hidden_bytes: int = DEFAULT_HIDDEN_BYTES,
    ) -> None:
        self._stream = stream
        self._task = task
        self._space = space
        self._meter = meter
        self._statistics = statistics or {}
        self._hidden_bytes = hidden_bytes
        self._units = stream.units_of(space)
        self._prepared: set[str] = set()
        stream.round_fixed(space.fixed)

    def prepare(self, split: str) -> None:
        """Run the dense model on a split where the task needs it, once."""
        if split in self._prepared:
            return
        prepare = partial(self._task.prepare, self._stream.model, split)
        if self._stream.calls_model(prepare):
            indices = range(self._task.num_sequences(split))
            self._run(split, indices, [None], lambda _: self._meter.add("teacher", prepare()))
        self._prepared.add(split)

    def __call__(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Measure one assignment; a non-finite loss is a failed evaluation."""
        return self.measure([assignment], fidelity)[0]

    def measure(self, assignments: Sequence[Assignment], fidelity: Fidelity) -> list[Evaluation]:
        """Measure several assignments in one pass over the blocks.

        Raises:
            ValueError: The fidelity asks for slopes.
        """
        if fidelity.slopes:
            raise ValueError("a streamed model gives no slopes: measure it in memory")
        for assignment in assignments:
            self._space.check(assignment)
        self.prepare(fidelity.split)
        indices = fidelity.indices(self._task.num_sequences(fidelity.split))
        losses: dict[Prefix, SequenceLosses] = {}

        def finish(prefix: Prefix) -> None:
            losses[prefix] = self._task.sequence_losses(self._stream.model, fidelity.split, indices)

        num_runs = self._run(fidelity.split, indices, assignments, finish)
        tokens = len(indices) * self._task.tokens_per_sequence
        self._meter.add(fidelity.split, tokens * len(assignments), tokens * num_runs)
        return [
            evaluation_of(
                assignment,
                fidelity,
                losses[self._prefix(assignment, self._stream.num_blocks)],
                num_tokens=tokens,
                num_block_tokens=round(tokens * num_runs / len(assignments)),
            )
            for assignment in assignments
        ]

    def _run(
        self,
        split: str,
        indices: Sequence[int],
        assignments: Sequence[Assignment | None],
        finish: Callable[[Prefix], None],
    ) -> int:
        """Take sequences through the blocks under every assignment.

        Args:
            split: Of the task.
            indices: Of the sequences.
            assignments: ``None`` is the dense model.
            finish: Called for each assignment with its prefix while the model, called on these
                sequences, hands over what its blocks made of them.

        Returns:
            How many blocks had to run, in all.
        """
        stream, num_runs = self._stream, 0
        prefixes = list(dict.fromkeys(self._prefix(a, 0) for a in assignments))
        with HiddenStates(most_bytes=self._hidden_bytes) as states:
            batches: list[Batch] = []
            with self._swapping(None) as swap:
                for prefix in prefixes:
                    swap(prefix[-1])
                    batches = self._capture(split, indices, states, prefix)
            for block in range(stream.num_blocks):
                longer = list(dict.fromkeys(self._prefix(a, block + 1) for a in assignments))
                with self._swapping(block) as swap, stream.timing("forward"):
                    for prefix in sorted(longer, key=lambda found: found[-1] or ()):
                        swap(prefix[-1])
                        self._advance(block, prefix, batches, states)
                num_runs += len(longer)
                for prefix in prefixes:
                    for batch in batches:
                        states.drop((prefix, batch.key))
                prefixes = longer
            with self._swapping(None) as swap, stream.timing("head"):
                for prefix in prefixes:
                    swap(prefix[0])
                    with stream.replaying(partial(self._final, states, prefix)):
                        finish(prefix)
        return num_runs

    def _capture(
        self, split: str, indices: Sequence[int], states: HiddenStates, prefix: Prefix
    ) -> list[Batch]:
        """The batches that the task makes of some sequences, and what enters the first block."""
        batches: list[Batch] = []
        left = list(indices)
        while left:
            call = partial(self._task.sequence_losses, self._stream.model, split, left)
            batch, hidden = self._stream.capture(call, batches[0] if batches else None)
            states.put((prefix, batch.key), hidden)
            batches.append(batch)
            left = left[batch.num_sequences :]
        return batches

    def _advance(
        self, block: int, prefix: Prefix, batches: Sequence[Batch], states: HiddenStates
    ) -> None:
        """Run a resident block, as it is swapped, on what the one before made."""
        with torch.inference_mode():
            for batch in batches:
                hidden = states.get((prefix[:-1], batch.key), self._stream.device)
                states.put((prefix, batch.key), self._stream.run(block, hidden, batch))

    def _final(self, states: HiddenStates, prefix: Prefix, key: bytes) -> Tensor:
        return states.get((prefix, key), self._stream.device)

    @contextmanager
    def _swapping(self, part: Part) -> Iterator[Callable[[Choices], None]]:
        """One part resident, and what gives its units their options."""
        units = self._units.get(part, [])
        with self._stream.resident(part):
            if not units:
                yield lambda choices: None
                return
            space = part_of_space(self._space, units)
            model = self._stream.model
            bank = Bank(model, space, statistics=self._statistics, most_bytes=0)
            yield lambda choices: bank.restore() if choices is None else bank.swap(choices)

    def _prefix(self, assignment: Assignment | None, num_blocks: int) -> Prefix:
        """What an assignment says of everything around the blocks and of the first of them."""
        return tuple(
            None if assignment is None else tuple(assignment[u] for u in self._units.get(part, []))
            for part in (None, *range(num_blocks))
        )

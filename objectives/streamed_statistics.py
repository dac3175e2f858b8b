"""Statistics of a streamed model, handed over part by part while its weights are resident.

The problem: the statistics of a large model do not fit in memory any more than its weights do, but
what needs them (compressing a unit, scoring its options) needs those of one block at a time. Input
moments come from one pass forwards. The empirical Fisher comes from a pass in reverse: the input of
every block was kept on the way forwards, each block is run again on it, and the gradient of its
output, handed down from the block above, is turned into that of its input. One sequence at a time,
so that exactly one sequence's gradient is squared; the numbers are those of a whole backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from objectives.hidden_states import DEFAULT_HIDDEN_BYTES, HiddenStates
from objectives.statistics import KINDS, Observation, Progress
from objectives.streaming import Batch, Part, StreamedModel
from objectives.task import Task, TokenMeter
from search_spaces.operators import Statistics
from search_spaces.space import SearchSpace

_GRADIENT = "gradient"


@dataclass(frozen=True)
class Visit:
    """A resident part whose statistics are complete.

    Attributes:
        part: A block's index, or ``None`` for everything around the blocks.
        units: Indices of the space's units that it holds.
        statistics: By member name.
    """

    part: Part
    units: Sequence[int]
    statistics: Mapping[str, Statistics]


class StreamedStatistics:
    """Visits the parts of a model with what :func:`collect_statistics` would say of them.

    Args:
        stream: The model; from now on tensors that the space fixes are rounded as they are stored.
        task: Gives the sequences and the loss whose gradient is squared.
        space: Whose members are observed.
        meter: Counts forward tokens, those of blocks that are run again too; a backward counts as
            two forwards.
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
        hidden_bytes: int = DEFAULT_HIDDEN_BYTES,
    ) -> None:
        self._stream = stream
        self._task = task
        self._meter = meter
        self._space = space
        self._hidden_bytes = hidden_bytes
        self._units = stream.units_of(space)
        self._total = task.num_sequences("statistics")
        self._scale = task.tokens_per_sequence / self._total
        stream.round_fixed(space.fixed)

    def visit(
        self,
        needs: Collection[str],
        act: Callable[[Visit], None],
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Act on every part that holds units, while it is resident and its statistics are known.

        Blocks come in order, or in reverse where the Fisher is needed; what is around them comes
        last.

        Args:
            needs: Any of ``second_moment``, ``hessian``, ``fisher``, ``inputs``; with none of them
                the model is read but not run.
            act: What to do with each part; statistics are dropped when it returns.
            progress: Told (passes over a part done, in all).

        Raises:
            ValueError: An unknown kind of statistics.
        """
        if unknown := set(needs) - KINDS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {sorted(KINDS)}")
        stream, ends = self._stream, None in self._units
        passes = stream.num_blocks * (2 if "fisher" in needs else 1) + ends
        done = iter(range(1, passes + 1))

        def told(part: Part, observed: Observation | None) -> None:
            if observed is not None and part in self._units:
                found = observed.statistics(self._scale)
                act(Visit(part, self._units[part], found))
            progress(next(done), passes)

        with HiddenStates(most_bytes=self._hidden_bytes) as states:
            batches = self._enter(states) if needs else []
            for block in range(stream.num_blocks):
                observed = None if "fisher" in needs else self._observation(block, needs)
                with stream.resident(block):
                    self._forward(block, batches, states, observed)
                    told(block, observed)
            if "fisher" in needs:
                self._differentiate(batches, states)
                for block in reversed(range(stream.num_blocks)):
                    observed = self._observation(block, needs)
                    with stream.resident(block):
                        self._backward(block, batches, states, observed)
                        told(block, observed)
            if ends:
                observed = self._observation(None, needs)
                with stream.resident(None):
                    self._around(batches, states, observed)
                    told(None, observed)

    def _observation(self, part: Part, needs: Collection[str]) -> Observation:
        units = self._units.get(part, [])
        members = [member for unit in units for member in self._space.units[unit].members]
        return Observation(self._stream.model, members, needs, num_sequences=self._total)

    def _enter(self, states: HiddenStates) -> list[Batch]:
        """One batch per sequence; what enters the first block."""
        stream, batches = self._stream, list[Batch]()
        with stream.resident(None), stream.timing("front"), torch.no_grad():
            for index in range(self._total):
                call = partial(self._task.likelihood_loss, stream.model, "statistics", index)
                batch, hidden = stream.capture(call, batches[0] if batches else None)
                states.put((0, index), hidden)
                batches.append(batch)
        self._meter.add("statistics", self._total * self._task.tokens_per_sequence)
        return batches

    def _forward(
        self,
        block: int,
        batches: Sequence[Batch],
        states: HiddenStates,
        observed: Observation | None,
    ) -> None:
        """Run a resident block, observed or (where it will be run again) keeping what entered."""
        listening = torch.no_grad() if observed is None else observed.listening()
        with self._stream.timing("forward"), listening:
            for index, batch in enumerate(batches):
                hidden = states.get((block, index), self._stream.device)
                states.put((block + 1, index), self._stream.run(block, hidden, batch))
                if observed is not None:
                    states.drop((block, index))

    def _differentiate(self, batches: Sequence[Batch], states: HiddenStates) -> None:
        """The gradient of every sequence's loss at the output of the last block."""
        stream, last = self._stream, self._stream.num_blocks
        with stream.resident(None), stream.timing("backward"):
            for index in range(len(batches)):
                final = states.get((last, index), stream.device).detach().requires_grad_()
                with stream.replaying(lambda key, final=final: final):  # type: ignore[misc]
                    loss = self._task.likelihood_loss(stream.model, "statistics", index)
                (gradient,) = torch.autograd.grad(loss, final)
                states.put((_GRADIENT, index), gradient)
        # the blocks' second run, and the backward
        tokens = self._total * self._task.tokens_per_sequence
        self._meter.add("statistics", tokens)
        self._meter.add("statistics_backward", 2 * tokens)

    def _backward(
        self, block: int, batches: Sequence[Batch], states: HiddenStates, observed: Observation
    ) -> None:
        """Run a resident block again, and turn its outputs' gradients into its inputs'."""
        device, handed_on = self._stream.device, block > 0 or None in self._units
        with self._stream.timing("backward"), observed.listening():
            for index, batch in enumerate(batches):
                hidden = states.get((block, index), device).detach().requires_grad_(handed_on)
                output = self._stream.run(block, hidden, batch)
                if output.requires_grad:
                    output.backward(states.get((_GRADIENT, index), device))  # type: ignore[no-untyped-call]
                if hidden.grad is not None:
                    states.put((_GRADIENT, index), hidden.grad)
                states.drop((block, index))

    def _around(
        self, batches: Sequence[Batch], states: HiddenStates, observed: Observation
    ) -> None:
        """Observe what is around the blocks: one backward from the loss and from the front."""
        stream, last = self._stream, self._stream.num_blocks
        with stream.timing("backward"), observed.listening():
            for index in range(len(batches)):
                final = states.get((last, index), stream.device)
                with stream.replaying(lambda key, final=final: final) as fronts:  # type: ignore[misc]
                    loss = self._task.likelihood_loss(stream.model, "statistics", index)
                roots: list[tuple[Tensor, Tensor | None]] = []
                if loss.requires_grad:
                    roots.append((loss, None))
                if fronts[-1].requires_grad:
                    roots.append((fronts[-1], states.get((_GRADIENT, index), stream.device)))
                if roots:
                    tensors, gradients = zip(*roots, strict=True)
                    torch.autograd.backward(tensors, gradients)

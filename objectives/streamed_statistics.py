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
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from objectives.hidden_states import DEFAULT_HIDDEN_BYTES, HiddenStates
from objectives.statistics import KINDS, Observation, Progress, Text, text_of
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


class _Sequence(NamedTuple):
    """One sequence on its way through the blocks: its number, its split, its loss, its batch."""

    place: int
    split: str
    call: Callable[[], Tensor]
    batch: Batch


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
        stream.round_fixed(space.fixed)

    def visit(
        self,
        needs: Collection[str],
        act: Callable[[Visit], None],
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Act on every part that holds units, while it is resident and its statistics are known.

        Blocks come in order, or in reverse where gradients are needed; what is around them comes
        last.

        Args:
            needs: Any of ``second_moment``, ``hessian``, ``fisher``, ``weighted_inputs``; with none
                of them the model is read but not run.
            act: What to do with each part; statistics are dropped when it returns.
            progress: Told (passes over a part done, in all).

        Raises:
            ValueError: An unknown kind of statistics.
        """
        if unknown := set(needs) - KINDS:
            raise ValueError(f"unknown statistics {sorted(unknown)}; known: {sorted(KINDS)}")
        stream, ends = self._stream, None in self._units
        text = text_of(self._task, needs)
        backward = bool({"fisher", "weighted_inputs"} & set(needs))
        passes = stream.num_blocks * (2 if backward else 1) + ends
        done = iter(range(1, passes + 1))

        def observation(part: Part) -> Observation:
            units = self._units.get(part, [])
            members = [member for unit in units for member in self._space.units[unit].members]
            return Observation(stream.model, members, needs, text)

        def told(part: Part, observed: Observation | None) -> None:
            if observed is not None and part in self._units:
                found = observed.statistics(self._task.tokens_per_sequence)
                act(Visit(part, self._units[part], found))
            progress(next(done), passes)

        with HiddenStates(most_bytes=self._hidden_bytes) as states:
            sequences = self._enter(text, states) if text else []
            for block in range(stream.num_blocks):
                observed = None if backward else observation(block)
                with stream.resident(block):
                    self._forward(block, sequences, states, observed)
                    told(block, observed)
            if backward:
                self._differentiate(sequences, states)
                for block in reversed(range(stream.num_blocks)):
                    observed = observation(block)
                    with stream.resident(block):
                        self._backward(block, sequences, states, observed)
                        told(block, observed)
            if ends:
                observed = observation(None)
                with stream.resident(None):
                    self._around(sequences, states, observed)
                    told(None, observed)

    def _enter(self, text: Text, states: HiddenStates) -> list[_Sequence]:
        """All sequences; what enters the first block."""
        stream, sequences = self._stream, list[_Sequence]()
        with stream.resident(None), stream.timing("front"), torch.no_grad():
            for split, indices in text.items():
                for index in indices:
                    call = partial(self._task.likelihood_loss, stream.model, split, index)
                    same = sequences[0].batch if sequences else None
                    batch, hidden = stream.capture(call, same)
                    states.put((0, len(sequences)), hidden)
                    sequences.append(_Sequence(len(sequences), split, call, batch))
        self._meter.add("statistics", len(sequences) * self._task.tokens_per_sequence)
        return sequences

    def _forward(
        self,
        block: int,
        sequences: Sequence[_Sequence],
        states: HiddenStates,
        observed: Observation | None,
    ) -> None:
        """Run a resident block, observed or (where it will be run again) keeping what entered."""
        for split, group in groupby(sequences, key=attrgetter("split")):
            listening = torch.no_grad() if observed is None else observed.listening(split)
            with self._stream.timing("forward"), listening:
                for place, _, _, batch in group:
                    hidden = states.get((block, place), self._stream.device)
                    states.put((block + 1, place), self._stream.run(block, hidden, batch))
                    if observed is not None:
                        states.drop((block, place))

    def _differentiate(self, sequences: Sequence[_Sequence], states: HiddenStates) -> None:
        """The gradient of every sequence's loss at the output of the last block."""
        stream, last = self._stream, self._stream.num_blocks
        with stream.resident(None), stream.timing("backward"):
            for place, _, call, _ in sequences:
                final = states.get((last, place), stream.device).detach().requires_grad_()
                with stream.replaying(lambda key, final=final: final):  # type: ignore[misc]
                    loss = call()
                (gradient,) = torch.autograd.grad(loss, final)
                states.put((_GRADIENT, place), gradient)
        # the blocks' second run, and the backward
        tokens = len(sequences) * self._task.tokens_per_sequence
        self._meter.add("statistics", tokens)
        self._meter.add("statistics_backward", 2 * tokens)

    def _backward(
        self,
        block: int,
        sequences: Sequence[_Sequence],
        states: HiddenStates,
        observed: Observation,
    ) -> None:
        """Run a resident block again, and turn its outputs' gradients into its inputs'."""
        device, handed_on = self._stream.device, block > 0 or None in self._units
        for split, group in groupby(sequences, key=attrgetter("split")):
            with self._stream.timing("backward"), observed.listening(split):
                for place, _, _, batch in group:
                    hidden = states.get((block, place), device).detach().requires_grad_(handed_on)
                    output = self._stream.run(block, hidden, batch)
                    if output.requires_grad:
                        gradient = states.get((_GRADIENT, place), device)
                        output.backward(gradient)  # type: ignore[no-untyped-call]
                    if hidden.grad is not None:
                        states.put((_GRADIENT, place), hidden.grad)
                    states.drop((block, place))

    def _around(
        self, sequences: Sequence[_Sequence], states: HiddenStates, observed: Observation
    ) -> None:
        """Observe what is around the blocks: one backward from the loss and from the front."""
        stream, last = self._stream, self._stream.num_blocks
        for split, group in groupby(sequences, key=attrgetter("split")):
            with stream.timing("backward"), observed.listening(split):
                for place, _, call, _ in group:
                    final = states.get((last, place), stream.device)
                    with stream.replaying(lambda key, final=final: final) as fronts:  # type: ignore[misc]
                        loss = call()
                    roots: list[tuple[Tensor, Tensor | None]] = []
                    if loss.requires_grad:
                        roots.append((loss, None))
                    if fronts[-1].requires_grad:
                        gradient = states.get((_GRADIENT, place), stream.device)
                        roots.append((fronts[-1], gradient))
                    if roots:
                        tensors, gradients = zip(*roots, strict=True)
                        torch.autograd.backward(tensors, gradients)

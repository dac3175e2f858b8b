"""A language model larger than memory: its blocks come from the checkpoint one after another.

The problem: statistics, losses and loss tables need every block of a model, but never two at a
time. Here the model has no weights (they are on the meta device) except those of the part that is
``resident``: one block, or everything around the blocks (embeddings, final norm, head). The model's
own forward still decides what its blocks are handed (masks, positions, rotary embeddings): it runs
once per batch with blocks that only take note (:meth:`StreamedModel.capture`), and once more behind
them, with blocks that hand over what was computed (:meth:`StreamedModel.replaying`), so that any
task measures a streamed model as it does any other.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from objectives.checkpoint import Checkpoint, empty_model, find_decoder
from objectives.forwards import replaced_forwards
from objectives.loading import (
    find_model,
    hash_files,
    read_config,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from objectives.tensor_file import STORED_TYPES
from search_spaces.space import SearchSpace, Unit
from search_spaces.storage import StoredTensor

Part = int | None
"""A block's index, or ``None`` for everything around the blocks."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and by name."""

_PLAIN = (Tensor, str, int, float, bool, torch.dtype, torch.device, type(None))


class _Stop(Exception):  # noqa: N818  # not an error: the model has told what it was run for
    """Leaves a model's forward."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model on its way through the blocks.

    Attributes:
        key: Digest of the tokens that the model was given.
        num_sequences: How many sequences they are.
        arguments: For each block what it is handed besides hidden states.
    """

    key: bytes
    num_sequences: int
    arguments: tuple[Arguments, ...]


class StreamedModel:
    """A causal language model without weights, and the checkpoint that they come from.

    Args:
        name: A folder, an embedded model or a hub id, as :func:`objectives.loading.load_model`.
        dtype: ``float32``, ``bfloat16`` or ``auto``.
        device: Where the resident part is: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    Attributes:
        model: On the meta device but for its buffers and what is resident.
        folder: Of the checkpoint.
        device: Of the resident part.
        dtype: Of its parameters.
        seconds: Spent by kind of work; ``read`` is materialising weights.

    Raises:
        ValueError: As :func:`objectives.loading.load_model`; or its decoder is not one list of
            blocks, or the checkpoint holds its tensors under names that only a full load resolves.
    """

    def __init__(self, name: str, *, dtype: str = "auto", device: str = "auto") -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.folder = find_model(name)
        self.config = read_config(self.folder)
        self.model = empty_model(self.folder, self.dtype)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._path, self._blocks = find_decoder(self.model)
        self._checkpoint = Checkpoint(self.folder, self.model)
        self._rounding: dict[str, torch.dtype] = {}
        self._part_of: dict[str, Part] = {}
        for names in self._checkpoint.tied.values():
            parts = {self.part(name) for name in names}
            if len(parts) > 1:
                raise ValueError(f"{self._label}: {names[0]} is shared by blocks: not streamable")
            self._part_of[names[0]] = parts.pop()
        self._outputs_are_tuples: bool | None = None
        self._key = b""
        self._load_buffers()

    @property
    def num_blocks(self) -> int:
        """Blocks of the decoder."""
        return len(self._blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What can be resident: the blocks in order, then everything around them."""
        return (*range(self.num_blocks), None)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the stored weights, equal to that of the loaded model."""
        return hash_files(weight_files(self.folder), self.model)

    def part(self, name: str) -> Part:
        """Which part a module or parameter belongs to."""
        if not name.startswith(f"{self._path}."):
            return None
        return int(name[len(self._path) + 1 :].partition(".")[0])

    def units_of(self, space: SearchSpace) -> dict[Part, list[int]]:
        """Indices of a space's units by the part that holds them.

        Raises:
            ValueError: A unit is a cache, or has members in several parts.
        """
        found: dict[Part, list[int]] = {}
        for index, unit in enumerate(space.units):
            found.setdefault(self._part_of_unit(unit), []).append(index)
        return found

    def round_fixed(self, fixed: Sequence[StoredTensor]) -> None:
        """From now on round tensors that are not searched to the types they are stored in."""
        aliases = self._checkpoint.aliases
        self._rounding = {
            aliases[tensor.name]: STORED_TYPES[tensor.dtype]
            for tensor in fixed
            if tensor.name in aliases
        }

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the time of a block of code to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[what] += time.perf_counter() - start

    @contextmanager
    def resident(self, part: Part) -> Iterator[None]:
        """Read the weights of one part from the checkpoint, and drop them afterwards."""
        names = [name for name, owner in self._part_of.items() if owner == part]
        try:
            with self.timing("read"):
                for name, tensor in self._checkpoint.read(names):
                    self._put(name, self._own(name, tensor))
                    del tensor  # its pages count as long as it lives
            yield
        finally:
            for name in names:
                self._put(name, self._checkpoint.empty[name])

    def capture(
        self, call: Callable[[], object], known: Batch | None = None
    ) -> tuple[Batch, Tensor]:
        """Run the model up to its last block, whose work and that of all others is left out.

        Everything around the blocks must be resident.

        Args:
            call: Calls the model; is left by an exception at the first call.
            known: An earlier batch: arguments that are equal are shared with it, not kept twice.

        Returns:
            The batch, and the hidden states (sequences, length, width) that enter the first block.

        Raises:
            ValueError: More than hidden states go from block to block.
        """
        if self._outputs_are_tuples is None:
            first, hidden = self._captured(call, 1)
            args, kwargs = first.arguments[0]
            with self.resident(0), torch.no_grad():
                output = self._blocks[0](hidden, *args, **kwargs)
            self._outputs_are_tuples = isinstance(output, tuple)
        found, hidden = self._captured(call, self.num_blocks)
        return (found if known is None else _sharing(found, known)), hidden

    def run(self, block: int, hidden: Tensor, batch: Batch) -> Tensor:
        """What a resident block makes of the hidden states of a batch."""
        args, kwargs = batch.arguments[block]
        output = self._blocks[block](hidden, *args, **kwargs)
        made: Tensor = output[0] if self._outputs_are_tuples else output
        return made

    @contextmanager
    def replaying(self, final: Callable[[bytes], Tensor]) -> Iterator[list[Tensor]]:
        """Inside, the model hands over known hidden states in place of running its blocks.

        Everything around the blocks must be resident.

        Args:
            final: What leaves the last block, by the key of the batch.

        Yields:
            What entered the first block in each call of the model, as the calls come.
        """
        fronts: list[Tensor] = []

        def stub(index: int, hidden: Tensor, args: object, kwargs: object) -> Tensor:
            del args, kwargs
            if index == 0:
                fronts.append(hidden)
            return final(self._key) if index == self.num_blocks - 1 else hidden

        with self._stubs(stub):
            yield fronts

    def calls_model(self, call: Callable[[], object]) -> bool:
        """Whether a call would run the model; if so it is left before the model does anything."""

        def stop(module: nn.Module, args: object) -> None:
            del module, args
            raise _Stop

        handle = self.model.register_forward_pre_hook(stop)
        try:
            call()
        except _Stop:
            return True
        finally:
            handle.remove()
        return False

    @property
    def _label(self) -> str:
        return type(self.model).__name__

    def _part_of_unit(self, unit: Unit) -> Part:
        if unit.is_cache:
            raise ValueError(
                f"{unit.name} is a cache, which is measured on the whole model: do not stream it"
            )
        parts = {self.part(member.module) for member in unit.members}
        if len(parts) > 1:
            raise ValueError(f"unit {unit.name!r} is spread over blocks, which are streamed singly")
        return parts.pop()

    def _own(self, name: str, stored: Tensor) -> nn.Parameter:
        """A stored tensor as the model holds it: rounded where it is fixed, on the device."""
        own = stored.to(self.device, self.dtype, copy=True)
        if name in self._rounding:
            own = own.to(self._rounding[name]).to(self.dtype)
        return nn.Parameter(own, requires_grad=False)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        """Let all modules that share a parameter have another one."""
        for alias in self._checkpoint.tied[name]:
            path, _, leaf = alias.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, parameter)

    def _load_buffers(self) -> None:
        """Saved buffers from the checkpoint, computed ones as they are; all on the device."""
        stored = dict(self._checkpoint.read(self._checkpoint.buffers))
        for name, buffer in list(self.model.named_buffers()):
            path, _, leaf = name.rpartition(".")
            tensor = stored.get(name, buffer).to(self.device, buffer.dtype, copy=True)
            self.model.get_submodule(path)._buffers[leaf] = tensor

    def _captured(self, call: Callable[[], object], num_blocks: int) -> tuple[Batch, Tensor]:
        """Take note of what the first blocks are handed."""
        hiddens: list[Tensor] = []
        arguments: list[Arguments] = []

        def stub(
            index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Tensor:
            if index != len(hiddens) or (hiddens and hidden is not hiddens[0]):
                raise ValueError(
                    f"{self._label} does more between its blocks than hand over hidden states: "
                    "it cannot be streamed"
                )
            if not all(map(_is_plain, (*args, *kwargs.values()))):
                raise ValueError(f"the blocks of {self._label} share state: it cannot be streamed")
            hiddens.append(hidden)
            arguments.append((args, kwargs))
            if len(hiddens) == num_blocks:
                raise _Stop
            return hidden

        try:
            with self._stubs(stub):
                call()
        except _Stop:
            hidden = hiddens[0].detach()
            return Batch(self._key, len(hidden), tuple(arguments)), hidden
        raise ValueError(f"{self._label} does not run all of its blocks: it cannot be streamed")

    @contextmanager
    def _stubs(
        self, stub: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
    ) -> Iterator[None]:
        """Give every block another forward: (index, hidden states, the rest) -> hidden states."""

        def forward(index: int) -> Callable[..., Any]:
            def _run(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden = stub(index, args[0], args[1:], kwargs)
                else:
                    named = {name: v for name, v in kwargs.items() if name != "hidden_states"}
                    hidden = stub(index, kwargs["hidden_states"], (), named)
                return (hidden,) if self._outputs_are_tuples else hidden

            return _run

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            tokens: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self._key = hashlib.sha256(tokens.cpu().numpy().tobytes()).digest()

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with replaced_forwards(self._blocks, map(forward, range(self.num_blocks))):
                yield
        finally:
            handle.remove()


def _is_plain(value: Any) -> bool:
    """Whether an argument holds nothing that blocks could write to for each other."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _sharing(batch: Batch, known: Batch) -> Batch:
    """The same batch with the tensors of a known one in place of equal ones of its own."""
    seen: dict[int, Tensor] = {}

    def shared(own: Any, other: Any) -> Any:
        if isinstance(own, Tensor):
            if id(own) not in seen:
                alike = (
                    isinstance(other, Tensor)
                    and own.dtype == other.dtype
                    and own.shape == other.shape
                    and torch.equal(own, other)
                )
                seen[id(own)] = other if alike else own
            return seen[id(own)]
        if type(own) in (tuple, list) and type(other) is type(own) and len(other) == len(own):
            return type(own)(shared(a, b) for a, b in zip(own, other, strict=True))
        return own

    arguments = []
    for (args, kwargs), (known_args, known_kwargs) in zip(
        batch.arguments, known.arguments, strict=True
    ):
        named = {name: shared(value, known_kwargs.get(name)) for name, value in kwargs.items()}
        arguments.append((shared(args, known_args), named))
    return replace(batch, arguments=tuple(arguments))


def part_of_space(space: SearchSpace, units: Sequence[int]) -> SearchSpace:
    """The units of one part with their menus, as a space of its own."""
    return replace(
        space,
        units=tuple(space.units[unit] for unit in units),
        menus=tuple(space.menus[unit] for unit in units),
        fixed=(),
    )

"""Prefix reuse: run only the blocks after the first one that differs from what was measured before.

The problem: a search changes a few units at a time, and a decoder that differs first in block k
computes blocks 0 to k-1 exactly as another candidate did on the same tokens. The outputs of blocks
are kept by what they depend on (the inputs of the model, and the options of every unit up to that
block); a measurement starts at the deepest block boundary that is known. The model's own forward
runs as always (masks, positions, final norm, head): only the blocks before the boundary hand over
the kept output instead of computing it, so that the numbers are those of a full forward, bit by
bit. That is checked once per model on the first batch; a model whose blocks pass more than their
outputs to each other fails the check and is measured without reuse.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from objectives.forwards import replaced_forwards
from search_spaces.space import Assignment, SearchSpace

logger = logging.getLogger(__name__)

DEFAULT_PREFIX_BYTES = 2**30
_LEAST_PATHS = 4  # as many candidates' boundaries must fit the cap, or they are thinned

Key = tuple[bytes, bytes]  # of the model's inputs, of the options before a boundary


def find_blocks(model: nn.Module, space: SearchSpace) -> tuple[nn.Module, ...]:
    """The stack of blocks that all searched units with a depth live in, in order; or none.

    Empty where units live in several stacks (an encoder and a decoder) or in none.
    """
    stems = {
        ".".join(path[: path.index(str(unit.depth))])
        for unit in space.units
        for member in unit.members
        if unit.depth is not None and str(unit.depth) in (path := member.module.split("."))
    }
    if len(stems) != 1:
        return ()
    stack = model.get_submodule(stems.pop())
    return tuple(stack) if isinstance(stack, nn.ModuleList) else ()


class _Boundaries:
    """Outputs of blocks under a cap of bytes; what one measurement kept is dropped together.

    Least recently used measurements go first, and using any output of one keeps all of it: the
    incumbent's boundaries stay as long as its offspring start from any of them.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._states: dict[Key, tuple[Any, int]] = {}
        self._paths: OrderedDict[int, dict[Key, int]] = OrderedDict()
        self._held_bytes = 0
        self._opened = 0

    def open_path(self) -> int:
        """A number for what the next measurement keeps."""
        self._opened += 1
        return self._opened

    def find(self, keys: Sequence[Key]) -> tuple[int, Any]:
        """The deepest known boundary: how many blocks lie before it, and the output there."""
        for depth in range(len(keys), 0, -1):
            if keys[depth - 1] in self._states:
                state, path = self._states[keys[depth - 1]]
                self._paths.move_to_end(path)
                return depth, state
        return 0, None

    def keep(self, path: int, key: Key, state: Any) -> None:
        """Keep one output, dropping older measurements where there is no room."""
        size = _num_bytes(state)
        while self._held_bytes + size > self.most_bytes:
            oldest = next(iter(self._paths), path)
            if oldest == path:
                return
            self._drop(oldest)
        self._states[key] = (state, path)
        self._paths.setdefault(path, {})[key] = size
        self._held_bytes += size

    def clear(self) -> None:
        """Forget everything."""
        for path in list(self._paths):
            self._drop(path)

    def _drop(self, path: int) -> None:
        for key, size in self._paths.pop(path).items():
            del self._states[key]
            self._held_bytes -= size


@dataclass
class Work:
    """What a measurement cost.

    Attributes:
        num_run: Tokens that went through blocks, summed over blocks.
        num_full: What it would have been had every block run.
        num_checked: Of the passes that checked, once, whether the model allows reuse.
    """

    num_run: int = 0
    num_full: int = 0
    num_checked: int = 0

    @property
    def share(self) -> float:
        """Of the blocks' work that had to be done; 1 where nothing is known of the blocks."""
        return self.num_run / self.num_full if self.num_full else 1.0


@dataclass
class _Pass:
    """One forward pass: where it starts, from what, and what it keeps."""

    start: int = 0
    state: Any = None
    keys: Sequence[Key] = field(default_factory=list)
    path: int = 0


class PrefixReuse:
    """Runs a model's blocks only from where a measurement leaves what is known.

    Args:
        model: Whose weights the assignment's options are swapped into before a measurement.
        space: Units with their depths.
        most_bytes: Cap of what is kept; 0 keeps nothing. Beyond it boundaries are thinned to every
            second, third ... block.
    """

    def __init__(
        self, model: nn.Module, space: SearchSpace, *, most_bytes: int = DEFAULT_PREFIX_BYTES
    ) -> None:
        self._model = model
        self._blocks = find_blocks(model, space)
        self._depths = [-1 if unit.depth is None else unit.depth for unit in space.units]
        self._boundaries = _Boundaries(most_bytes)
        self._checked = False
        self._enabled = most_bytes > 0 and bool(self._blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks of the stack; 0 where there is none to count."""
        return len(self._blocks)

    def clear(self) -> None:
        """Forget what is kept: the weights of some option have changed."""
        self._boundaries.clear()

    @contextmanager
    def measuring(self, assignment: Assignment) -> Iterator[Work]:
        """Forward passes inside start from what is known of the assignment, and add to it.

        The assignment must be swapped in. Gradients must be off.
        """
        work, current = Work(), _Pass()
        if not self._blocks:
            yield work
            return
        prefixes = self._prefixes(assignment)

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            current.start, current.state, current.keys = 0, None, []
            inputs = _digest(args, kwargs) if self._enabled else None
            if inputs is None:
                return
            keys = [(inputs, prefix) for prefix in prefixes]
            if not self._checked:
                ran, full = work.num_run, work.num_full
                self._check(args, kwargs, current)
                work.num_checked += work.num_run - ran
                work.num_run, work.num_full = ran, full
            if self._enabled:
                current.start, current.state = self._boundaries.find(keys)
                current.keys, current.path = keys, self._boundaries.open_path()

        runs = [partial(self._run, current, work, i, b.forward) for i, b in enumerate(self._blocks)]
        with replaced_forwards(self._blocks, runs):
            # first of all hooks, so that the inputs are the task's own
            handle = self._model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            try:
                yield work
            finally:
                handle.remove()

    def _run(
        self,
        current: _Pass,
        work: Work,
        index: int,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """One block: what is known, or its own forward, kept where there is room."""
        known = index < current.start
        output = current.state if known else forward(*args, **kwargs)
        num_tokens = _first_tensor(output).shape[:-1].numel()
        work.num_full += num_tokens
        if known:
            return output
        work.num_run += num_tokens
        if current.keys and self._is_kept(index, output):
            self._boundaries.keep(current.path, current.keys[index], output)
        return output

    def _is_kept(self, index: int, output: Any) -> bool:
        """Every boundary if several candidates fit the cap, else every second, third ... one."""
        whole = len(self._blocks) * _num_bytes(output)
        stride = -(-whole * _LEAST_PATHS // self._boundaries.most_bytes)
        return (index + 1) % max(1, stride) == 0

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], current: _Pass) -> None:
        """Compare a full forward with one that starts in the middle, once per model.

        Other inputs come between them: what blocks remember outside their outputs is stale then.
        """
        self._checked = True
        middle = (len(self._blocks) + 1) // 2
        seen: list[Any] = []
        handle = self._blocks[middle - 1].register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        try:
            own = self._model.forward(*args, **kwargs)
        finally:
            handle.remove()
        self._model.forward(*_reversed(args), **_reversed(kwargs))
        current.start, current.state = middle, seen[0]
        again = self._model.forward(*args, **kwargs)
        current.start, current.state = 0, None
        if not _same(own, again):
            logger.warning("the blocks of this model share more than their outputs: no reuse")
            self._enabled = False

    def _prefixes(self, assignment: Assignment) -> list[bytes]:
        """For each block a digest of the options of every unit up to and including it."""
        by_depth: dict[int, list[tuple[int, int]]] = {}
        for unit, (depth, option) in enumerate(zip(self._depths, assignment, strict=True)):
            by_depth.setdefault(depth, []).append((unit, option))
        digest = hashlib.blake2b(repr(by_depth.get(-1)).encode(), digest_size=16)
        prefixes = []
        for index in range(len(self._blocks)):
            digest.update(repr(by_depth.get(index)).encode())
            prefixes.append(digest.digest())
        return prefixes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _reversed(value: Any) -> Any:
    """The same nested values with every tensor reversed along its last dimension."""
    if isinstance(value, Tensor):
        return value.flip(-1) if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _reversed(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_reversed(item) for item in value)
    return value


def _first_tensor(output: Any) -> Tensor:
    return next(_tensors(output))


def _num_bytes(output: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(output))


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two outputs of a model hold the same tensors, bit by bit."""
    pairs = zip(_tensors(ours), _tensors(theirs), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _digest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
    """Of what a model is given; ``None`` where something in it cannot be compared by value."""
    digest = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> bool:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
            return True
        if isinstance(value, Mapping):
            return all(feed(f"{key}") and feed(value[key]) for key in value)
        if isinstance(value, tuple | list):
            digest.update(b"(%d" % len(value))
            return all(feed(item) for item in value)
        digest.update(repr(value).encode() + b";")
        return value is None or isinstance(value, str | int | float | bool)

    return digest.digest() if feed([list(args), dict(kwargs)]) else None

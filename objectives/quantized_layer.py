"""A cache layer for ``transformers`` that stores quantized keys and values.

The problem: attention must read back what was stored, in a forward pass over a whole text as well
as token by token, or the loss of a quantized cache does not show. In one pass over a text the scale
of a key's group has seen all tokens of its group, later ones too, as at the prefill of KIVI's own
implementation; token by token, the last group's scale has seen only what came so far. Either way
every query reads quantized keys and values, its own included, except for the latest ``residual``
tokens of what is cached: in one pass those are the text's last, so a residual hardly shows there
and the loss is overstated, while token by token every query sees its own latest tokens dense.
``transformers``' own quantized layers return the dense states of a prefill, so that measuring one
pass with them would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from search_spaces.operators import KVQuantize
from search_spaces.operators.kv_cache import KEYS, VALUES

Watch = Callable[[int, str, Tensor, Tensor], None]
"""Told (layer, keys or values, states as computed, the same as read back), the last two as
(batch, tokens, channels)."""

LayerChoice = Mapping[str, KVQuantize]
"""The operator of a layer's ``keys`` and ``values``; a missing one stays dense."""


class _States:
    """The keys or values of one layer, as (batch, tokens, channels).

    Whole groups of tokens are closed: packed for good. The tokens after them are open: they are
    kept as they came and quantized anew at each reading, since the group is still growing.
    """

    def __init__(self, part: str, operator: KVQuantize | None, *, piecewise: bool) -> None:
        self._part = part
        self._operator = operator
        self._piecewise = piecewise
        self._closed: list[tuple[int, dict[str, Tensor]]] = []
        self._open: Tensor | None = None
        self._first = 0  # place in the text of the first token that is still stored

    def append(self, states: Tensor) -> None:
        """Store (batch, tokens, channels) states behind the others."""
        self._open = states if self._open is None else torch.cat([self._open, states], 1)
        if self._operator is None:
            return
        group = self._operator.group_size
        whole = max(self._open.shape[1] - self._operator.residual, 0) // group * group
        if whole:
            # A sliding window forgets group by group, so it must be stored so.
            for piece in torch.split(self._open[:, :whole], group if self._piecewise else whole, 1):
                self._closed.append((piece.shape[1], self._pure.pack_part(self._part, piece)))
            self._open = self._open[:, whole:].clone()

    def read(self, first: int) -> Tensor:
        """(batch, tokens, channels) from a place in the text on, as attention gets to see it."""
        assert self._open is not None
        batch, _, channels = self._open.shape
        parts = [
            self._pure.unpack_part(self._part, packed, (batch, tokens, channels)).to(self._open)
            for tokens, packed in self._closed
        ]
        parts.append(self._read_open())
        return torch.cat(parts, 1)[:, first - self._first :]

    def forget(self, before: int) -> None:
        """Drop what lies before a place in the text, as far as whole pieces do."""
        while self._closed and self._first + self._closed[0][0] <= before:
            self._first += self._closed.pop(0)[0]
        if self._operator is None and self._open is not None and before > self._first:
            self._open = self._open[:, before - self._first :].clone()
            self._first = before

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of every stored tensor."""
        self._closed = [
            (tokens, {name: change(tensor) for name, tensor in packed.items()})
            for tokens, packed in self._closed
        ]
        self._open = None if self._open is None else change(self._open)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored at the moment, open tokens included."""
        tensors = [tensor for _, packed in self._closed for tensor in packed.values()]
        return sum(t.nbytes for t in tensors) + (0 if self._open is None else self._open.nbytes)

    @property
    def _pure(self) -> KVQuantize:
        """The operator without its residual, which is what is open."""
        assert self._operator is not None
        return replace(self._operator, residual=0)

    def _read_open(self) -> Tensor:
        assert self._open is not None
        if self._operator is None:
            return self._open
        coded = self._open.shape[1] - self._operator.residual
        if coded <= 0:
            return self._open
        packed = self._pure.pack_part(self._part, self._open[:, :coded])
        shape = (self._open.shape[0], coded, self._open.shape[2])
        read = self._pure.unpack_part(self._part, packed, shape).to(self._open)
        return torch.cat([read, self._open[:, coded:]], 1)


class QuantizedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a ``transformers`` cache that stores quantized keys and values.

    Memory is that of the operators' stored tensors, plus at most ``group_size + residual`` tokens
    as they came. Tokens cannot be taken back (no assisted decoding): their groups are closed.

    Args:
        choice: The operators of keys and values.
        window: Tokens that a sliding window sees, or ``None``.
        watch: Told what is stored and read back, as :data:`Watch` without the layer.
    """

    is_croppable = False

    def __init__(
        self,
        choice: LayerChoice,
        *,
        window: int | None = None,
        watch: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self._choice = dict(choice)
        self._window = window
        self._watch = watch
        self._parts = self._fresh()
        self._seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""
        del key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object
    ) -> tuple[Tensor, Tensor]:
        """Store new (batch, heads, tokens, width) states; all that attention sees, read back."""
        del arguments
        self.is_initialized = True
        first = self._first_visible
        found = [
            self._through(part, states, first)
            for part, states in ((KEYS, key_states), (VALUES, value_states))
        ]
        self._seen += key_states.shape[2]
        for part in self._parts.values():
            part.forget(self._first_visible)
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next update returns, and the place in the text of the first."""
        return self._seen - self._first_visible + query_length, self._first_visible

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._seen

    def get_max_length(self) -> int:
        """The window, or -1 without one."""
        return -1 if self._window is None else self._window

    @property
    def nbytes(self) -> int:
        """Bytes that are stored at the moment, open tokens included."""
        return sum(part.nbytes for part in self._parts.values())

    def reset(self) -> None:
        """Forget everything."""
        self._parts = self._fresh()
        self._seen = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, except for nothing.

        Raises:
            ValueError: Tokens cannot be taken out of closed groups.
        """
        if tokens_to_remove:
            raise ValueError("a quantized cache cannot take tokens back: their groups are closed")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of the batch in another order, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch."""
        for part in self._parts.values():
            part.over_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        for part in self._parts.values():
            part.over_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @property
    def _first_visible(self) -> int:
        """Place in the text of the first token that the next query may attend to."""
        return 0 if self._window is None else max(self._seen - self._window + 1, 0)

    def _fresh(self) -> dict[str, _States]:
        return {
            part: _States(part, self._choice.get(part), piecewise=self.is_sliding)
            for part in (KEYS, VALUES)
        }

    def _through(self, part: str, states: Tensor, first: int) -> Tensor:
        _, heads, tokens, width = states.shape
        flat = states.transpose(1, 2).flatten(2)
        stored = self._parts[part]
        stored.append(flat)
        read = stored.read(first)
        if self._watch is not None:
            self._watch(part, flat, read[:, -tokens:])
        return read.reshape(len(read), -1, heads, width).transpose(1, 2).contiguous()


def quantized_cache(
    config: Any, layers: Mapping[int, LayerChoice], *, watch: Watch | None = None
) -> Cache:
    """An empty cache for a model of ``transformers``, some of whose layers are quantized.

    Args:
        config: The model's configuration.
        layers: By index of the layer; the others stay dense.
        watch: Told what the quantized layers store and read back.

    Raises:
        ValueError: The model has no such layer, or it caches something else than keys and values.
    """
    cache = DynamicCache(config=config)
    for index, choice in layers.items():
        if not 0 <= index < len(cache.layers):
            raise ValueError(f"the model has {len(cache.layers)} layers, none of index {index}")
        dense = cache.layers[index]
        if type(dense) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"layer {index} keeps a {type(dense).__name__}: it cannot be quantized"
            )
        window = getattr(dense, "sliding_window", None)
        told = None if watch is None else partial(watch, index)
        cache.layers[index] = QuantizedLayer(choice, window=window, watch=told)
    return cache

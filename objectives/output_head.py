"""The output head apart from the rest of a language model: logits of a few tokens at a time.

The problem: logits are vocabulary-sized, and a float32 copy of those of a batch fits in no cache.
The rest of the model runs once; the head is then applied to rows of its hidden states, so that no
more than a chunk of logits exists at a time. Models that process their logits further (a scale, a
soft cap) are noticed, and give their logits whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from objectives.forwards import replaced_forwards

_MOST_BYTES = 2**28  # of logits in the model's type: matrix products want many rows
_CACHE_BYTES = 3 * 2**19  # of their float32 copy on a CPU: what comes after wants few


class OutputHead:
    """Runs a language model up to its head.

    Args:
        model: A causal language model of ``transformers``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        find = getattr(model, "get_output_embeddings", None)
        self._head: nn.Module | None = find() if find is not None else None
        self._row_bytes: int | None = None  # of one token's logits, once known

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._model

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(batch, length, width) states, and what turns (rows, width) of them into logits.

        Where logits cannot be made row by row the states are the logits themselves.

        Args:
            tokens: (batch, length) int64.
        """
        inputs: dict[str, Any] = {
            "input_ids": tokens.to(next(self._model.parameters()).device),
            "use_cache": False,
        }
        if self._head is not None:
            before: list[Tensor] = []

            def pass_on(states: Tensor) -> Tensor:
                before.append(states)
                return states

            with replaced_forwards([self._head], [pass_on]):
                states: Tensor = self._model(**inputs).logits
            if before and _is_same(states, before[-1]):
                return before[-1], self._head
            self._head = None
        logits: Tensor = self._model(**inputs).logits
        return logits, lambda rows: rows

    def chunks(self, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Run the model, then hand out (rows of the flattened tokens, their logits), in order.

        Args:
            tokens: (batch, length) int64.
        """
        states, head = self.hidden(tokens)
        states = states.flatten(0, -2)
        if self._row_bytes is None:
            self._row_bytes = head(states[:1]).nbytes
        begin = 0
        for rows in torch.split(states, max(1, _MOST_BYTES // self._row_bytes)):
            logits = head(rows)
            yield slice(begin, begin + len(rows)), logits
            begin += len(rows)


def _is_same(output: Tensor, states: Tensor) -> bool:
    """Whether a model hands on what its head gave, be it a copy on the device of its inputs."""
    if output is states:
        return True
    moved = output.device != states.device and output.shape == states.shape
    return moved and torch.equal(output.to(states.device), states)


def log_normaliser(logits: Tensor) -> Tensor:
    """(rows,) float32 log-sum-exp of (rows, vocabulary) logits, without a float32 copy of all."""
    if logits.device.type != "cpu":
        return logits.float().logsumexp(-1)
    step = max(1, _CACHE_BYTES // (4 * logits.shape[-1]))
    return torch.cat([rows.float().logsumexp(-1) for rows in torch.split(logits, step)])


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, length, vocabulary) logits in one piece, with a graph where gradients are on."""
    device = next(model.parameters()).device
    output: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return output

"""What a model makes of a text inside: its last hidden states, or one embedding per text, as tasks.

The problem: a model whose users read its states (an encoder behind a search index, the backbone of
a classifier) has no next token to be right about. Here a compressed model is compared with the
dense one by the states themselves: their relative squared error, or the angle between mean-pooled
embeddings. Neither loss is in nats.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from objectives.calibration import Calibration, hash_tokens
from objectives.task import SequenceLosses
from objectives.tensor_file import write_tensors

REPRESENTATIONS = ("hidden_state", "embedding")


class RepresentationTask:
    """Distance of a model's last hidden states to those of the dense model, per sequence.

    ``hidden_state`` is the squared error over all states of a sequence, divided by their energy.
    ``embedding`` is one minus the cosine of the two mean-pooled states. Both are 0 for the dense
    model. Padding counts in neither.

    Args:
        calibration: The splits' token ids.
        masks: For each split (num_sequences, sequence_length), nonzero where there is text and not
            padding; ``None`` where all of it is text.
        objective: ``hidden_state`` or ``embedding``.
        batch_size: Sequences per forward pass.
        cache_folder: Where the dense model's states are kept between processes; ``None``: in memory
            only. States are kept in the model's dtype, pooled ones in float32.

    Raises:
        ValueError: An unknown objective, or masks that do not fit the tokens.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        masks: Mapping[str, Tensor] | None = None,
        objective: str = "hidden_state",
        batch_size: int = 4,
        cache_folder: Path | None = None,
    ) -> None:
        if objective not in REPRESENTATIONS:
            names = " or ".join(REPRESENTATIONS)
            raise ValueError(f"objective must be {names}, got {objective!r}")
        self.name = objective
        self.has_slopes = True
        self._splits: Mapping[str, Tensor] = calibration.splits
        self._masks = {} if masks is None else _checked(masks, self._splits)
        self._hashes = calibration.hashes
        self._batch_size = batch_size
        self._folder = cache_folder
        self._dense: dict[str, Tensor] = {}

    @property
    def tokens_per_sequence(self) -> int:
        """Length of every sequence, padding included."""
        return int(next(iter(self._splits.values())).shape[1])

    def num_sequences(self, split: str) -> int:
        """Sequences in a split."""
        return int(self._splits[split].shape[0])

    def prepare(self, model: nn.Module, split: str) -> int:
        """Keep the dense model's states of a split, from disk if there; returns tokens spent.

        The model must be dense when this is called.
        """
        if split in self._dense:
            return 0
        path = self._cache_path(split)
        if path is not None and path.exists():
            self._dense[split] = load_file(path)[split]
            return 0
        found = []
        with torch.inference_mode():
            for rows in torch.split(torch.arange(self.num_sequences(split)), self._batch_size):
                states, mask = self._states(model, split, rows)
                pooled = self.name == "embedding"
                found.append((_pooled(states, mask) if pooled else states).cpu())
        self._dense[split] = torch.cat(found).clone()  # outside: no inference tensor
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({split: self._dense[split]}, path, what="the dense model's states")
        return self._splits[split].numel()

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """The distance of each sequence; there is no cross-entropy beside it."""
        losses: list[float] = []
        with torch.inference_mode():
            for rows in torch.split(torch.tensor(indices), self._batch_size):
                losses += self._distances(model, split, rows).tolist()
        return SequenceLosses(losses)

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """A random projection of the states, scaled so that Fisher's estimate is of the distance.

        A squared distance to the model itself has no gradient. Its curvature is that of a Gaussian
        likelihood, whose empirical Fisher with sampled targets is the squared gradient of the
        states' projection on random signs: ``1/2 sum F dW^2`` is then the second-order estimate of
        the measured distance. The signs depend on split and index only.
        """
        states, mask = self._states(model, split, torch.tensor([index]))
        length = self.tokens_per_sequence
        if self.name == "embedding":
            vector = torch.nn.functional.normalize(_pooled(states, mask)[0], dim=-1)
            projection = (vector * _signs(vector, split, index)).sum()
            return projection / math.sqrt(length)
        vector = states[0].float() * mask[0]
        energy = vector.detach().square().sum()
        projection = (vector * _signs(vector, split, index)).sum()
        return projection * (2 / (length * energy)).sqrt()

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The measured distance of one sequence, with a graph."""
        return self._distances(model, split, torch.tensor([index]))[0]

    def _distances(self, model: nn.Module, split: str, rows: Tensor) -> Tensor:
        """(len(rows),) float32."""
        states, mask = self._states(model, split, rows)
        dense = self._dense[split][rows].to(states.device)
        if self.name == "embedding":
            return _angle(_pooled(states, mask), dense)
        return torch.stack(
            [
                _relative_error(own, reference, keep)
                for own, reference, keep in zip(states, dense, mask, strict=True)
            ]
        )

    def _states(self, model: nn.Module, split: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, width) last states, and (batch, length, 1) float32 1 where text is."""
        tokens = self._splits[split][rows]
        mask = self._masks[split][rows] if self._masks else None
        states = last_hidden_states(model, tokens, mask)
        weights = torch.ones_like(tokens) if mask is None else mask
        return states, weights[..., None].to(states.device, torch.float32)

    def _cache_path(self, split: str) -> Path | None:
        if self._folder is None:
            return None
        identity = self._hashes[split]
        if self._masks:
            both = f"{identity} {hash_tokens(self._masks[split])}"
            identity = hashlib.sha256(both.encode()).hexdigest()
        return self._folder / f"{self.name}-{split}-{identity[:16]}.safetensors"


def last_hidden_states(model: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, length, width) states after a model's last block and norm, before any head.

    The whole model is run, so that whatever is hooked to it takes part; the logits are not made
    where the model can leave them out.

    Args:
        model: A model of ``transformers``, with or without a head.
        tokens: (batch, length) int64.
        mask: (batch, length) int64, 0 at padding.

    Raises:
        ValueError: The model does not say what its last hidden states are.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
    if mask is not None:
        inputs["attention_mask"] = mask.to(device)
    known = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    inputs |= {name: value for name, value in wanted.items() if name in known}
    seen: list[Tensor | None] = []

    def see(module: nn.Module, args: object, output: object) -> None:
        del module, args
        seen.append(getattr(output, "last_hidden_state", None))

    body = getattr(model, "base_model", model)
    handle = body.register_forward_hook(see)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if not seen or seen[-1] is None:
        raise ValueError(
            f"{type(body).__name__} gives no last_hidden_state: hidden_state and embedding need a "
            "model of transformers; give any other its own loss"
        )
    return seen[-1]


def _checked(masks: Mapping[str, Tensor], splits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0 and 1 as int64, of the tokens' shapes, some text in every sequence."""
    if masks.keys() != splits.keys():
        raise ValueError(f"expected masks of {', '.join(splits)}, got {', '.join(masks) or 'none'}")
    found = {name: (masks[name] != 0).long().cpu() for name in splits}
    for name, mask in found.items():
        if mask.shape != splits[name].shape:
            expected, got = tuple(splits[name].shape), tuple(mask.shape)
            raise ValueError(f"mask of {name!r}: expected the tokens' shape {expected}, got {got}")
        if not mask.any(1).all():
            raise ValueError(f"mask of {name!r}: a sequence is nothing but padding")
    return found


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    """(batch, width) float32 mean of (batch, length, width) over the text."""
    return (states.float() * mask).sum(1) / mask.sum(1)


def _angle(own: Tensor, dense: Tensor) -> Tensor:
    """(batch,) one minus the cosine, as half a squared distance: exact for small angles."""
    normalize = torch.nn.functional.normalize
    return 0.5 * (normalize(own, dim=-1) - normalize(dense, dim=-1)).square().sum(-1)


def _relative_error(own: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
    """Squared error over energy of (length, width) states, one sequence at a time."""
    reference = dense.float() * mask
    return (own.float() * mask - reference).square().sum() / reference.square().sum()


def _signs(like: Tensor, split: str, index: int) -> Tensor:
    """Random signs of a tensor's shape: the same on every device and in every process."""
    seed = int.from_bytes(hashlib.sha256(f"{split} {index}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)

"""Causal language modelling as a task: KL to the dense model, cross-entropy beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from objectives.calibration import Calibration
from objectives.task import SequenceLosses
from objectives.teacher import TeacherCache, keep_top, kl_per_token
from objectives.tensor_file import write_tensors

DEFAULT_TOP_K = 256


class LanguageTask:
    """KL(dense || compressed) per token on token sequences.

    Args:
        calibration: The splits' token ids.
        top_k: Outcomes the teacher cache keeps per position; 0 keeps the vocabulary.
        batch_size: Sequences per forward pass.
        objective: ``kl``, or ``cross_entropy`` for its increase over the dense model's.
        cache_folder: Where teacher caches are kept between processes; ``None``: in memory only.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        top_k: int = DEFAULT_TOP_K,
        batch_size: int = 4,
        objective: str = "kl",
        cache_folder: Path | None = None,
    ) -> None:
        if objective not in ("kl", "cross_entropy"):
            raise ValueError(f"objective must be kl or cross_entropy, got {objective!r}")
        self.name = objective
        self._splits: Mapping[str, Tensor] = calibration.splits
        self._hashes = calibration.hashes
        self._top_k = top_k
        self._batch_size = batch_size
        self._folder = cache_folder
        self._teachers: dict[str, TeacherCache] = {}
        self._dense: dict[str, Tensor] = {}

    @property
    def tokens_per_sequence(self) -> int:
        """Length of every sequence."""
        return int(next(iter(self._splits.values())).shape[1])

    def num_sequences(self, split: str) -> int:
        """Sequences in a split."""
        return int(self._splits[split].shape[0])

    def prepare(self, model: nn.Module, split: str) -> int:
        """Fill the teacher cache of a split, from disk if it is there; returns tokens spent.

        The model must be dense when this is called.
        """
        if split in self._teachers or split in self._dense:
            return 0
        if self.name != "kl":
            self._dense[split] = self._dense_cross_entropy(model, split)
            return self._splits[split].numel()
        path = self._cache_path(split)
        if path is not None and path.exists():
            self._teachers[split] = TeacherCache.from_tensors(load_file(path), split)
            return 0
        indices, log_probs = [], []
        with torch.inference_mode():
            for batch in torch.split(self._splits[split], self._batch_size):
                kept, values = keep_top(_logits(model, batch), self._top_k)
                indices.append(kept.cpu())
                log_probs.append(values.cpu())
        full = indices[0].ndim == 1
        cache = TeacherCache(indices[0] if full else torch.cat(indices), torch.cat(log_probs))
        self._teachers[split] = cache
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(cache.tensors(split), path, what="the teacher cache")
        return self._splits[split].numel()

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """Loss and cross-entropy per token of each sequence."""
        chosen = torch.tensor(indices)
        nats: list[float] = []
        cross: list[float] = []
        with torch.inference_mode():
            for rows in torch.split(chosen, self._batch_size):
                tokens = self._splits[split][rows]
                logits = _logits(model, tokens)
                # One sequence at a time: a float32 copy of all logits would not fit in any cache.
                for place, row in enumerate(rows):
                    own, words = logits[place, None], tokens[place, None]
                    normaliser = own.float().logsumexp(-1)
                    entropy = float(_cross_entropy(own, words, normaliser))
                    cross.append(entropy)
                    if self.name == "kl":
                        nats.append(float(self._kl(own, split, row[None], normaliser)))
                    else:
                        nats.append(entropy - float(self._dense[split][row]))
        return SequenceLosses(nats, cross)

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Cross-entropy per token of one sequence, with a graph."""
        tokens = self._splits[split][index : index + 1]
        return _cross_entropy(_logits(model, tokens), tokens)[0]

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The measured loss per token of one sequence, with a graph."""
        if self.name != "kl":
            return self.likelihood_loss(model, split, index)
        rows = torch.tensor([index])
        return self._kl(_logits(model, self._splits[split][rows]), split, rows)[0]

    def _kl(
        self, logits: Tensor, split: str, rows: Tensor, normaliser: Tensor | None = None
    ) -> Tensor:
        """(len(rows),) mean KL per token."""
        teacher = self._teachers[split]
        kept = teacher.indices if teacher.full else teacher.indices[rows].to(logits.device)
        values = teacher.log_probs[rows].to(logits.device)
        return kl_per_token(kept, values, logits, normaliser).mean(-1)

    def _dense_cross_entropy(self, model: nn.Module, split: str) -> Tensor:
        """(num_sequences,) of the dense model."""
        with torch.inference_mode():
            batches = torch.split(self._splits[split], self._batch_size)
            return torch.cat([_cross_entropy(_logits(model, b), b).cpu() for b in batches])

    def _cache_path(self, split: str) -> Path | None:
        if self._folder is None:
            return None
        return (
            self._folder
            / f"teacher-{split}-{self._hashes[split][:16]}-top{self._top_k}.safetensors"
        )


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, length, vocabulary) next-token logits."""
    device = next(model.parameters()).device
    output: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return output


def _cross_entropy(logits: Tensor, tokens: Tensor, normaliser: Tensor | None = None) -> Tensor:
    """(batch,) mean next-token cross-entropy in float32."""
    targets = tokens[:, 1:, None].to(logits.device)
    if normaliser is None:
        normaliser = logits.float().logsumexp(-1)
    chosen = logits[:, :-1].gather(-1, targets).squeeze(-1).float()
    return (normaliser[:, :-1] - chosen).mean(-1)

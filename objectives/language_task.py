"""Causal language modelling as a task: KL to the dense model, cross-entropy beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from objectives.calibration import Calibration
from objectives.output_head import OutputHead, log_normaliser, logits_of
from objectives.task import SequenceLosses
from objectives.teacher import TeacherCache, keep_top, kl_per_token
from objectives.tensor_file import write_tensors

logger = logging.getLogger(__name__)

DEFAULT_TOP_K = 2048


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
        self.has_slopes = True
        self._splits: Mapping[str, Tensor] = calibration.splits
        self._hashes = calibration.hashes
        self._top_k = top_k
        self._batch_size = batch_size
        self._folder = cache_folder
        self._teachers: dict[str, TeacherCache] = {}
        self._dense: dict[str, Tensor] = {}
        self._head: OutputHead | None = None

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
        if path is not None and (known := _kept_teacher(path, split)) is not None:
            self._teachers[split] = known
            return 0
        indices, log_probs = [], []
        with torch.inference_mode():
            for batch in torch.split(self._splits[split], self._batch_size):
                for _, logits in self._head_of(model).chunks(batch):
                    kept, values = keep_top(logits, self._top_k)
                    indices.append(kept.cpu())
                    log_probs.append(values.cpu())
        full = indices[0].ndim == 1
        shape = self._splits[split].shape
        cache = TeacherCache(
            indices[0] if full else torch.cat(indices).view(*shape, -1),
            torch.cat(log_probs).view(*shape, -1),
        )
        self._teachers[split] = cache
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(cache.tensors(split), path, what="the teacher cache")
        return self._splits[split].numel()

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """Loss and cross-entropy per token of each sequence."""
        rows = torch.tensor(indices)
        with torch.inference_mode():
            found = [
                self._batch(model, split, part) for part in torch.split(rows, self._batch_size)
            ]
        nats, cross = (torch.cat(values) for values in zip(*found, strict=True))
        return SequenceLosses(nats.tolist(), cross.tolist())

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Cross-entropy per token of one sequence, with a graph."""
        tokens = self._splits[split][index : index + 1]
        return _cross_entropy(logits_of(model, tokens), tokens)[0]

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The measured loss per token of one sequence, with a graph.

        Before its split is prepared a cross-entropy is the model's own, not the increase.
        """
        if self.name != "kl":
            own = self.likelihood_loss(model, split, index)
            return own - float(self._dense[split][index]) if split in self._dense else own
        logits = logits_of(model, self._splits[split][[index]])
        kept, values = self._teacher_rows(split, torch.tensor([index]), logits.device)
        return kl_per_token(kept, values, logits[0]).mean()

    def _head_of(self, model: nn.Module) -> OutputHead:
        """The model with its head apart."""
        if self._head is None or self._head.model is not model:
            self._head = OutputHead(model)
        return self._head

    def _batch(self, model: nn.Module, split: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(len(rows),) losses and cross-entropies per token of one batch, float64."""
        tokens = self._splits[split][rows]
        targets = tokens.roll(-1, 1).flatten()  # the last of each sequence is left out below
        normalisers, chosen, kls = [], [], []
        teacher: tuple[Tensor, Tensor] | None = None
        for part, logits in self._head_of(model).chunks(tokens):
            normaliser = log_normaliser(logits)
            normalisers.append(normaliser)
            picked = logits.gather(-1, targets[part, None].to(logits.device))
            chosen.append(picked.squeeze(-1).float())
            if self.name == "kl":
                teacher = teacher or self._teacher_rows(split, rows, logits.device)
                kept = teacher[0] if teacher[0].ndim == 1 else teacher[0][part]
                kls.append(kl_per_token(kept, teacher[1][part], logits, normaliser))
        entropy = (torch.cat(normalisers) - torch.cat(chosen)).view(tokens.shape)[:, :-1]
        cross = entropy.mean(-1).cpu().double()
        if self.name == "kl":
            return torch.cat(kls).view(tokens.shape).mean(-1).cpu().double(), cross
        return cross - self._dense[split][rows] if split in self._dense else cross, cross

    def _teacher_rows(
        self, split: str, rows: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Kept outcomes (rows x length, k), or (0,), and log-probabilities of some sequences."""
        teacher = self._teachers[split]
        kept = teacher.indices if teacher.full else teacher.indices[rows].flatten(0, 1)
        return kept.to(device), teacher.log_probs[rows].flatten(0, 1).to(device)

    def _dense_cross_entropy(self, model: nn.Module, split: str) -> Tensor:
        """(num_sequences,) of the dense model."""
        rows = torch.arange(self.num_sequences(split))
        with torch.inference_mode():
            parts = [
                self._batch(model, split, part)[1] for part in torch.split(rows, self._batch_size)
            ]
        return torch.cat(parts)

    def _cache_path(self, split: str) -> Path | None:
        if self._folder is None:
            return None
        return (
            self._folder
            / f"teacher-{split}-{self._hashes[split][:16]}-top{self._top_k}.safetensors"
        )


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """(batch,) mean next-token cross-entropy in float32, with a graph."""
    targets = tokens[:, 1:, None].to(logits.device)
    chosen = logits[:, :-1].gather(-1, targets).squeeze(-1).float()
    return (logits[:, :-1].float().logsumexp(-1) - chosen).mean(-1)


def _kept_teacher(path: Path, split: str) -> TeacherCache | None:
    """The outcomes kept in a file; ``None`` if there is none that can be read."""
    if not path.exists():
        return None
    try:
        return TeacherCache.from_tensors(load_file(path), split)
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None

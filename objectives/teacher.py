"""The dense model's predictions, kept small: top-k log-probabilities and the mass of the rest.

The problem: KL(dense || compressed) needs the dense distribution of every position, and a full
vocabulary in float32 is hundreds of kilobytes a token. Keeping the k most likely tokens and lumping
the rest into one outcome gives the KL of a coarser distribution: a lower bound of the full KL (data
processing inequality) that is tight when k covers the mass. ``k = 0`` keeps everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Probability below which a lumped tail counts as empty: one minus a float32 sum of probabilities is
# no more exact, and a student's tail lost to rounding must not make the bound exceed the full KL.
_FLOOR = 2.0**-20


@dataclass(frozen=True)
class TeacherCache:
    """Predictions of the dense model on one split.

    Attributes:
        indices: (num_sequences, length, k) int32 token ids of the kept outcomes, or (0,) when the
            whole vocabulary is kept in order.
        log_probs: (num_sequences, length, k) float32 their log-probabilities.
    """

    indices: Tensor
    log_probs: Tensor

    @property
    def full(self) -> bool:
        """Whether the whole vocabulary is kept."""
        return self.indices.ndim == 1

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """For saving."""
        return {f"{prefix}.indices": self.indices, f"{prefix}.log_probs": self.log_probs}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> TeacherCache:
        """Invert :meth:`tensors`."""
        return cls(tensors[f"{prefix}.indices"], tensors[f"{prefix}.log_probs"])


def keep_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's side of the KL for one batch.

    Args:
        logits: (batch, length, vocabulary) of the dense model.
        k: Outcomes to keep; 0 or more than the vocabulary keeps all.

    Returns:
        int32 indices (batch, length, k), or (0,) when all are kept; float32 log-probabilities.
    """
    log_probs = torch.log_softmax(logits.float(), -1)
    if k == 0 or k >= log_probs.shape[-1]:
        return torch.empty(0, dtype=torch.int32), log_probs
    top = log_probs.topk(k, dim=-1)
    return top.indices.to(torch.int32), top.values


def kl_per_token(
    indices: Tensor, log_probs: Tensor, logits: Tensor, normaliser: Tensor | None = None
) -> Tensor:
    """KL(dense || compressed) of each position.

    Args:
        indices: (batch, length, k) int32 kept outcomes, or (0,) when all are kept.
        log_probs: (batch, length, k) float32 log-probabilities of the dense model.
        logits: (batch, length, vocabulary) of the compressed model.
        normaliser: (batch, length) float32 log-sum-exp of the logits, where it is known already.

    Returns:
        (batch, length) float32, nats; never below zero beyond rounding.
    """
    if normaliser is None:
        normaliser = logits.float().logsumexp(-1)
    kept = logits if indices.ndim == 1 else logits.gather(-1, indices.long())
    student = kept.float() - normaliser.unsqueeze(-1)
    probs = log_probs.exp()
    # Models that mask unused outcomes give both -inf there; they cost nothing.
    kl = torch.where(probs == 0, 0.0, probs * (log_probs - student)).sum(-1)
    if indices.ndim == 1:
        return kl
    tail = (1 - probs.sum(-1)).clamp_min(0.0)
    student_tail = (1 - student.exp().sum(-1)).clamp_min(_FLOOR)
    term = tail * (tail.clamp_min(_FLOOR).log() - student_tail.log())
    return kl + torch.where(tail > _FLOOR, term, torch.zeros_like(term))

"""What is measured, and on which data: the interface between models and searches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceLosses:
    """Losses of single sequences.

    Attributes:
        nats: (count,) the task's loss per token, lower is better.
        cross_entropy_nats: (count,) cross-entropy per token, or empty where the task has none.
    """

    nats: Sequence[float]
    cross_entropy_nats: Sequence[float] = ()


class Task(Protocol):
    """A loss on data with splits ``statistics``, ``search``, ``guard`` and ``heldout``.

    Attributes:
        name: Of the loss.
        has_slopes: Whether :meth:`loss` is what is measured, so that its gradient says how that
            changes.
    """

    name: str
    has_slopes: bool

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens that one sequence sends through the model."""
        ...

    def num_sequences(self, split: str) -> int:
        """Sequences in a split."""
        ...

    def prepare(self, model: nn.Module, split: str) -> int:
        """Run the dense model where the loss needs it; returns the tokens spent."""
        ...

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """Measure the model as it stands on some sequences, without gradients."""
        ...

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Scalar with a graph: loss per token whose squared gradient is the empirical Fisher."""
        ...

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """Scalar with a graph: the measured loss per token of one sequence."""
        ...


@dataclass
class TokenMeter:
    """Counts tokens sent through a model by kind; a backward pass counts as two forwards.

    Attributes:
        num_blocks: Blocks of the model, to count block-tokens: tokens summed over the blocks that
            they went through.
        counts: Tokens by kind.
        block_counts: Block-tokens by kind; fewer where a pass could start half way.
    """

    num_blocks: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    block_counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, tokens: int, block_tokens: int | None = None) -> None:
        """Count forward tokens of one kind; without block-tokens they went through all blocks."""
        self.counts[kind] += tokens
        full = tokens * self.num_blocks
        self.block_counts[kind] += full if block_tokens is None else block_tokens

    def as_dict(self) -> Mapping[str, int]:
        """Plain counts by kind, sorted."""
        return dict(sorted(self.counts.items()))

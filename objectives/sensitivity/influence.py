"""LayerIF: blocks whose training samples still move the validation loss are pruned more.

The problem: how well trained a block is for a task shows in influence functions restricted to it.
Per block the influences of all training samples are summed to a score; after scaling and, from
seven blocks on, smoothing along depth, a higher score means more sparsity (LayerIF, NeurIPS 2025,
methods and ablation; one sentence of its introduction says the opposite). It ranks blocks for one
task: units of a block share their importance, and another validation set gives other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from objectives.influence import (
    VARIANTS,
    GradientFactors,
    block_score,
    collect_factors,
    matrix_influences,
)
from objectives.mappers import Ratios, minmax, range_map, smooth
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import BlockImportanceScorer, Importances, units_by_block
from objectives.task import Task
from search_spaces.space import Member

_SMOOTHED_FROM = 7  # blocks: the window of the filter


@dataclass(frozen=True)
class Influence(BlockImportanceScorer):
    """LayerIF's scores and mapping; importances reach from 1 - epsilon to 1 + epsilon.

    Attributes:
        variant: ``positive`` sums the samples that help, ``all`` every sample, ``top`` the quarter
            that helps most (the paper's best for experts).
        epsilon: Half the range of ratios before scaling; the paper takes 0.3 for magnitude pruning
            and 0.1 for Wanda's and SparseGPT's.
        validation: Whose statistics split is the validation set. ``None`` halves the statistics
            sequences of the context: training first, then validation.
        reverse: Prune the blocks of a high score less, as the paper's ablation does.
        most_bytes: Memory for activations and output gradients. Where those of all blocks need
            more, the passes are repeated for some blocks at a time.
    """

    variant: str = "positive"
    epsilon: float = 0.3
    validation: Task | None = field(default=None, compare=False, repr=False)
    reverse: bool = False
    most_bytes: int = 2 * 2**30

    name: ClassVar[str] = "influence"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"scorer influence: variant must be {', '.join(VARIANTS)}, got {self.variant!r}"
            )
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"scorer influence: epsilon must be 0 to 1, got {self.epsilon}")

    def measure_blocks(self, context: ScoringContext) -> Importances:
        """Falling with the score, scaled and smoothed as the paper does."""
        scaled = minmax(np.abs(self.scores(context)))
        if len(scaled) >= _SMOOTHED_FROM:
            scaled = minmax(smooth(scaled))  # which overshoots the range
        direction = -1 if self.reverse else 1
        return np.asarray(1 + direction * self.epsilon * (1 - 2 * scaled))

    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """The range mapper on falling importances: a higher score prunes more."""
        return range_map(-importances, sizes, removed, self.epsilon)

    def scores(self, context: ScoringContext) -> Ratios:
        """(num_blocks,) scores of the dense model's blocks, which `experts` takes as well.

        Raises:
            ValueError: The inputs of a member cannot be observed, or there is but one sequence.
        """
        self.refuse_caches(context.space)
        context.bank.restore()
        blocks = [
            [member for unit in units for member in context.space.units[unit].members]
            for units in units_by_block(context.space)
        ]
        train, validation = self._sequences(context)
        found = []
        for group in self._groups(context, blocks, len(train) + len(validation)):
            members = [member for block in group for member in block]
            ours = _collect(context, context.task, members, train)
            theirs = _collect(context, self.validation or context.task, members, validation)
            for block in group:
                influences = [
                    matrix_influences(ours[m.name], theirs[m.name], m.num_weights) for m in block
                ]
                found.append(block_score(torch.stack(influences).sum(0), self.variant))
        return np.array(found)

    def _sequences(self, context: ScoringContext) -> tuple[range, range]:
        """Of the training and of the validation set."""
        ours = context.sequences
        if self.validation is not None:
            total = self.validation.num_sequences("statistics")
            most = context.num_sequences
            return ours, range(total if most is None else min(total, most))
        if len(ours) < 2:
            raise ValueError(
                "scorer influence: expected 2 statistics sequences or more, to train and to "
                f"validate on, got {len(ours)}; give more, or a validation task"
            )
        middle = (len(ours) + 1) // 2
        return ours[:middle], ours[middle:]

    def _groups(
        self, context: ScoringContext, blocks: Sequence[list[Member]], num_sequences: int
    ) -> list[list[list[Member]]]:
        """Blocks whose activations fit in memory together; each group takes passes of its own."""
        first = blocks[0][0]
        seen = _collect(context, context.task, [first], context.sequences[:1])[first.name][0]
        each = num_sequences * seen.num_bytes / sum(first.shape)
        groups: list[list[list[Member]]] = []
        free = 0.0
        for block in blocks:
            size = each * sum(sum(member.shape) for member in block)
            if not groups or size > free:
                groups.append([])
                free = float(self.most_bytes)
            groups[-1].append(block)
            free -= size
        return groups


def _collect(
    context: ScoringContext, task: Task, members: Sequence[Member], indices: Sequence[int]
) -> dict[str, list[GradientFactors]]:
    return collect_factors(context.model, task, members, indices, meter=context.meter)

"""Block influence: blocks that turn the residual stream are worth keeping.

ShortGPT's influence of a block is one minus the mean cosine, over tokens, between the residual
stream before and after it. MoDeGPT (Lin et al., ICLR 2025) maps it to the share that each
block loses, ``exp(-influence / epsilon)`` scaled to the mean: the maximum of kept influence plus
epsilon times the entropy of the shares. What exceeds a cap goes to the other blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from objectives.mappers import Ratios, entropic_map
from objectives.prefix import find_blocks
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import BlockImportanceScorer, Importances

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockInfluence(BlockImportanceScorer):
    """Influences from one forward pass over the statistics split, and MoDeGPT's mapping.

    Attributes:
        epsilon: Temperature; small ones concentrate the loss on the least influential blocks. The
            paper's is not known; 0.015 is what re-implementations take.
        cap: Most that a block may lose. A mean that reaches it lifts it half way to 1, with a
            warning: whole menus of few bits remove more than 0.8.
    """

    epsilon: float = 0.015
    cap: float = 0.8

    name: ClassVar[str] = "block_influence"

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"block_influence: epsilon must be positive, got {self.epsilon}")
        if not 0 < self.cap <= 1:
            raise ValueError(f"block_influence: cap must be above 0 to 1, got {self.cap}")

    def measure_blocks(self, context: ScoringContext) -> Importances:
        """One minus the mean cosine of each block that holds searched units.

        Raises:
            ValueError: The units do not sit in one stack of blocks, or a block changes the shape of
                what passes through it.
        """
        blocks = find_blocks(context.model, context.space)
        if not blocks:
            raise ValueError(
                f"scorer {self.name}: expected all units in one stack of blocks, found none that "
                "holds them; take another scorer"
            )
        depths = sorted({u.depth for u in context.space.units if u.depth is not None})
        cosines = _MeanCosines()
        context.bank.restore()
        with torch.no_grad(), cosines.listening({d: blocks[d] for d in depths}):
            for index in context.sequences:
                context.task.likelihood_loss(context.model, "statistics", index)
                context.meter.add("statistics", context.task.tokens_per_sequence)
        # Rounding may leave a cosine above 1.
        return np.array([max(1 - cosines.mean(depth), 0.0) for depth in depths])

    def map_blocks(self, importances: Importances, sizes: Ratios, removed: float) -> Ratios:
        """Shares that fall with influence: more influence, keep more."""
        cap = self.cap
        if removed >= cap:
            cap = (1 + removed) / 2
            logger.warning(
                "block_influence: the cap of %g is lifted to %g for a mean of %g",
                self.cap,
                cap,
                removed,
            )
        return entropic_map(importances, sizes, removed, epsilon=self.epsilon, cap=cap)


class _MeanCosines:
    """Mean over tokens of the cosine between what enters and what leaves each block."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    @contextmanager
    def listening(self, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
        handles = [
            block.register_forward_hook(self._hook(depth), with_kwargs=True)
            for depth, block in blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean(self, depth: int) -> float:
        """Of the block at a depth."""
        return float(self._sums[depth]) / self._tokens[depth]

    def _hook(self, depth: int) -> Callable[..., None]:
        def observe(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            del module
            after = output[0] if isinstance(output, tuple) else output
            # as the block before left it, which may be on another device
            before = (args[0] if args else kwargs["hidden_states"]).to(after.device)
            if before.shape != after.shape:
                raise ValueError(
                    f"scorer block_influence: block {depth} turns {tuple(before.shape)} into "
                    f"{tuple(after.shape)}; it speaks of blocks that keep the shape"
                )
            cosines = cosine_similarity(before.double(), after.double(), dim=-1)
            self._sums[depth] = self._sums.get(depth, torch.zeros(())).to(cosines) + cosines.sum()
            self._tokens[depth] = self._tokens.get(depth, 0) + cosines.numel()

        return observe

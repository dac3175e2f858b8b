"""Noise injection: how much of each unit's relative error the loss takes, fitted by measuring.

The problem: relative weight error is cheap for every option but says nothing of the loss. Around
the dense model the loss grows in proportion to a matrix's relative error, whatever made the error,
so one number per unit turns the one into the other: it is fitted on two levels of random noise,
and all options of all formats are then priced without another measurement.

Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity
Theorem", NAACL 2025 (HIGGS), there for perplexity; here for the measured loss, in nats.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from objectives.bank import Bank
from objectives.evaluator import Evaluator
from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.sensitivity.one_at_a_time import OneAtATime
from objectives.sensitivity.relative_error import RelativeError
from search_spaces.operators import Keep, Statistics
from search_spaces.space import Option, SearchSpace
from search_spaces.storage import StoredTensor

LEVELS = (0.01, 0.04)  # squared relative errors, those of about 5 and 4 bits


@dataclass(frozen=True)
class _Noise(Keep):
    """A dense matrix plus Gaussian noise of a given relative error; deterministic in both."""

    level: float = LEVELS[0]
    seed: int = 0
    name: ClassVar[str] = "noise"

    @property
    def label(self) -> str:
        return f"noise-{self.level:g}"

    def layout(self, shape: tuple[int, int]) -> tuple[StoredTensor, ...]:
        return (StoredTensor("weight", "F32", shape),)

    def apply(self, weight: Tensor, stats: Statistics) -> Tensor:
        del stats
        # seeded by the content, so that no two matrices get the same noise in whatever order
        content = weight.detach().float().cpu().contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(content) + self.seed)
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        scale = self.level**0.5 * weight.float().norm() / noise.norm()
        noisy: Tensor = (weight.float() + scale * noise).to(weight)
        return noisy


class NoiseInjection(Scorer):
    """``alpha_unit x relative error``, with alpha fitted to measured losses of noise; nats.

    A cache has no weights; its loss is measured.
    """

    name: ClassVar[str] = "noise_injection"
    unit: ClassVar[str] = "nats"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """Fit each unit's alpha when it is first asked for, then price its options.

        Raises:
            ValueError: A measurement failed.
        """
        noisy = _noisy(context)
        alphas: dict[int, float] = {}
        for unit, option in cells:
            if (cached := context.cache_loss(unit, option)) is not None:
                yield cached.nats
                continue
            if unit not in alphas:
                alphas[unit] = _fit(noisy, unit)
            yield alphas[unit] * RelativeError().cell(context, unit, option)


def _noisy(context: ScoringContext) -> ScoringContext:
    """The same model with a menu of noise."""
    levels = tuple(_Noise(level=level, seed=context.seed) for level in LEVELS)
    menus = tuple(
        menu if unit.is_cache else (*(Option(level, 0) for level in levels), Option(Keep(), 0))
        for unit, menu in zip(context.space.units, context.space.menus, strict=True)
    )
    space = SearchSpace("noise", context.space.units, menus, ())
    context.bank.restore()
    bank = Bank(context.model, space, most_bytes=0)
    evaluator = Evaluator(context.model, context.task, bank, context.meter)
    return replace(context, space=space, bank=bank, evaluator=evaluator)


def _fit(noisy: ScoringContext, unit: int) -> float:
    """Least squares through the origin in relative units: the mean of loss over error."""
    cells = [(unit, index) for index in range(len(LEVELS))]
    losses = list(OneAtATime().losses(noisy, cells))
    noisy.bank.restore()
    ratios = [loss / _error(noisy, cell) for cell, loss in zip(cells, losses, strict=True)]
    return max(sum(ratios) / len(ratios), 0.0)


def _error(noisy: ScoringContext, cell: Cell) -> float:
    """The relative error that the noise came to in the model's own precision."""
    return RelativeError().cell(noisy, *cell)

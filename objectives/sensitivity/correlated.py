"""Correlated scorers: estimates over weights, times how far errors cancel in a matrix's outputs.

The problem: Fisher and the blend judge errors weight by weight. GPTQ and SparseGPT move weights far
on purpose, so that what they do to the outputs cancels; a table over weights takes that care for
damage, and is wrong by factors between these operators and plain rounding. Inputs of a thousand
tokens show how much of the error arrives at the outputs, beside what would arrive if the errors of
a row were independent. Two things make that share honest: the tokens are of text that no operator
was fitted to, since on its own text it looks better than it is, by a factor of two on
SmolLM2-135M; and each counts as the loss feels it, by the squared gradient of its outputs, since a
few tokens with huge inputs, which nothing reads, would decide otherwise.

That is done for operators that need the inputs' Hessian; the errors of others are independent, or
nearly. Where no hook sees the inputs of a parameter (embeddings, stacked experts) nothing is known
of it, and the estimate stays as it is.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from objectives.sensitivity.base import CellScorer, ScoringContext, weighted_square
from objectives.sensitivity.blend import Blend
from objectives.sensitivity.fisher import Fisher
from search_spaces.space import SearchSpace


class _Correlated(CellScorer):
    """``base x |X E'|^2 / sum x^2 E^2`` for operators that solve for outputs; else ``base``.

    ``X`` are the inputs of tokens, each times the length of the gradient by its outputs.
    """

    base: ClassVar[type[CellScorer]]

    def needs_for(self, space: SearchSpace) -> frozenset[str]:
        """No inputs where no operator solves for outputs."""
        return self.needs if "hessian" in space.needs else self.base.needs

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """The estimate of one option times what arrives of its error."""
        cell = unit, option
        if cell not in context.arriving:
            context.arriving[cell] = _arriving(context, unit, option)
        return self.base().cell(context, unit, option) * context.arriving[cell]


class CorrelatedBlend(_Correlated):
    """The blend times what arrives of the error, a ranking without a unit."""

    name: ClassVar[str] = "correlated_blend"
    unit: ClassVar[str] = Blend.unit
    base: ClassVar[type[CellScorer]] = Blend
    needs: ClassVar[frozenset[str]] = Blend.needs | {"weighted_inputs"}


class CorrelatedFisher(_Correlated):
    """The Fisher loss times what arrives of the error, nats per token."""

    name: ClassVar[str] = "correlated_fisher"
    unit: ClassVar[str] = Fisher.unit
    base: ClassVar[type[CellScorer]] = Fisher
    needs: ClassVar[frozenset[str]] = Fisher.needs | {"weighted_inputs"}


def _arriving(context: ScoringContext, unit: int, option: int) -> float:
    """Squared change of the outputs over what independent errors would make of it."""
    if "hessian" not in context.space.menus[unit][option].operator.needs:
        return 1.0
    arriving = independent = 0.0
    for _, _, error, stats in context.errors(unit, option):
        if stats.weighted_inputs is None:
            return 1.0
        inputs = stats.weighted_inputs.to(error.device, torch.float32)
        arriving += float((inputs @ error[0].T).square().sum(dtype=torch.float64))
        independent += weighted_square(error[0], inputs.square().sum(0))
    return arriving / independent if independent else 1.0

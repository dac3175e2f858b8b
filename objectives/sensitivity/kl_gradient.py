"""Slope of the measured loss at the smallest model: what each upgrade would win there.

The gradient of the KL to the dense model is taken once, with every unit in its cheapest option,
where it does not vanish as it does at the dense weights. mlx-lm's ``dynamic_quant`` multiplies it
with the difference of the weights at its lower and its higher precision, and upgrades the matrices
that win most per weight. Here the loss of an option is ``<g, W_option - W_dense>``: its difference
between two options is mlx-lm's product, the dense weights lose nothing, and bytes are left to the
solver. It is a first-order estimate far from where it is read off: twice the loss where the KL is
quadratic, and below zero where an error of a matrix happens to make up for those of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.sensitivity.gradients import holding, refuse_caches, stream_gradients


class KLGradient(Scorer):
    """``<dKL/dW at the cheapest options, W' - W>``, signed; nats to first order.

    Memory is the model in its cheapest options and a float32 accumulator per weight.
    """

    name: ClassVar[str] = "kl_gradient"
    unit: ClassVar[str] = "first_order_nats"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """One pass over the statistics sequences, then cell after cell.

        Raises:
            ValueError: A cell is a cache's.
        """
        refuse_caches(self.name, context.space, cells)
        gradients = self._gradients(context, {unit for unit, _ in cells})
        for unit, option in cells:
            total = 0.0
            pairs = zip(
                context.bank.compressed(unit, option), context.bank.dense(unit), strict=True
            )
            for place, (made, dense) in enumerate(pairs):
                gradient = gradients.get((unit, place))
                if gradient is not None:  # else the loss does not depend on it
                    product = gradient * (made.float() - dense.float())
                    total += float(product.sum(dtype=torch.float64))
            yield total

    def _gradients(self, context: ScoringContext, units: set[int]) -> dict[tuple[int, int], Tensor]:
        """By unit and place of the member: the mean gradient, float32, in the model's layout."""
        context.evaluator.prepare("statistics")
        sums: dict[tuple[int, int], Tensor] = {}

        def fold(unit: int, place: int, gradient: Tensor) -> None:
            key = (unit, place)
            share = gradient.float() / len(context.sequences)
            sums[key] = sums[key].add_(share) if key in sums else share

        context.bank.restore()
        # Menus are ordered by bytes. Caches stay dense, as they are in mlx-lm.
        cheapest = {u: 0 for u, unit in enumerate(context.space.units) if not unit.is_cache}
        with holding(context.bank, cheapest):
            stream_gradients(context, units, context.task.loss, fold)
        return sums

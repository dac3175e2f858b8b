"""Gradient times weight error, with the whole model in the format that is judged.

AutoRound's AutoScheme (its "delta loss") runs the model with every matrix in one scheme, takes the
gradient of the likelihood loss of each batch there, and sums ``|gradient x (W - W')|`` over the
weights of a matrix. Near the dense weights such a gradient is noise around zero; at the compressed
model it tells which errors hurt. Taking absolute values leaves no cancellation: an upper bound of
the first-order effect.

Menus differ between units, so "the whole model in one format" needs a rule. For an operator, every
unit takes that very operator where its menu has it, and otherwise the option that is nearest in
bytes per weight to what the operator takes on average over the units that offer it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.sensitivity.gradients import holding, refuse_caches, stream_gradients
from search_spaces.operators import AnyOperator
from search_spaces.space import SearchSpace


class GradientDifference(Scorer):
    """``sum |dL/dW at W' x (W' - W)|``, the mean over sequences; nats to first order.

    One pass over the statistics sequences for each operator that is asked about. Memory is the
    model once more, in that operator, and one gradient.
    """

    name: ClassVar[str] = "gradient_difference"
    unit: ClassVar[str] = "absolute_first_order_nats"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """All passes first, then cell after cell.

        Raises:
            ValueError: A cell is a cache's.
        """
        refuse_caches(self.name, context.space, cells)
        asked: dict[AnyOperator, list[Cell]] = {}
        for unit, option in cells:
            asked.setdefault(context.space.menus[unit][option].operator, []).append((unit, option))
        losses: dict[Cell, float] = {}
        for operator, same in asked.items():
            lossless = all(_is_lossless(context, cell) for cell in same)
            losses |= dict.fromkeys(same, 0.0) if lossless else _measure(context, operator, same)
        for cell in cells:
            yield losses[cell]


def _is_lossless(context: ScoringContext, cell: Cell) -> bool:
    """Whether an option leaves the weights as they are, so that no pass is needed to know."""
    pairs = zip(context.bank.compressed(*cell), context.bank.dense(cell[0]), strict=True)
    return all(torch.equal(made, dense) for made, dense in pairs)


def _measure(
    context: ScoringContext, operator: AnyOperator, cells: Sequence[Cell]
) -> dict[Cell, float]:
    """The losses of an operator's cells, at the model that is all in this operator."""
    bank, options = context.bank, dict(cells)
    sums = dict.fromkeys(options, 0.0)

    def fold(unit: int, place: int, gradient: Tensor) -> None:
        weight = bank.parameters(unit)[place].data
        product = gradient.float() * (weight.float() - bank.dense(unit)[place].float())
        sums[unit] += float(product.abs().sum(dtype=torch.float64))

    bank.restore()
    with holding(bank, uniform_options(context.space, operator)):
        stream_gradients(context, options.keys(), context.task.likelihood_loss, fold)
    count = len(context.sequences)
    return {(unit, option): sums[unit] / count for unit, option in options.items()}


def uniform_options(space: SearchSpace, operator: AnyOperator) -> Mapping[int, int]:
    """The whole model in one operator, as far as menus go: option by unit; no caches.

    Args:
        space: Units and menus.
        operator: On some unit's menu.
    """
    places: dict[int, dict[AnyOperator, int]] = {
        index: {option.operator: place for place, option in enumerate(menu)}
        for index, (unit, menu) in enumerate(zip(space.units, space.menus, strict=True))
        if not unit.is_cache
    }
    offering = [unit for unit, menu in places.items() if operator in menu]
    spent = sum(space.menus[unit][places[unit][operator]].bytes for unit in offering)
    share = spent / sum(space.units[unit].num_weights for unit in offering)

    def nearest(unit: int) -> int:
        distances = [
            abs(option.bytes / space.units[unit].num_weights - share)
            for option in space.menus[unit]
        ]
        return distances.index(min(distances))

    return {u: menu[operator] if operator in menu else nearest(u) for u, menu in places.items()}

"""What scorers that differentiate the model share: gradients of every matrix, one at a time.

The problem: the gradients of all matrices at once are a second model in memory. They are handed
over as soon as each is complete and freed at once, at the dense weights or at others that are
pointed to for the while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from objectives.bank import Bank
from objectives.sensitivity.base import Cell, ScoringContext
from objectives.statistics import gradient_hooks
from search_spaces.space import SearchSpace

logger = logging.getLogger(__name__)

LossOfSequence = Callable[[nn.Module, str, int], Tensor]
"""(model, split, index) -> scalar with a graph, as the losses of a task are."""


def refuse_caches(scorer: str, space: SearchSpace, cells: Sequence[Cell]) -> None:
    """Raise for the first cell of a cache.

    Raises:
        ValueError: A cell is a cache's.
    """
    for unit, _ in cells:
        if space.units[unit].is_cache:
            raise ValueError(
                f"scorer {scorer}: {space.units[unit].name} is a cache, which has no weights to "
                "estimate a loss from; search no caches or use the fisher scorer"
            )


@contextmanager
def holding(bank: Bank, options: Mapping[int, int]) -> Iterator[None]:
    """Point some weight units of the dense model at their options, and back afterwards.

    Args:
        bank: Of a model that is dense now.
        options: Option index by unit index; no caches.
    """
    try:
        for unit, option in options.items():
            _point(bank.parameters(unit), bank.compressed(unit, option))
        yield
    finally:
        for unit in options:
            _point(bank.parameters(unit), bank.dense(unit))


def stream_gradients(
    context: ScoringContext,
    units: Collection[int],
    loss_of: LossOfSequence,
    consume: Callable[[int, int, Tensor], None],
) -> None:
    """Differentiate the loss of each statistics sequence at the weights that are in place.

    Args:
        context: Whose model is run.
        units: Indices of the weight units whose gradients are wanted.
        loss_of: Which loss, per token.
        consume: Told (unit, member's place in it, gradient in the parameter's own layout) once per
            sequence and member; the gradient may be kept.
    """
    members = {
        member.name: (unit, place)
        for unit in sorted(units)
        for place, member in enumerate(context.space.units[unit].members)
    }
    reached: set[str] = set()

    def fold(name: str, gradient: Tensor) -> None:
        reached.add(name)
        consume(*members[name], gradient)

    tokens = context.task.tokens_per_sequence
    with gradient_hooks(context.model, members, fold):
        for index in context.sequences if members else ():
            loss = loss_of(context.model, "statistics", index)
            context.meter.add("statistics", tokens)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                context.meter.add("statistics_backward", 2 * tokens)
    for name in members.keys() - reached:
        logger.warning("the loss does not depend on %s: its gradient is zero", name)


def _point(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor

"""How the loss of an assignment would change if single units took other options, to first order.

The problem: measuring every option of every unit around an assignment takes a thousand forwards,
and estimates made at the dense weights do not know what the other units' errors have done to the
model. One backward pass at the compressed weights knows: the gradient, multiplied with the
difference of the weights, is the slope of the loss towards each option. Near the dense weights that
is noise around zero; where compression hurts it says which matrices hurt. (mlx-lm's dynamic
quantization and AutoRound's AutoScheme take such products once, with the whole model in one format;
here they are taken at any assignment, so that a search can follow them.)

How far a first-order estimate can be trusted depends on how far the weights move, so that is told
along with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from objectives.bank import Bank
from objectives.evaluation import Slopes, round_significant
from objectives.statistics import gradient_hooks
from objectives.task import SequenceLosses, Task
from search_spaces.space import Assignment

Row = list[float]


class SlopeReader:
    """Differentiates the measured loss at the assignment that is swapped in.

    Args:
        model: The model whose parameters the bank swaps.
        task: Whose measured loss is differentiated.
        bank: Compressed parameters of the same model.

    Raises:
        ValueError: The loss that is differentiated is not the one that is measured, or the space
            has caches, through whose rounding no gradient passes.
    """

    def __init__(self, model: nn.Module, task: Task, bank: Bank) -> None:
        if not task.has_slopes:
            raise ValueError(f"objective {task.name} has no slopes: it cannot be differentiated")
        if bank.space.has_caches:
            raise ValueError("slopes are not known where caches are searched")
        self._model = model
        self._task = task
        self._bank = bank
        self._errors: dict[int, Row] = {}
        self._moves: dict[tuple[int, int], Row] = {}

    def read(
        self, assignment: Assignment, split: str, indices: Sequence[int]
    ) -> tuple[SequenceLosses, Slopes]:
        """Losses of some sequences, without cross-entropies, and the slopes' mean over them.

        One forward and one backward pass per sequence; memory is one matrix's gradient beyond them.

        Args:
            assignment: What the bank has swapped in.
            split: Of the task, prepared.
            indices: Of its sequences.

        Raises:
            ValueError: The loss has no gradient.
        """
        space = self._bank.space
        places = {
            member.name: (unit, place)
            for unit, found in enumerate(space.units)
            for place, member in enumerate(found.members)
        }
        sums = [[0.0] * len(menu) for menu in space.menus]

        def fold(name: str, gradient: Tensor) -> None:
            unit, place = places[name]
            slope = gradient.float().flatten()
            for option, difference in self._differences(unit, place, assignment[unit]):
                sums[unit][option] += float(torch.dot(slope, difference.float().flatten()))

        losses = []
        with gradient_hooks(self._model, places, fold):
            for index in indices:
                loss = self._task.loss(self._model, split, index)
                if not loss.requires_grad:
                    raise ValueError(f"objective {self._task.name} has no gradient")
                losses.append(float(loss.detach()))
                loss.backward()  # type: ignore[no-untyped-call]
        nats = [[value / len(indices) for value in row] for row in sums]
        moves = [self._moves_from(unit, option) for unit, option in enumerate(assignment)]
        return SequenceLosses(losses), Slopes(_rounded(nats), _rounded(moves))

    def _differences(self, unit: int, place: int, current: int) -> Iterator[tuple[int, Tensor]]:
        """For each other option, one after the other, what it would add to a member's weights."""
        weight = self._bank.compressed(unit, current)[place]
        for option in range(len(self._bank.space.menus[unit])):
            if option != current:
                yield option, self._bank.compressed(unit, option)[place] - weight

    def _moves_from(self, unit: int, current: int) -> Row:
        """Squared distances to every option, over the larger of both options' squared errors."""
        if (unit, current) not in self._moves:
            errors = self._errors_of(unit)
            squares = [0.0] * len(errors)
            for place in range(len(self._bank.dense(unit))):
                for option, difference in self._differences(unit, place, current):
                    squares[option] += _square(difference)
            larger = [max(error, errors[current]) for error in errors]
            self._moves[unit, current] = [
                square / error if error > 0 else 0.0
                for square, error in zip(squares, larger, strict=True)
            ]
        return self._moves[unit, current]

    def _errors_of(self, unit: int) -> Row:
        """The squared error of every option."""
        if unit not in self._errors:
            bank, dense = self._bank, self._bank.dense(unit)
            self._errors[unit] = [
                sum(
                    _square(made - own)
                    for made, own in zip(bank.compressed(unit, option), dense, strict=True)
                )
                for option in range(len(bank.space.menus[unit]))
            ]
        return self._errors[unit]


def _square(tensor: Tensor) -> float:
    return float(tensor.float().square().sum())


def _rounded(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(round_significant, row)) for row in rows)

"""An additive table of losses around one assignment, from slopes that were measured there.

The problem: a table made at the dense weights does not know how the errors of an assignment act
together. The slopes at that assignment do, to first order; what they leave out grows with the
square of how far weights move, and for that the prior table is good enough: the loss it gives an
option is how sharply the loss curves along that unit's errors. So the change of one unit counts as
``slope + damping x prior loss x move``, a Taylor expansion whose second term also keeps an exact
solver from believing a noisy slope too far (Levenberg and Marquardt's damping). The change that the
prior itself expects is added: slopes of little text are noisy, and where they say nothing the prior
still does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from allocator.searches.base import SearchSetting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

Vector = NDArray[np.float64]

DAMPING = 2.4
"""Of the prior's curvature; more than the 1 of a Taylor expansion, for slopes are noisy and an
optimum picks the luckiest of them (SmolLM2-135M at 3 bits: best between 2 and 3)."""
MEMORY = 0.5
"""Weight of what slopes elsewhere said, beside those at the centre, on each move of the centre."""
TRUST = 1.0
"""Weight of the prior's differences."""
_LEAST_CELL = 0.05  # of a unit's share of the loss


class LocalTable:
    """Slopes as they came in, around the assignment of the latest.

    Args:
        problem: Its losses are the prior, in any unit: they are scaled to the measured loss.
        memory: Weight of earlier slopes when the centre moves, from 0 to 1. A gradient changes
            little from one good assignment to the next, and its noise is averaged.
        trust: Weight of the prior's own differences beside the slopes.

    Attributes:
        centre: Where the latest slopes were measured; ``None`` before any.
    """

    def __init__(self, problem: Problem, *, memory: float = MEMORY, trust: float = TRUST) -> None:
        self.centre: Assignment | None = None
        self._problem = problem
        self._memory = memory
        self._trust = trust
        self._weight = 0.0
        self._slopes: list[Vector] = []
        self._moves: list[Vector] = []
        self._losses: list[float] = []

    def tell(self, evaluation: Evaluation) -> None:
        """Take in slopes, and make their assignment the centre."""
        assert evaluation.slopes is not None, "an evaluation without slopes"
        assignment, count = evaluation.assignment, evaluation.fidelity.count
        told = [np.array(row, float) for row in evaluation.slopes.nats]
        if assignment != self.centre:
            self._weight *= self._memory if self._losses else 0.0
            self._losses = []
            self._moves = [np.array(row, float) for row in evaluation.slopes.moves]
            self.centre = assignment
        total = self._weight + count
        self._slopes = [
            (self._weight * _from(old, i) + count * new) / total
            for old, new, i in zip(self._slopes or told, told, assignment, strict=True)
        ]
        self._weight = total
        self._losses += evaluation.sequence_nats

    def changes(self, damping: float = DAMPING) -> list[Vector]:
        """For each unit what every option would change of the centre's loss, nats per token.

        Args:
            damping: How much what slopes leave out counts.
        """
        assert self.centre is not None, "no slopes were told"
        found = []
        for prior, slopes, moves, i in zip(
            self._prior(), self._slopes, self._moves, self.centre, strict=True
        ):
            if len(slopes):
                curvature = np.maximum(prior, prior[i]) * moves
                found.append(slopes + damping * curvature + self._trust * (prior - prior[i]))
            else:
                found.append(prior - prior[i])
        return found

    def around(self, setting: SearchSetting, damping: float = DAMPING) -> SearchSetting:
        """A setting that starts at the centre and whose losses are this table's.

        Losses of cells have to be positive for others to correct them by factors: a unit has its
        share of the centre's loss there, or what its best option is said to save.
        """
        assert self.centre is not None, "no slopes were told"
        losses = []
        for prior, row, i in zip(self._prior(), self.changes(damping), self.centre, strict=True):
            share = max(float(prior[i]), -float(row.min()))
            losses.append(np.maximum(share + row, _LEAST_CELL * share))
        problem = replace(setting.problem, losses=tuple(losses))
        starts = tuple(dict.fromkeys([self.centre, *setting.starts]))
        return replace(setting, problem=problem, starts=starts)

    def _prior(self) -> Sequence[Vector]:
        """The prior's losses, scaled so that they add up to the centre's measured loss."""
        assert self.centre is not None
        predicted, measured = self._problem.total_loss(self.centre), float(np.mean(self._losses))
        scale = measured / predicted if predicted > 0 and measured > 0 else 1.0
        return [row * scale for row in self._problem.losses]


def _from(row: Vector, option: int) -> Vector:
    """Slopes counted from another option."""
    return row - row[option] if len(row) else row

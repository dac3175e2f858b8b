"""What a scorer is: an additive estimate of the loss of one option of one unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from objectives.bank import Bank
from search_spaces.operators import Statistics
from search_spaces.operators.members import logical
from search_spaces.space import Member, SearchSpace


@dataclass(frozen=True)
class ScoringContext:
    """What a scorer may look at.

    Attributes:
        space: Units and menus.
        bank: Dense and compressed parameters.
        statistics: By member name; holds what the scorer ``needs``.
    """

    space: SearchSpace
    bank: Bank
    statistics: Mapping[str, Statistics]

    def errors(self, unit: int, option: int) -> list[tuple[Member, Tensor, Tensor, Statistics]]:
        """For each member: (matrices, rows, columns) dense weight and compression error."""
        found = []
        for member, dense, made in zip(
            self.space.units[unit].members,
            self.bank.dense(unit),
            self.bank.compressed(unit, option),
            strict=True,
        ):
            weight = logical(dense, member).float()
            error = logical(made, member).float() - weight
            found.append((member, weight, error, self.statistics.get(member.name, Statistics())))
        return found


class Scorer(Protocol):
    """Estimates the loss of single options; an assignment's estimate is their sum.

    ``unit`` says what the numbers are: ``nats`` (per token, comparable with measured losses) or the
    name of a unit of their own, which is good for ranking only.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """The loss of one option of one unit, zero for a lossless one."""
        ...


def weighted_square(error: Tensor, weight: Tensor) -> float:
    """Sum of ``weight * error**2`` as a Python float, accumulated in double precision."""
    return float((weight * error.square()).sum(dtype=torch.float64))

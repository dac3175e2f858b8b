"""What a scorer is: an additive estimate of the loss of one option of one unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from objectives.bank import Bank
from objectives.kv_cache import CacheLoss
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
        caches: Measures one option of one cache alone; needed where caches are searched.
    """

    space: SearchSpace
    bank: Bank
    statistics: Mapping[str, Statistics]
    caches: Callable[[int, int], CacheLoss] | None = None

    def cache_loss(self, unit: int, option: int) -> CacheLoss | None:
        """What an option does to a layer's cache; ``None`` where the unit is no cache.

        A cache has no weights to estimate from, so its loss is measured: in nats as Fisher's
        estimates are, and as the relative error of the states that attention reads, which are the
        outputs of a projection as those that ``reconstruction`` speaks of.
        """
        if not self.space.units[unit].is_cache:
            return None
        assert self.caches is not None, self.space.units[unit].name
        return self.caches(unit, option)

    def errors(self, unit: int, option: int) -> list[tuple[Member, Tensor, Tensor, Statistics]]:
        """For each member: (matrices, rows, columns) dense weight and compression error.

        Raises:
            ValueError: The unit is a cache, which has no weights.
        """
        if self.space.units[unit].is_cache:
            raise ValueError(f"{self.space.units[unit].name} is a cache, which has no weights")
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

"""What a scorer is: an additive estimate of the loss of one option of one unit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from objectives.bank import Bank
from objectives.evaluator import Evaluator
from objectives.kv_cache import CacheLoss
from objectives.task import Task, TokenMeter
from search_spaces.operators import Statistics
from search_spaces.operators.members import logical
from search_spaces.space import Assignment, Member, SearchSpace

Cell = tuple[int, int]
"""Unit index, option index."""


@dataclass(frozen=True)
class ScoringContext:
    """What a scorer may look at.

    A scorer that runs the model calls ``bank.restore()`` first where it wants the dense one, leaves
    the model as it found it (flags, gradients, hooks) and counts the tokens it spends.

    Attributes:
        space: Units and menus.
        bank: Dense and compressed parameters of ``model``; swaps them.
        statistics: By member name; holds what the scorer ``needs``.
        model: The live model.
        task: The data and its loss; of its splits scorers look at ``statistics`` only.
        meter: Where tokens are counted, by kind; a backward pass counts as two forwards.
        evaluator: Measures assignments, sharing what their forward passes have in common.
        caches: Measures one option of one cache alone; needed where caches are searched.
        incumbent: An assignment that is nearly right, such as uniform at the budget, for scorers
            that measure around one; ``None`` where nothing is known of a budget.
        seed: Of a scorer's random numbers.
        num_sequences: Most sequences of the statistics split that a scorer with passes of its own
            should read; ``None`` for all.
        arriving: What a correlated scorer found of a cell's outputs, for the next such scorer.
    """

    space: SearchSpace
    bank: Bank
    statistics: Mapping[str, Statistics]
    model: nn.Module
    task: Task
    meter: TokenMeter
    evaluator: Evaluator
    caches: Callable[[int, int], CacheLoss] | None = None
    incumbent: Assignment | None = None
    seed: int = 0
    num_sequences: int | None = None
    arriving: dict[Cell, float] = field(init=False, default_factory=dict, repr=False)

    @property
    def sequences(self) -> range:
        """Indices of the statistics sequences that a pass of a scorer's own should read."""
        total = self.task.num_sequences("statistics")
        return range(total if self.num_sequences is None else min(total, self.num_sequences))

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
    name of a unit of their own, which is good for ranking only. ``needs`` are the statistics of
    :func:`objectives.statistics.collect_statistics` that it reads from its context; passes of its
    own it makes itself.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def needs_for(self, space: SearchSpace) -> frozenset[str]:
        """Of ``needs`` what it reads for a space."""
        del space
        return self.needs

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """The loss of each cell, in order, as soon as it is known; zero for a lossless one.

        Raises:
            ValueError: The scorer cannot serve this space or this model; says why.
        """
        ...


class CellScorer(Scorer, Protocol):
    """A scorer that knows each cell by itself."""

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """Score cell after cell."""
        return (self.cell(context, unit, option) for unit, option in cells)

    @abstractmethod
    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """The loss of one option of one unit, zero for a lossless one."""
        ...


def weighted_square(error: Tensor, weight: Tensor) -> float:
    """Sum of ``weight * error**2`` as a Python float, accumulated in double precision."""
    return float((weight * error.square()).sum(dtype=torch.float64))

"""One at a time: the measured loss with a single unit compressed.

The problem it solves: estimates are wrong by factors; this is no estimate. It costs a measurement
per option of every unit, on a few sequences that all of them share, and the blocks before the unit
are not run again. What it cannot know is how units act together, unless they are measured from a
plan that is nearly right: then its losses are differences around that plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from objectives.evaluation import Evaluation, Fidelity
from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from search_spaces.operators import Keep
from search_spaces.space import Assignment, SearchSpace

NUM_SEQUENCES = 4


class _Measured(Scorer):
    """Measures assignments that differ from a base in one unit."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """Measure each cell against the base on the same sequences.

        Raises:
            ValueError: A measurement failed.
        """
        base = self._base(context)
        fidelity = fidelity_of(context)
        reference = self._read(_measured(context, base, fidelity))
        for unit, option in cells:
            changed = (*base[:unit], option, *base[unit + 1 :])
            yield self._read(_measured(context, changed, fidelity)) - reference

    def _base(self, context: ScoringContext) -> Assignment:
        """What the other units hold."""
        return dense_assignment(context.space)

    def _read(self, evaluation: Evaluation) -> float:
        """The number of an evaluation that is compared."""
        return evaluation.loss_nats


class OneAtATime(_Measured):
    """The measured loss of one option with everything else dense, nats per token."""

    name: ClassVar[str] = "one_at_a_time"
    unit: ClassVar[str] = "nats"


class OneAtATimeFromIncumbent(_Measured):
    """The measured change of one option from an incumbent plan, nats per token; may be negative.

    It depends on the incumbent, and so on the budget.
    """

    name: ClassVar[str] = "one_at_a_time_incumbent"
    unit: ClassVar[str] = "nats"
    from_incumbent: ClassVar[bool] = True
    """Its tables depend on a plan, and so on the budget."""

    def _base(self, context: ScoringContext) -> Assignment:
        if context.incumbent is None:
            raise ValueError(
                f"scorer {self.name}: expected an incumbent plan to measure from, got none; "
                "give a budget at which uniform fits"
            )
        return context.incumbent


class MarginalPerplexity(_Measured):
    """The measured rise of log-perplexity of one option alone, as BitStack and ASVD sort by.

    Nats of cross-entropy per token; may be negative where compression happens to help. Wang et
    al., "BitStack", ICLR 2025, and Yuan et al., "ASVD", 2023, sort all pairs of matrix and level by
    this and cut where the size is met: ``allocator.ratio_plans.cut_assignment``.
    """

    name: ClassVar[str] = "marginal_perplexity"
    unit: ClassVar[str] = "cross_entropy_nats"

    def _read(self, evaluation: Evaluation) -> float:
        values = evaluation.sequence_cross_entropy_nats
        if not values:
            raise ValueError(f"scorer {self.name}: the task has no cross-entropy")
        return sum(values) / len(values)


def dense_assignment(space: SearchSpace) -> Assignment:
    """Every unit dense, or its largest option where the dense one is barred."""
    return tuple(
        next(
            (i for i, option in enumerate(menu) if isinstance(option.operator, Keep)), len(menu) - 1
        )
        for menu in space.menus
    )


def fidelity_of(context: ScoringContext) -> Fidelity:
    """The first statistics sequences: four, or as many as the context says."""
    total = context.task.num_sequences("statistics")
    return Fidelity("statistics", 0, min(total, context.num_sequences or NUM_SEQUENCES))


def _measured(context: ScoringContext, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
    evaluation = context.evaluator.once(assignment, fidelity)
    if not evaluation.ok:
        raise ValueError(f"a measurement of one unit failed: {evaluation.error}")
    return evaluation

"""What a scorer alone would have read, in tokens, whatever others measured before it.

The problem: methods share one model, its statistics and what was measured on it, which saves hours
and must not make the second of two methods look cheaper than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TypeVar

from objectives.evaluation import Evaluation, Fidelity
from objectives.evaluator import Evaluator
from objectives.sensitivity import SCORERS, ScoringContext
from objectives.statistics import text_of
from objectives.task import Task, TokenMeter
from search_spaces.space import Assignment

T = TypeVar("T")

APART = frozenset({"teacher", "check"})
"""Tokens of the dense model for its losses, and of the check that prefixes may be reused."""


class CountingEvaluator:
    """The shared evaluator as one scorer sees it: what is known already is counted as well.

    Args:
        evaluator: Measures, or hands out what was measured for others.
        meter: Where the tokens of this scorer are counted.
    """

    def __init__(self, evaluator: Evaluator, meter: TokenMeter) -> None:
        self._evaluator = evaluator
        self._meter = meter
        self._asked: set[tuple[Assignment, Fidelity]] = set()

    def prepare(self, split: str) -> None:
        """Run the dense model on a split where nobody did."""
        self._evaluator.prepare(split)

    def once(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Count what this scorer asks for the first time."""
        evaluation = self._evaluator.once(assignment, fidelity)
        if (assignment, fidelity) not in self._asked:
            self._meter.add(fidelity.split, evaluation.num_tokens)
        self._asked.add((assignment, fidelity))
        return evaluation

    def __call__(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
        """Measure and count."""
        evaluation = self._evaluator(assignment, fidelity)
        self._meter.add(fidelity.split, evaluation.num_tokens)
        return evaluation


def charged(
    context: ScoringContext, scorer: str, read: Callable[[ScoringContext, str], T]
) -> tuple[T, int]:
    """What ``read`` makes of a scorer, and its tokens: statistics, passes of its own, measurements.

    Args:
        context: What all scorers share.
        scorer: Its name.
        read: Told the context to use and the name.
    """
    meter = TokenMeter()
    evaluator = CountingEvaluator(context.evaluator, meter)
    value = read(replace(context, meter=meter, evaluator=evaluator), scorer)
    own = sum(tokens for kind, tokens in meter.counts.items() if kind not in APART)
    return value, own + collected(SCORERS[scorer]().needs_for(context.space), context.task)


def collected(needs: Collection[str], task: Task) -> int:
    """Tokens that collecting statistics takes; a backward counts twice."""
    passes = {"statistics": 3 if "fisher" in needs else 1, "search": 3}
    read = {split: len(indices) for split, indices in text_of(task, needs).items()}
    sequences = sum(passes[split] * count for split, count in read.items())
    return sequences * task.tokens_per_sequence

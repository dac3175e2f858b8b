"""Measure one after another in this process: the default, needing nothing but the model.

What is queued is measured in lexicographic order of tokens and assignments. Units are ordered by
depth, so that is a walk through the trie of what candidates have in common: each shared prefix of
blocks is computed once and used while it is kept.
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import replace

from allocator.executors.base import Measure, MeasureFactory
from objectives.evaluation import Evaluation, Fidelity, non_finite
from search_spaces.space import Assignment

logger = logging.getLogger(__name__)

_MOST_ERROR_CHARACTERS = 300


class InProcess:
    """A queue and a call; the measure is built at once, so its errors surface here.

    Args:
        make: Builds the measure.
    """

    def __init__(self, make: MeasureFactory) -> None:
        self._measure = make()
        self._queue: list[tuple[Fidelity, Assignment, str]] = []

    def submit(self, key: str, assignment: Assignment, fidelity: Fidelity) -> None:
        """Queue one measurement under its content address."""
        heapq.heappush(self._queue, (fidelity, assignment, key))

    def next(self) -> tuple[str, Evaluation]:
        """Measure what shares most with what was measured before it."""
        assert self._queue, "nothing was submitted"
        fidelity, assignment, key = heapq.heappop(self._queue)
        return key, safe_measure(self._measure, assignment, fidelity)

    def drop_queued(self) -> None:
        """Forget what was queued."""
        self._queue.clear()

    def close(self) -> None:
        """Forget what was queued."""
        self._queue.clear()


def safe_measure(measure: Measure, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
    """Measure; an exception (out of memory too) or a non-finite loss is a failed evaluation."""
    try:
        evaluation = measure(assignment, fidelity)
    except Exception as error:
        logger.warning("a measurement failed", exc_info=True)
        text = " ".join(str(error).split())[:_MOST_ERROR_CHARACTERS]
        name = type(error).__name__
        return Evaluation(assignment, fidelity, error=f"{name}: {text}" if text else name)
    wrong = non_finite(
        {
            "loss": evaluation.sequence_nats,
            "cross-entropy": evaluation.sequence_cross_entropy_nats,
        }
    )
    if wrong is not None:
        return replace(evaluation, sequence_nats=(), sequence_cross_entropy_nats=(), error=wrong)
    return evaluation

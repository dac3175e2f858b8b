"""What an executor is: it measures what it is given and hands results back, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

Measure = Callable[[Assignment, Fidelity], Evaluation]
"""Measures one assignment. Raising is allowed: the executor turns it into a failed evaluation."""

MeasureFactory = Callable[[], Measure]
"""Builds a :data:`Measure` inside the process that will use it; must be picklable for Ray."""


class Executor(Protocol):
    """Two methods; the same history whatever is behind them."""

    def submit(self, key: str, assignment: Assignment, fidelity: Fidelity) -> None:
        """Queue one measurement under its content address."""
        ...

    def next(self) -> tuple[str, Evaluation]:
        """Block until some measurement is finished; a failed one is a result too."""
        ...

    def drop_queued(self) -> None:
        """Forget what no worker has begun; what is under way still arrives."""
        ...

    def close(self) -> None:
        """Release workers; measurements under way are dropped."""
        ...

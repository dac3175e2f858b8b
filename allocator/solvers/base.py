"""What a solver is: an exact or bounded answer to a problem; no model, no randomness."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import numpy as np

from allocator.problem import Problem, Solution, Status


class Solver(Protocol):
    """Answers a :class:`Problem`. Implementations are frozen dataclasses of plain parameters."""

    name: ClassVar[str]

    def solve(self, problem: Problem) -> Solution:
        """The best assignment found, with a proven lower bound; equal problems, equal answers.

        Raises:
            ValueError: The problem holds something this solver does not take.
        """
        ...


def infeasible() -> Solution:
    """The answer when no assignment fits."""
    return Solution((), math.inf, 0, math.inf, Status.INFEASIBLE)


def refuse_extras(problem: Problem, solver: str) -> None:
    """Raise ``ValueError`` when a problem holds more than one budget over independent units."""
    extras = [name for name in ("constraints", "ties") if getattr(problem, name)]
    if extras:
        raise ValueError(
            f"solver {solver!r} expects a byte budget alone, got {' and '.join(extras)}; use 'milp'"
        )


def check_extras(problem: Problem) -> None:
    """Raise ``ValueError`` unless every constraint and tie fits the units."""
    for constraint in problem.constraints:
        expected = [cost.shape for cost in problem.bytes]
        if [cost.shape for cost in constraint.costs] != expected:
            raise ValueError(
                f"constraint {constraint.name!r}: expected one cost per option of each unit"
            )
        if not all(np.isfinite(cost).all() for cost in constraint.costs):
            raise ValueError(f"constraint {constraint.name!r}: costs must be finite")
    num_units = len(problem.bytes)
    for tie in problem.ties:
        if not tie or not all(0 <= unit < num_units for unit in tie):
            raise ValueError(f"tie {tie}: expected unit indices from 0 to {num_units - 1}")

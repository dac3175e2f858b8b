"""Moving an assignment to the budget: random single steps down until it fits, up until it is full.

A step moves one unit to the neighbouring option of its menu; menus are ordered by bytes, so up
never gets cheaper. Also the check of a search's setting that all searches share.
"""

from __future__ import annotations

import numpy as np

from allocator.problem import Problem
from allocator.searches.base import SearchSetting
from search_spaces.space import Assignment


def check_setting(setting: SearchSetting) -> None:
    """Refuse a setting that no search of this package can work on.

    Raises:
        ValueError: No start, a start over the budget, more limits than the byte budget, a menu that
            is not ordered by bytes, or impossible window sizes.
    """
    problem = setting.problem
    if problem.constraints or problem.ties:
        raise ValueError(
            "searches know one limit, the byte budget: expected a problem without constraints and "
            "ties, tie the units in the space instead"
        )
    if len(setting.depths) != len(problem.bytes) or len(setting.kinds) != len(problem.bytes):
        raise ValueError(
            f"expected a depth and a kind for each of {len(problem.bytes)} units, got "
            f"{len(setting.depths)} and {len(setting.kinds)}"
        )
    for index, cost in enumerate(problem.bytes):
        if (np.diff(cost) < 0).any():
            raise ValueError(f"unit {index}: expected options ordered by bytes, got {cost}")
    if not setting.starts:
        raise ValueError("expected at least one start, got none: pass the DP plan")
    for start in setting.starts:
        if problem.total_bytes(start) > problem.budget_bytes:
            raise ValueError(
                f"a start of {problem.total_bytes(start)} bytes is over the budget of "
                f"{problem.budget_bytes}: pass starts that fit"
            )
    if not 1 <= setting.batch_sequences <= setting.num_sequences:
        raise ValueError(
            f"expected 1 to {setting.num_sequences} sequences in a batch, got "
            f"{setting.batch_sequences}"
        )


def lower_to_fit(
    problem: Problem, assignment: Assignment, rng: np.random.Generator
) -> Assignment | None:
    """Step random units down until the assignment fits the budget.

    Args:
        problem: Bytes and budget.
        assignment: Option index of each unit; returned as it is when it fits already.
        rng: Picks the units, each that can step down with equal chance.

    Returns:
        An assignment within the budget, or ``None`` when even the cheapest is over it.
    """
    levels = list(assignment)
    excess = problem.total_bytes(assignment) - problem.budget_bytes
    able = [unit for unit, level in enumerate(levels) if level]
    while excess > 0 and able:
        position = int(rng.integers(len(able)))
        unit = able[position]
        cost = problem.bytes[unit]
        excess -= int(cost[levels[unit]] - cost[levels[unit] - 1])
        levels[unit] -= 1
        if not levels[unit]:
            able[position] = able[-1]
            able.pop()
    return tuple(levels) if excess <= 0 else None


def fill_budget(problem: Problem, assignment: Assignment, rng: np.random.Generator) -> Assignment:
    """Step random units up until no further step fits the budget.

    Args:
        problem: Bytes and budget.
        assignment: Option index of each unit, within the budget.
        rng: Picks the units, each that can step up with equal chance.
    """
    levels = list(assignment)
    slack = problem.budget_bytes - problem.total_bytes(assignment)
    able = list(range(len(levels)))
    while able:
        position = int(rng.integers(len(able)))
        unit = able[position]
        cost, level = problem.bytes[unit], levels[unit]
        if level + 1 < len(cost) and (step := int(cost[level + 1] - cost[level])) <= slack:
            levels[unit] += 1
            slack -= step
        else:  # slack only shrinks: what does not fit now never will
            able[position] = able[-1]
            able.pop()
    return tuple(levels)

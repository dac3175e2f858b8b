"""What an earlier run or study can tell a new run: losses where they mean the same, else starts.

The problem this file solves: measurements are dear, so a second search of the same model should
not begin from nothing. But a loss measured on other weights, other text or another objective would
mislead it silently. So losses carry over only under equal conditions; otherwise the assignments do,
as places to look at first. Guard and held-out measurements never carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allocator.measured_run import MeasuredRun, loss_conditions, option_labels, read_measured_run
from allocator.run_folder import existing_run
from allocator.study import read_study
from allocator.study_storage import is_storage
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment, SearchSpace


@dataclass(frozen=True)
class WarmStart:
    """What carries over from an earlier run. It may have had another budget.

    Attributes:
        starts: Distinct assignments in options of the new space, least loss at the source first.
        evaluations: Of the new run's search split, in the source's order; none where ``differs``.
        differs: What keeps the losses from carrying over, as words; empty where they do.
    """

    starts: tuple[Assignment, ...]
    evaluations: tuple[Evaluation, ...]
    differs: tuple[str, ...]


def read_warm_start(
    source: str, space: SearchSpace, header: Mapping[str, Any], *, runs: Path
) -> WarmStart:
    """What an earlier run or study says of a new run's space.

    Args:
        source: A run's folder or its name in ``runs``, or a study as ``STORAGE#STUDY``.
        space: Of the new run.
        header: Of the new run's journal.
        runs: Folder that holds the runs.

    Raises:
        ValueError: No such run or study, or nothing in it fits the space.
    """
    run = read_study(source) if is_storage(source) else _read_run(source, runs)
    ours = loss_conditions(header, space)
    differs = tuple(
        name
        for name in sorted({*ours, *run.conditions})
        if ours.get(name) != run.conditions.get(name)
    )
    translate = _translation(source, run, space)
    losses = run.losses()
    translated = {assignment: translate(assignment) for assignment in losses}
    ranked = sorted(losses, key=lambda assignment: losses[assignment][0])
    starts = tuple(dict.fromkeys(t for a in ranked if (t := translated[a]) is not None))
    if not starts:
        raise ValueError(
            f"nothing in {source} can be carried over: each of its {len(losses)} measured "
            "assignments uses an option that the new space does not offer"
        )
    evaluations = tuple(
        replace(evaluation, assignment=assignment)
        for evaluation in run.evaluations
        if evaluation.ok and (assignment := translated[evaluation.assignment]) is not None
    )
    return WarmStart(starts, () if differs else evaluations, differs)


def _read_run(source: str, runs: Path) -> MeasuredRun:
    try:
        folder = existing_run(source, runs)
    except ValueError as error:
        raise ValueError(f"{error}; a study is given as STORAGE#STUDY") from error
    return read_measured_run(folder)


def _translation(
    source: str, run: MeasuredRun, space: SearchSpace
) -> Callable[[Assignment], Assignment | None]:
    """From the source's option indices to the new space's; ``None`` where an option is missing."""
    menus = option_labels(space)
    if missing := [name for name in menus if name not in run.options]:
        raise ValueError(
            f"nothing in {source} can be carried over: it has no choice for {missing[0]} and "
            f"{len(missing) - 1} more of the new run's {len(menus)} units"
        )
    position = {name: index for index, name in enumerate(run.options)}
    new_index = {
        name: [menu.index(label) if label in menu else None for label in run.options[name]]
        for name, menu in menus.items()
    }

    def translate(assignment: Assignment) -> Assignment | None:
        found = [new_index[name][assignment[position[name]]] for name in menus]
        known = tuple(index for index in found if index is not None)
        return known if len(known) == len(found) else None

    return translate

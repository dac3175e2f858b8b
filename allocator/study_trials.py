"""A run as trials that people can read: a dozen numbers instead of hundreds of option indices.

The problem this file solves: plots of 224 or 560 raw choices show nothing, and Optuna's storages
pay for every parameter. So a trial's parameters are the mean bits per weight of each projection
kind and of each depth band, and the total bytes; what else there is goes into its attributes, the
assignment among them. No Optuna here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.measured_run import MeasuredRun
from allocator.plan import Plan
from allocator.plan_build import measure
from objectives.evaluation import Evaluation, Fidelity, evaluation_key
from search_spaces.space import Assignment, SearchSpace

_MOST_KINDS = 7
_MOST_BANDS = 4
BYTES = "total bytes"
"""The parameter that is a whole number; with two objectives it is the second of them instead."""
OVER_BUDGET = "bytes over the budget"
"""The constraint of a trial; at most 0 where it is feasible."""


@dataclass(frozen=True)
class TrialRow:
    """One measured assignment.

    Attributes:
        key: Of the assignment on the whole search split; names the trial for good.
        loss_nats: Adjusted loss, or ``None`` where every measurement failed.
        bytes: Exact bytes of the stored model and of searched caches.
        parameters: Bits per weight by group, and the bytes; few, and by name.
        attributes: Whatever else there is to say, as plain JSON data.
    """

    key: str
    loss_nats: float | None
    bytes: int
    parameters: dict[str, float]
    attributes: dict[str, Any]


def trial_rows(
    run: MeasuredRun, space: SearchSpace, plan: Plan | None, *, name: str
) -> list[TrialRow]:
    """Every assignment that was measured on the search split, in the order of measuring.

    Args:
        run: The measurements.
        space: Of the run.
        plan: Of the run, if it has come so far; it knows which assignment is which candidate.
        name: Of the run.
    """
    losses = run.losses()
    groups = unit_groups(space)
    by_assignment: dict[Assignment, list[Evaluation]] = {}
    for evaluation in run.evaluations:
        by_assignment.setdefault(evaluation.assignment, []).append(evaluation)
    checks = _full_measurements(run.others)
    rows = []
    for assignment, evaluations in by_assignment.items():
        size = space.stored_bytes(assignment)
        attributes = {
            "run": name,
            "space": space.sha256,
            "assignment": json.dumps(list(assignment), separators=(",", ":")),
            "bytes": size,
            "bits_per_weight": space.weight_bits(assignment),
            **_measured(run, evaluations, losses.get(assignment)),
            **_checked(plan, checks.get(assignment, {})),
        }
        bits = {group: _bits(space, units, assignment) for group, units in groups.items()}
        row = TrialRow(
            key=evaluation_key(assignment, Fidelity("search", 0, run.num_sequences)),
            loss_nats=losses[assignment][0] if assignment in losses else None,
            bytes=size,
            parameters={**bits, BYTES: size},
            attributes=attributes,
        )
        rows.append(row)
    return rows


def unit_groups(space: SearchSpace) -> dict[str, tuple[int, ...]]:
    """Indices of the units that one parameter speaks of, by the parameter's name.

    The largest kinds stand alone and the others together. Bands hold about equally many blocks and
    leave caches out, unless there is nothing else.
    """
    kinds: dict[str, list[int]] = {}
    for index, unit in enumerate(space.units):
        kinds.setdefault(unit.kind, []).append(index)
    if len(kinds) > _MOST_KINDS:
        sizes = {k: sum(space.units[i].num_elements for i in units) for k, units in kinds.items()}
        large = sorted(kinds, key=lambda kind: -sizes[kind])[: _MOST_KINDS - 1]
        rest = [index for kind, units in kinds.items() if kind not in large for index in units]
        kinds = {kind: units for kind, units in kinds.items() if kind in large} | {"others": rest}
    groups = {f"bits {kind}": tuple(units) for kind, units in kinds.items()}
    weights = any(not unit.is_cache for unit in space.units)
    banded = [i for i, unit in enumerate(space.units) if not (weights and unit.is_cache)]
    depths = sorted({d for i in banded if (d := space.units[i].depth) is not None})
    count = min(_MOST_BANDS, len(depths))
    for band in range(count if count > 1 else 0):
        inside = depths[band * len(depths) // count : (band + 1) * len(depths) // count]
        blocks = f"block {inside[0]}" if len(inside) == 1 else f"blocks {inside[0]}-{inside[-1]}"
        groups[f"bits {blocks}"] = tuple(i for i in banded if space.units[i].depth in inside)
    return groups


def _bits(space: SearchSpace, units: Sequence[int], assignment: Assignment) -> float:
    """Stored bits per weight, or per element of a cache, over some units."""
    size = sum(space.menus[i][assignment[i]].bytes for i in units)
    return 8 * size / sum(space.units[i].num_elements for i in units)


def _measured(
    run: MeasuredRun, evaluations: Sequence[Evaluation], loss: tuple[float, float] | None
) -> dict[str, Any]:
    """What the search split said of one assignment, whole enough to be searched with again."""
    ok = [e for e in evaluations if e.ok]
    indices = {i for e in ok for i in e.fidelity.indices(run.num_sequences)}
    plain = [{k: v for k, v in e.to_json().items() if k != "assignment"} for e in evaluations]
    found: dict[str, Any] = {
        "evaluations": json.dumps(plain, separators=(",", ":")),
        "num_sequences": len(indices),
    }
    if all(e.key in run.inherited for e in evaluations):
        found["inherited"] = True  # from the run that this one was warm-started with
    if loss is None:
        return found | {"error": evaluations[0].error}
    return found | {"standard_error_nats": loss[1]}


def _full_measurements(
    evaluations: Iterable[Evaluation],
) -> dict[Assignment, dict[str, Evaluation]]:
    """For each assignment its guard and held-out measurement, where it has one."""
    found: dict[Assignment, dict[str, Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.ok:
            found.setdefault(evaluation.assignment, {})[evaluation.fidelity.split] = evaluation
    return found


def _checked(plan: Plan | None, checks: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Guard and held-out losses of one assignment, and which candidate of the plan it is."""
    found: dict[str, Any] = {}
    for split, evaluation in checks.items():
        found[f"{split}_nats"] = evaluation.loss_nats
        found[f"{split}_standard_error_nats"] = evaluation.standard_error_nats
    if plan is None or not checks:
        return found
    # The plan names its candidates by their measurements, down to the last digit of each.
    ours = {split: measure(evaluation) for split, evaluation in checks.items()}
    theirs = {"guard": plan.guard_nats, "heldout": plan.heldout_nats}
    names = [
        name
        for name in dict.fromkeys([*plan.guard_nats, *plan.heldout_nats])
        if all(name not in theirs[s] or ours.get(s) == theirs[s][name] for s in theirs)
    ]
    return found | ({"candidate": ", ".join(names)} if names else {})

"""From an outcome to a plan: numbers gathered, none invented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import exp

from allocator.budget import Budget, dense_bytes
from allocator.config import SearchConfig
from allocator.pipeline import Outcome
from allocator.plan import (
    CalibrationRecord,
    FixedTensor,
    Measured,
    ModelIdentity,
    Paired,
    Plan,
    PlanMember,
    PlanUnit,
    SearchRecord,
)
from allocator.problem import Solution
from allocator.searches.base import FrontPoint
from allocator.searches.ledger import Ledger
from objectives.evaluation import Evaluation, mean, standard_error
from objectives.sensitivity import LossTable
from search_spaces.operators import operator_to_json
from search_spaces.space import Assignment, SearchSpace, Unit

_VERSIONED = ("model-allocator", "torch", "transformers", "optuna", "ray", "numpy", "scipy")


@dataclass(frozen=True)
class PlanFacts:
    """What a plan says besides its allocation.

    Attributes:
        model: Which model it is for.
        calibration: Where the tokens came from.
        objective: Name of the measured loss.
        dtype: Of the model while it was measured.
    """

    model: ModelIdentity
    calibration: CalibrationRecord | None
    objective: str
    dtype: str


def build_plan(
    space: SearchSpace,
    budget: Budget,
    search: SearchConfig,
    outcome: Outcome,
    facts: PlanFacts,
) -> Plan:
    """The plan of the returned candidate, with every baseline measured beside it."""
    chosen = outcome.candidates[outcome.returned]
    heldout = _with_returned(outcome, "heldout")
    measured = _search_measured(outcome)
    return _allocation(space, budget, chosen, facts).model_copy(
        update={
            "returned": outcome.returned,
            "scorer": search.scorer,
            "predicted_nats": predicted_loss(outcome.tables[search.scorer], chosen),
            "lower_bound_nats": outcome.solution.lower_bound,
            "gap_nats": outcome.solution.gap,
            "solver_status": outcome.solution.status.value,
            "search_nats": measured,
            "guard_nats": {
                k: measure(e) for k, e in _with_returned(outcome, "guard").items() if e.ok
            },
            "heldout_nats": {name: measure(e) for name, e in heldout.items() if e.ok},
            "heldout_differences_nats": _differences(heldout),
            "search": SearchRecord(
                name=search.name,
                seed=search.seed,
                window=search.window,
                num_evaluations=len(outcome.history.evaluations),
                num_failed=outcome.history.num_failed,
                history_sha256=outcome.history.sha256,
                stopped=outcome.history.stopped,
            ),
            "tokens": outcome.spent.tokens,
            "block_tokens": outcome.spent.block_tokens,
        }
    )


def solved_plan(
    space: SearchSpace,
    budget: Budget,
    table: LossTable,
    solution: Solution,
    facts: PlanFacts,
) -> Plan:
    """The plan of an additive solution that nothing measured: what ``allocator solve`` writes."""
    return _allocation(space, budget, solution.choice, facts).model_copy(
        update={
            "scorer": table.scorer,
            "predicted_nats": predicted_loss(table, solution.choice),
            "lower_bound_nats": solution.lower_bound,
            "gap_nats": solution.gap,
            "solver_status": solution.status.value,
        }
    )


def picked_plan(space: SearchSpace, budget: Budget, point: FrontPoint, run: Plan) -> Plan:
    """The plan of a point of a run's front: with its loss on the search's text, and no other.

    Args:
        space: Of the run.
        budget: Holds the point.
        point: What was measured of it.
        run: The run's own plan: for which model, on which text, by which search.
    """
    assert run.calibration is not None  # as every run's has
    each = run.calibration.splits["search"].sequence_length
    measured = Measured(
        nats=point.loss_nats,
        standard_error_nats=point.standard_error_nats,
        num_tokens=point.num_sequences * each * len(run.calibration.texts),
    )
    facts = PlanFacts(run.model, run.calibration, run.objective, run.dtype)
    status = "a point of the front that was measured, of which nothing is proved"
    return _allocation(space, budget, point.assignment, facts).model_copy(
        update={
            "returned": "search",
            "solver_status": status,
            "search_nats": {"search": measured},
            "search": run.search,
        }
    )


def unmeasured_plan(
    space: SearchSpace, budget: Budget, chosen: Assignment, facts: PlanFacts, *, maker: str
) -> Plan:
    """The plan of a formula, of which no loss is known, and which formula it is."""
    status = f"by {maker}; nothing was measured"
    return _allocation(space, budget, chosen, facts).model_copy(
        update={"returned": "formula", "solver_status": status}
    )


def predicted_loss(table: LossTable, assignment: Assignment) -> float:
    """What the additive table says of an assignment, in the table's unit."""
    return float(sum(row[i] for row, i in zip(table.losses, assignment, strict=True)))


def measure(evaluation: Evaluation) -> Measured:
    """The plan's record of one evaluation."""
    cross = evaluation.sequence_cross_entropy_nats
    return Measured(
        nats=evaluation.loss_nats,
        standard_error_nats=evaluation.standard_error_nats,
        num_tokens=evaluation.num_tokens,
        cross_entropy_nats=mean(cross) if cross else None,
        perplexity=exp(min(mean(cross), 700.0)) if cross else None,
    )


def paired(ours: Evaluation, theirs: Evaluation) -> Paired:
    """``ours - theirs`` on the same sequences."""
    assert ours.fidelity == theirs.fidelity
    differences = [a - b for a, b in zip(ours.sequence_nats, theirs.sequence_nats, strict=True)]
    return Paired(nats=mean(differences), standard_error_nats=standard_error(differences))


def versions() -> dict[str, str]:
    """Installed versions of what decides the numbers."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _allocation(space: SearchSpace, budget: Budget, chosen: Assignment, facts: PlanFacts) -> Plan:
    """A plan with its bytes and nothing measured."""
    achieved = space.stored_bytes(chosen)
    searched = space.bytes(chosen)
    operators = space.operators(chosen)
    return Plan(
        model=facts.model,
        space=space.name,
        ties=space.ties,
        budget_text=budget.text,
        budget_bytes=budget.stored_bytes,
        achieved_bytes=achieved,
        slack_bytes=budget.stored_bytes - achieved,
        searched_budget_bytes=budget.searched_bytes,
        searched_bytes=searched,
        bits_per_weight=space.weight_bits(chosen),
        dense_bytes=dense_bytes(space),
        units=tuple(
            _plan_unit(unit, operator_to_json(operator), unit.bytes(operator))
            for unit, operator in zip(space.units, operators, strict=True)
        ),
        fixed=tuple(FixedTensor(name=t.name, dtype=t.dtype, shape=t.shape) for t in space.fixed),
        returned="dp",
        scorer="",
        objective=facts.objective,
        dtype=facts.dtype,
        predicted_nats=None,
        lower_bound_nats=None,
        gap_nats=None,
        solver_status="",
        calibration=facts.calibration,
        versions=versions(),
    )


def _plan_unit(unit: Unit, operator: dict[str, object], size: int) -> PlanUnit:
    members = tuple(
        PlanMember(
            module=m.module,
            parameter=m.parameter,
            shape=m.shape,
            transposed=m.transposed,
            cache=m.cache,
        )
        for m in unit.members
    )
    return PlanUnit(
        name=unit.name,
        kind=unit.kind,
        depth=unit.depth,
        members=members,
        operator=operator,
        bytes=size,
    )


def _with_returned(outcome: Outcome, split: str) -> dict[str, Evaluation]:
    """The measured candidates of a split, and the returned one under that name too."""
    measured = outcome.evaluations[split]
    return {**measured, "returned": measured[outcome.returned]}


def _differences(heldout: Mapping[str, Evaluation]) -> dict[str, Paired]:
    """Paired differences of the returned plan to every other measured one."""
    returned = heldout["returned"]
    return {
        f"returned - {name}": paired(returned, other)
        for name, other in heldout.items()
        if name != "returned" and other.ok and returned.ok
    }


def _search_measured(outcome: Outcome) -> dict[str, Measured]:
    """Losses on the search text of the candidates that were measured there, or earlier."""
    ok = [e for e in (*outcome.inherited, *outcome.history.evaluations) if e.ok]
    if not ok:
        return {}
    ledger = Ledger(outcome.num_search_sequences)
    tokens: dict[Assignment, int] = {}
    for evaluation in ok:
        ledger.add(evaluation)
        spent = tokens.get(evaluation.assignment, 0)
        tokens[evaluation.assignment] = spent + evaluation.num_tokens
    found = {}
    for name, assignment in (
        outcome.candidates | {"returned": outcome.candidates[outcome.returned]}
    ).items():
        if assignment in tokens:
            nats, error = ledger.adjusted(assignment)
            found[name] = Measured(
                nats=nats, standard_error_nats=error, num_tokens=tokens[assignment]
            )
    return found

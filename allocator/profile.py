"""Profile a model: loss tables of any scorers, and how well each of them knows the truth.

The problem: every toolkit scores options by a heuristic of its own, and nobody compares them. Here
all scorers look at the same model, text and menus, and are held against measured losses on text
that none of them saw: of every unit alone at one level, and of random assignments within a budget.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.accounts import Records, recorded_evaluations, recorded_tokens
from allocator.journal import Journal
from allocator.pipeline import additive_problem
from allocator.searches.repair import fill_budget
from allocator.session import Session
from allocator.tables import Wanted, build_tables
from objectives.evaluation import Fidelity, evaluation_key
from objectives.sensitivity import SCORERS, LossTable
from objectives.sensitivity.one_at_a_time import dense_assignment
from search_spaces.space import Assignment, SearchSpace


@dataclass(frozen=True)
class Cost:
    """What a table cost, its statistics passes included.

    Scorers that read the same statistics are each charged for them, as if alone. Two things are
    charged to the first that needs them only: the statistics that operators of the space need, and
    measurements that ``one_at_a_time`` and ``marginal_perplexity`` share.

    Attributes:
        seconds: Wall time.
        tokens: Forward tokens; a backward counts as two.
    """

    seconds: float
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """How well a scorer's table agrees with measured losses; rank correlations, 1 is best.

    Attributes:
        scorer: Its name.
        unit: Of its losses.
        units_spearman: With the measured loss of every unit alone, at one level of the menu.
        units_kendall: The same, by pairs.
        random_spearman: Sum of losses of random assignments with their measured loss.
        random_kendall: The same, by pairs.
        cost: What the table cost.
    """

    scorer: str
    unit: str
    units_spearman: float
    units_kendall: float
    random_spearman: float
    random_kendall: float
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """Scorers against measured losses.

    Attributes:
        agreements: Best first, by the random assignments.
        level: Assignment that the single units take their option from: uniform at the budget.
        num_units: Units measured alone.
        num_random: Random assignments measured.
        num_tokens: Text they were measured on.
        left_out: Scorers that cannot serve this space, with the reason.
    """

    agreements: tuple[Agreement, ...]
    level: Assignment
    num_units: int
    num_random: int
    num_tokens: int
    left_out: dict[str, str]


def profile(session: Session, journal: Journal, scorers: Sequence[str]) -> dict[str, LossTable]:
    """The loss tables of some scorers; those that cannot serve the space are left out with a note.

    Raises:
        ValueError: The first scorer, or every one, cannot serve this space.
    """
    tables: dict[str, LossTable] = {}
    incumbent = session.space.uniform(session.budget.searched_bytes)
    for name in scorers:
        if _reason(journal, name) is not None:
            continue
        known = _cost(journal, name) is not None
        before = sum(recorded_tokens(journal).values())
        started = time.monotonic()
        try:
            tables |= build_tables(
                lambda: session.bench,
                Wanted(session.space, [name], incumbent),
                records=journal,
                store=None,  # what a table costs is part of the result
                reporter=session.reporter,
            )
        except ValueError as error:
            if len(scorers) == 1:
                raise
            session.reporter.note(f"the {name} scorer is left out: {error}")
            journal.append({"type": "left_out", "scorer": name, "reason": str(error)})
            continue
        if not known:
            tokens = sum(recorded_tokens(journal).values()) - before
            seconds = time.monotonic() - started
            journal.append({"type": "scored", "scorer": name, "seconds": seconds, "tokens": tokens})
    if not tables:
        raise ValueError(f"no scorer can serve this space: {_reason(journal, scorers[0])}")
    return tables


def compare(
    session: Session,
    journal: Journal,
    tables: Mapping[str, LossTable],
    *,
    num_random: int,
    num_sequences: int,
) -> Comparison:
    """Measure single units and random assignments, and hold the tables against them.

    Args:
        session: Its budget sets the level of the single units and the size of the random ones.
        journal: Measurements are recorded in it and never repeated.
        tables: By scorer.
        num_random: Random assignments that fill the budget.
        num_sequences: Of the search split, which no scorer looks at.

    Raises:
        ValueError: No uniform assignment fits the budget.
    """
    from scipy.stats import kendalltau, spearmanr  # slow to load

    space, budget = session.space, session.budget.searched_bytes
    level = space.uniform(budget)
    if level is None:
        raise ValueError("expected a budget at which a uniform assignment fits; raise it")
    dense = dense_assignment(space)
    if level == dense:
        raise ValueError("expected a budget below the dense model's bytes, such as 3.25bpw")
    units = [unit for unit in range(len(space.units)) if level[unit] != dense[unit]]
    alone = [(*dense[:unit], level[unit], *dense[unit + 1 :]) for unit in units]
    drawn = _random_assignments(session, tables, num_random)
    total = len(session.texts[0].splits["search"])
    fidelity = Fidelity("search", 0, min(num_sequences, total))
    losses = _measure(session, journal, [dense, *alone, *drawn], fidelity)
    singles = np.array([losses[a] for a in alone]) - losses[dense]
    together = np.array([losses[a] for a in drawn])
    agreements = []
    for name, table in tables.items():
        ours = [float(table.losses[unit][level[unit]]) for unit in units]
        sums = [sum(float(row[i]) for row, i in zip(table.losses, a, strict=True)) for a in drawn]
        cost = _cost(journal, name)
        agreements.append(
            Agreement(
                scorer=name,
                unit=SCORERS[name].unit,
                units_spearman=_rank(spearmanr(ours, singles).statistic),
                units_kendall=_rank(kendalltau(ours, singles).statistic),
                random_spearman=_rank(spearmanr(sums, together).statistic),
                random_kendall=_rank(kendalltau(sums, together).statistic),
                cost=cost or Cost(0.0, 0),
            )
        )
    left_out = {r["scorer"]: r["reason"] for r in journal.records if r["type"] == "left_out"}
    return Comparison(
        agreements=tuple(sorted(agreements, key=lambda a: -a.random_spearman)),
        level=level,
        num_units=len(units),
        num_random=len(drawn),
        num_tokens=fidelity.count * session.tokens_per_sequence,
        left_out=left_out,
    )


def _random_assignments(
    session: Session, tables: Mapping[str, LossTable], count: int
) -> list[Assignment]:
    """Distinct assignments that fill the budget; half of them near uniform, half anywhere.

    Anywhere alone would be a test at losses that nobody would ship.
    """
    space = session.space
    problem = additive_problem(space, next(iter(tables.values())), session.budget)
    rng = np.random.default_rng(session.config.search.seed)
    level = space.uniform(problem.budget_bytes)
    assert level is not None
    cheapest = tuple(int(np.argmin(cost)) for cost in problem.bytes)
    found: dict[Assignment, None] = {}
    for turn in range(100 * count):
        if len(found) == count:
            break
        start = np.array(cheapest)
        if turn % 2:
            kept = rng.random(len(level)) < rng.uniform(0.5, 1.0)
            start = np.where(kept, level, np.maximum(np.array(level) - 1, 0))
        with suppress(IndexError):
            found[fill_budget(problem, tuple(int(i) for i in start), rng)] = None
    return list(found)


def _measure(
    session: Session, journal: Journal, assignments: Sequence[Assignment], fidelity: Fidelity
) -> dict[Assignment, float]:
    """The measured losses, each measured once per journal.

    Raises:
        ValueError: One failed.
    """
    known = recorded_evaluations(journal.records)
    losses = {}
    advance = session.reporter.stage("measuring", len(assignments))
    for done, assignment in enumerate(assignments, start=1):
        found = known.get(evaluation_key(assignment, fidelity))
        if found is None:
            found = session.bench.evaluator(assignment, fidelity)
            journal.append({"type": "evaluation", "evaluation": found.to_json()})
        if not found.ok:
            raise ValueError(f"a measurement failed: {found.error}")
        losses[assignment] = found.loss_nats
        advance(done, "")
    return losses


def _rank(value: float) -> float:
    """A rank correlation; 0 where a constant has no ranks."""
    return float(value) if np.isfinite(value) else 0.0


def _cost(records: Records, scorer: str) -> Cost | None:
    """What the journal says a table cost; the first time counts."""
    for record in records.records:
        if record["type"] == "scored" and record["scorer"] == scorer:
            return Cost(record["seconds"], record["tokens"])
    return None


def _reason(records: Records, scorer: str) -> str | None:
    """Why a scorer was left out, if it was."""
    for record in records.records:
        if record["type"] == "left_out" and record["scorer"] == scorer:
            return str(record["reason"])
    return None


def summarise(table: LossTable, space: SearchSpace) -> list[tuple[str, NDArray[np.float64]]]:
    """Sums of a table's losses over the units of each kind, by position in their menus.

    Kinds whose units have menus of different lengths get as many columns as the shortest.
    """
    kinds: dict[str, list[NDArray[np.float64]]] = {}
    for unit, row in zip(space.units, table.losses, strict=True):
        kinds.setdefault(unit.kind, []).append(row)
    return [
        (kind, np.sum([row[: min(map(len, rows))] for row in rows], axis=0))
        for kind, rows in kinds.items()
    ]

"""Loss tables: computed cell by cell, kept in the journal, shared between runs.

A table depends on the weights, the space, the statistics text and the scorer, never on the budget:
a second run at another budget finds the first one's table and needs no statistics pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from allocator.accounts import Records, spending
from allocator.bench import Bench
from allocator.reporter import Reporter
from allocator.run_folder import read_arrays
from objectives.kv_cache import CacheLosses
from objectives.sensitivity import SCORERS, LossTable, Scorer, ScoringContext
from objectives.statistics import text_of
from search_spaces.space import Assignment, SearchSpace
from search_spaces.whole_file import replacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableStore:
    """Finished tables on disk, by content address.

    Attributes:
        folder: Where they are kept; made when first needed.
        identity: Everything but scorer and space that a table depends on: the model's weights, the
            statistics text and the precision.
        incumbent: What tables that are measured around a plan depend on too.
    """

    folder: Path
    identity: str
    incumbent: Assignment | None = None

    def path(self, scorer: str, space: SearchSpace) -> Path:
        """File of one table. The name of the space does not matter, only what it offers."""
        about: list[Any] = [self.identity, scorer, space.to_json() | {"name": ""}]
        if getattr(SCORERS[scorer], "from_incumbent", False):
            about.append(self.incumbent)
        text = json.dumps(about, sort_keys=True)
        return self.folder / f"{scorer}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def load(self, scorer: str, space: SearchSpace) -> list[list[float]] | None:
        """The rows of a table, or ``None`` when there is none that can be read."""
        path = self.path(scorer, space)
        if not path.exists():
            return None
        try:
            return _split(read_arrays(path)["losses"], space)
        except (ValueError, KeyError) as error:
            logger.warning("made again: %s", error)
            return None

    def save(self, table: LossTable, space: SearchSpace) -> None:
        """Keep a finished table; whoever comes second overwrites with the same content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(table.scorer, space)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, losses=np.concatenate(table.losses))


@dataclass(frozen=True)
class Wanted:
    """Which tables.

    Attributes:
        space: Units and menus.
        scorers: Names; the first is the run's own.
        incumbent: What scorers that measure around a plan start from; part of their tables'
            address.
    """

    space: SearchSpace
    scorers: Sequence[str]
    incumbent: Assignment | None = None


def build_tables(
    bench_of: BenchSource,
    wanted: Wanted,
    *,
    records: Records,
    store: TableStore | None,
    reporter: Reporter,
) -> dict[str, LossTable]:
    """The loss table of each scorer, computing only the cells that are not recorded yet.

    A scorer that cannot serve this space (its inputs cannot be observed) is left out with a note,
    unless it is the first, which the run depends on.

    Args:
        bench_of: Gives the live bench; only called when something has to be computed.
        wanted: Which tables.
        records: The journal; each cell is appended as soon as it is known.
        store: Tables of earlier runs, or ``None``.
        reporter: Shown the progress.

    Raises:
        ValueError: An unknown scorer, or the first one cannot serve this space.
    """
    space, incumbent = wanted.space, wanted.incumbent
    store = None if store is None else replace(store, incumbent=incumbent)
    left_out = {record["scorer"] for record in records.records if record["type"] == "left_out"}
    scorers = [name for name in wanted.scorers if name not in left_out]
    rows = {name: _recorded(records, name, space) for name in scorers}
    for name in scorers:
        known = None if store is None or _complete(rows[name]) else store.load(name, space)
        if known is not None:
            records.append({"type": "table", "scorer": name, "losses": known})
            rows[name] = [list(row) for row in known]
    missing = [name for name in scorers if not _complete(rows[name])]
    if missing:
        kinds = {name: SCORERS[name]() for name in missing}
        bench = bench_of()
        context = _observe(bench, space, list(kinds.values()), records, reporter)
        context = replace(context, incumbent=incumbent)
        for name, scorer in kinds.items():
            try:
                with spending(bench.meter, records, name):
                    _fill(scorer, context, rows[name], records, reporter)
            except ValueError as error:
                if name == scorers[0]:
                    raise
                reporter.note(f"the {name} scorer is left out: {error}")
                records.append({"type": "left_out", "scorer": name, "reason": str(error)})
                del rows[name]
    tables = {
        name: LossTable(name, SCORERS[name].unit, tuple(np.array(row, float) for row in table))
        for name, table in rows.items()
    }
    if store is not None:
        for name in set(missing) & set(tables):
            store.save(tables[name], space)
    return tables


class BenchSource(Protocol):
    """Gives the live bench, building it the first time."""

    def __call__(self) -> Bench:
        """The bench."""
        ...


def _observe(
    bench: Bench,
    space: SearchSpace,
    scorers: Sequence[Scorer],
    records: Records,
    reporter: Reporter,
) -> ScoringContext:
    """Run the statistics pass that the scorers need."""
    needs = frozenset[str]().union(*(scorer.needs_for(space) for scorer in scorers))
    read = text_of(bench.task, needs | space.needs)
    advance = reporter.stage("statistics", sum(map(len, read.values())))
    with spending(bench.meter, records, "scorers"):
        statistics = bench.observe(needs, lambda done, total: advance(done, ""))
    caches = CacheLosses(bench.model, bench.task, space, bank=bench.bank, meter=bench.meter)
    return ScoringContext(
        space=space,
        bank=bench.bank,
        statistics=statistics,
        model=bench.model,
        task=bench.task,
        meter=bench.meter,
        evaluator=bench.evaluator,
        caches=caches,
    )


def _fill(
    scorer: Scorer,
    context: ScoringContext,
    rows: list[list[float | None]],
    records: Records,
    reporter: Reporter,
) -> None:
    """Compute the missing cells of one table."""
    todo = [(u, o) for u, row in enumerate(rows) for o, loss in enumerate(row) if loss is None]
    advance = reporter.stage(f"scoring: {scorer.name}", len(todo))
    scored = zip(todo, scorer.losses(context, todo), strict=True)
    for done, ((unit, option), loss) in enumerate(scored, start=1):
        if not np.isfinite(loss):
            raise ValueError(
                f"the {scorer.name} loss of {context.space.units[unit].name} is {loss}; "
                "its weights or statistics are not finite"
            )
        records.append(
            {"type": "cell", "scorer": scorer.name, "unit": unit, "option": option, "loss": loss}
        )
        rows[unit][option] = loss
        advance(done, "")


def _recorded(records: Records, scorer: str, space: SearchSpace) -> list[list[float | None]]:
    """What the journal already holds of a table."""
    rows: list[list[float | None]] = [[None] * len(menu) for menu in space.menus]
    for record in records.records:
        if record["type"] == "table" and record["scorer"] == scorer:
            rows = [list(row) for row in record["losses"]]
        elif record["type"] == "cell" and record["scorer"] == scorer:
            rows[record["unit"]][record["option"]] = record["loss"]
    return rows


def _complete(rows: Sequence[Sequence[float | None]]) -> bool:
    return all(loss is not None for row in rows for loss in row)


def _split(flat: np.ndarray[Any, np.dtype[np.float64]], space: SearchSpace) -> list[list[float]]:
    """Cut one array into the menus' rows."""
    ends = np.cumsum([len(menu) for menu in space.menus])
    return [part.tolist() for part in np.split(flat, ends[:-1])]

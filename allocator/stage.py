"""What a run has to work with, once its model, space and budget are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allocator.accounts import Records
from allocator.budget import Budget
from allocator.config import CapsConfig, SearchConfig
from allocator.executors import Executor
from allocator.reporter import Reporter
from allocator.searches import preferred_sequences
from allocator.tables import BenchSource, TableStore
from search_spaces.space import SearchSpace


@dataclass(frozen=True)
class Stage:
    """What a run has to work with.

    Attributes:
        space: Units, menus, bytes.
        budget: Resolved for the space.
        search: Which search, scorer, seed, window.
        caps: Where the search stops.
        records: The journal.
        bench: Gives the live bench of this process.
        executor: Starts what measures; called once, when something has to be measured.
        num_sequences: Of the splits ``search``, ``guard`` and ``heldout``.
        tokens_per_sequence: Of the task.
        has_slopes: Whether the gradient of the task's loss is that of what is measured.
        store: Tables of earlier runs.
        reporter: Shown the progress.
        extend: Search on where an earlier session's search had ended.
    """

    space: SearchSpace
    budget: Budget
    search: SearchConfig
    caps: CapsConfig
    records: Records
    bench: BenchSource
    executor: Callable[[], Executor]
    num_sequences: Mapping[str, int]
    tokens_per_sequence: int
    has_slopes: bool
    store: TableStore | None
    reporter: Reporter
    extend: bool = False

    @property
    def batch(self) -> int:
        """Sequences per evaluation."""
        return self.search.batch or preferred_sequences(self.search.name)

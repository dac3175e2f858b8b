"""One measurement per assignment, each on the next window, and what makes them comparable.

The problem: measuring every assignment on all text is dear, and the same window for all overfits
it. So each new assignment is measured on the next window of the split, and the first start on every
window that is used, which ties the windows' difficulties together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.ledger import Ledger
from allocator.searches.repair import check_setting
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment


class PairedSearch(ABC):
    """A search that proposes starts first, then what it draws, on window after window.

    Args:
        setting: What to search.
        remeasure_every: Every so many proposals the best so far is measured on more text; 0 never.
    """

    name: ClassVar[str]

    def __init__(self, setting: SearchSetting, *, remeasure_every: int = 0) -> None:
        check_setting(setting)
        self._setting = setting
        self._remeasure_every = remeasure_every
        self._rng = np.random.default_rng(setting.seed)
        self._ledger = Ledger(setting.num_sequences)
        self._asked: dict[Assignment, set[Fidelity]] = {}  # what was proposed, on which windows
        self._starts = list(dict.fromkeys(setting.starts))
        self._windows: set[Fidelity] = set()
        self._num_asked = self._num_drawn = 0

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals; fewer when hardly anything new is left to draw."""
        proposals: list[Proposal] = []
        while len(proposals) < count and (proposal := self._propose()) is not None:
            self._num_asked += 1
            self._windows.add(proposal.fidelity)
            self._asked.setdefault(proposal.assignment, set()).add(proposal.fidelity)
            proposals.append(proposal)
        return proposals

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Remember what was measured."""
        for evaluation in evaluations:
            self._ledger.add(evaluation)

    @property
    def best(self) -> Assignment | None:
        """The least loss after removing the windows' difficulty; it may be a start."""
        return self._ledger.best()

    @abstractmethod
    def _draw(self) -> Assignment | None:
        """An assignment that was not proposed yet; ``None`` where hardly any is left."""

    def _propose(self) -> Proposal | None:
        """The best again in its turn, a start, the first one on a new window, or what is drawn."""
        every = self._remeasure_every
        if every and self._num_asked and self._num_asked % every == 0:
            again = self._again()
            if again is not None:
                return again
        window = self._setting.fidelity(self._num_drawn)
        if self._starts:
            return Proposal(self._starts.pop(0), window)
        if window not in self._windows:
            return Proposal(self._setting.starts[0], window)
        drawn = self._draw()
        if drawn is None:
            return None
        self._num_drawn += 1
        return Proposal(drawn, window)

    def _again(self) -> Proposal | None:
        """The best on one more of the windows in use; ``None`` after all of them."""
        best = self.best
        if best is None:
            return None
        left = self._windows - self._asked.get(best, set())
        return Proposal(best, min(left, key=lambda window: window.first)) if left else None

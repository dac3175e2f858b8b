"""Random search: the baseline that every other search has to beat.

Each proposal starts from the cheapest assignment and steps random units up, every unit that can
still step with equal chance, until no step fits: it uses the budget as fully as single steps can.
That is a random order of upgrades, not a uniform draw from all assignments that fill the budget;
levels spread about their mean as in a multinomial. Proposals are measured once, each on the next
window; the first start is measured on every window that is used, so that the windows' difficulty
can be removed before the best is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.ledger import Ledger
from allocator.searches.repair import check_setting, fill_budget
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

_MOST_DRAWS = 100


class RandomSearch:
    """Starts, then random assignments that fill the budget, no two alike.

    Args:
        setting: What to search.
    """

    name: ClassVar[str] = "random"

    def __init__(self, setting: SearchSetting) -> None:
        check_setting(setting)
        self._setting = setting
        self._rng = np.random.default_rng(setting.seed)
        self._ledger = Ledger(setting.num_sequences)
        self._starts = list(dict.fromkeys(setting.starts))
        self._windows: set[Fidelity] = set()
        self._asked: set[Assignment] = set()
        self._num_drawn = 0

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals; fewer when hardly any assignment is left to draw."""
        proposals: list[Proposal] = []
        while len(proposals) < count and (proposal := self._propose()) is not None:
            proposals.append(proposal)
        return proposals

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Remember what was measured."""
        for evaluation in evaluations:
            self._ledger.add(evaluation)

    @property
    def best(self) -> Assignment | None:
        """The least loss after removing the windows' difficulty."""
        return self._ledger.best()

    def _propose(self) -> Proposal | None:
        window = self._setting.fidelity(self._num_drawn)
        if self._starts:
            self._windows.add(window)
            start = self._starts.pop(0)
            self._asked.add(start)
            return Proposal(start, window)
        if window not in self._windows:
            self._windows.add(window)
            return Proposal(self._setting.starts[0], window)
        problem = self._setting.problem
        cheapest = (0,) * len(problem.bytes)
        for _ in range(_MOST_DRAWS):
            drawn = fill_budget(problem, cheapest, self._rng)
            if drawn not in self._asked:
                self._asked.add(drawn)
                self._num_drawn += 1
                return Proposal(drawn, window)
        return None

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
from allocator.searches.paired import PairedWindows
from allocator.searches.repair import check_setting, fill_budget
from objectives.evaluation import Evaluation
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
        self._paired = PairedWindows(setting)

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals; fewer when hardly any assignment is left to draw."""
        proposals: list[Proposal] = []
        while len(proposals) < count and (proposal := self._paired.propose(self._draw)) is not None:
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

    def _draw(self) -> Assignment | None:
        problem = self._setting.problem
        cheapest = (0,) * len(problem.bytes)
        for _ in range(_MOST_DRAWS):
            drawn = fill_budget(problem, cheapest, self._rng)
            if drawn not in self._paired.asked:
                return drawn
        return None

"""Random search: the baseline that every other search has to beat.

Each proposal starts from the cheapest assignment and steps random units up, every unit that can
still step with equal chance, until no step fits: it uses the budget as fully as single steps can.
That is a random order of upgrades, not a uniform draw from all assignments that fill the budget;
levels spread about their mean as in a multinomial. Proposals are measured once, each on the next
window; the first start is measured on every window that is used, so that the windows' difficulty
can be removed before the best is chosen.
"""

from __future__ import annotations

from typing import ClassVar

from allocator.searches.paired import PairedSearch
from allocator.searches.repair import fill_budget
from search_spaces.space import Assignment

_MOST_DRAWS = 100


class RandomSearch(PairedSearch):
    """Starts, then random assignments that fill the budget, no two alike.

    Args:
        setting: What to search.
    """

    name: ClassVar[str] = "random"

    def _draw(self) -> Assignment | None:
        problem = self._setting.problem
        cheapest = (0,) * len(problem.bytes)
        for _ in range(_MOST_DRAWS):
            drawn = fill_budget(problem, cheapest, self._rng)
            if drawn not in self._asked:
                return drawn
        return None

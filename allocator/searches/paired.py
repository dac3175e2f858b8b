"""One measurement per assignment, each on the next window, and what makes them comparable.

The problem: measuring every assignment on all text is dear, and the same window for all overfits
it. So each new assignment is measured on the next window of the split, and the first start on every
window that is used, which ties the windows' difficulties together.
"""

from __future__ import annotations

from collections.abc import Callable

from allocator.searches.base import Proposal, SearchSetting
from objectives.evaluation import Fidelity
from search_spaces.space import Assignment


class PairedWindows:
    """Makes proposals of what a search draws: starts first, then draws on window after window.

    Args:
        setting: Starts and windows.

    Attributes:
        asked: What was proposed so far, on which windows.
    """

    def __init__(self, setting: SearchSetting) -> None:
        self.asked: dict[Assignment, set[Fidelity]] = {}
        self._setting = setting
        self._starts = list(dict.fromkeys(setting.starts))
        self._windows: set[Fidelity] = set()
        self._num_drawn = 0

    def propose(self, draw: Callable[[], Assignment | None]) -> Proposal | None:
        """The next start, the first start on a window that is new, or else what is drawn."""
        window = self._setting.fidelity(self._num_drawn)
        if self._starts:
            return self._note(self._starts.pop(0), window)
        if window not in self._windows:
            return self._note(self._setting.starts[0], window)
        drawn = draw()
        if drawn is None:
            return None
        self._num_drawn += 1
        return self._note(drawn, window)

    def again(self, assignment: Assignment) -> Proposal | None:
        """An assignment on one more of the windows in use; ``None`` after all of them."""
        met = self.asked.get(assignment, set())
        for window in sorted(self._windows - met, key=lambda window: window.first):
            return self._note(assignment, window)
        return None

    def _note(self, assignment: Assignment, window: Fidelity) -> Proposal:
        self._windows.add(window)
        self.asked.setdefault(assignment, set()).add(window)
        return Proposal(assignment, window)

"""Several searches on one budget, each told what all of them measure.

The problem: which search is best depends on the space and on how much may be measured, and that is
known afterwards. Searches take turns proposing; every result is told to all of them. What one asks
that another has had measured is answered at once and costs nothing. Each learns what it can:
Optuna's samplers on multipliers from assignments that some multipliers nearly give, cma and gp from
the best of those; formula, optspa and random only how difficult the text is and what the best is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from allocator.searches.base import FrontPoint, Noting, Proposal, Search
from allocator.searches.ledger import Ledger
from objectives.evaluation import Evaluation, evaluation_key
from search_spaces.space import Assignment

_MOST_ROUNDS = 100  # of all searches, while they are told what is known
_MOST_SHARED = 50  # proposals of one search in its turn that are known or under way already


class Portfolio:
    """Searches in turn, a proposal each.

    Args:
        searches: Fresh, made from one setting.
        num_sequences: Sequences in the search split.
    """

    name: ClassVar[str] = "portfolio"

    def __init__(self, searches: Sequence[Search], num_sequences: int) -> None:
        if not searches:
            raise ValueError("expected at least one search, got none")
        self._searches = tuple(searches)
        self._ledger = Ledger(num_sequences)
        self._known: dict[str, Evaluation] = {}
        self._waiting: dict[str, list[int]] = {}  # who asked for what is under way
        self._turn = 0

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals, or fewer when no search has any (for now)."""
        proposals: list[Proposal] = []
        open_ = list(pending)
        while len(proposals) < count and (proposal := self._propose(open_)) is not None:
            proposals.append(proposal)
            open_.append(proposal.assignment)
        return proposals

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Tell every search; those that asked more than once as often as they asked."""
        for evaluation in evaluations:
            self._ledger.add(evaluation)
            self._known[evaluation.key] = evaluation
            asked = self._waiting.pop(evaluation.key, [])
            for index, search in enumerate(self._searches):
                for _ in range(max(1, asked.count(index))):
                    search.tell([evaluation])

    @property
    def best(self) -> Assignment | None:
        """The least loss over everything told, after removing the sequences' difficulty."""
        return self._ledger.best()

    @property
    def ended(self) -> str:
        """Why each search that says so proposes nothing more."""
        said = ((search.name, getattr(search, "ended", "")) for search in self._searches)
        return "; ".join(f"{name}: {words}" for name, words in said if words)

    @property
    def front(self) -> Sequence[FrontPoint]:
        """The front of the first search that keeps one: it was told what all measured."""
        found = (getattr(search, "front", None) for search in self._searches)
        return next((front for front in found if front is not None), ())

    @property
    def formula(self) -> object | None:
        """The expression of the first search that looks for one."""
        found = (getattr(search, "formula", None) for search in self._searches)
        return next((formula for formula in found if formula is not None), None)

    def notes(self) -> dict[str, float]:
        """The notes of each search, under its name."""
        return {
            f"{search.name}: {key}": value
            for search in self._searches
            if isinstance(search, Noting)
            for key, value in search.notes().items()
        }

    def _propose(self, pending: Sequence[Assignment]) -> Proposal | None:
        """From the first search, in turn, that has something new to measure."""
        for _ in range(_MOST_ROUNDS):
            answered = False
            for _ in self._searches:
                index = self._turn
                self._turn = (self._turn + 1) % len(self._searches)
                found, learned = self._turn_of(index, pending)
                if found is not None:
                    return found
                answered |= learned
            if not answered:  # none would be asked for anything else in another round
                break
        return None

    def _turn_of(self, index: int, pending: Sequence[Assignment]) -> tuple[Proposal | None, bool]:
        """What a search wants that is new; and whether it was told anything that is known."""
        answered = False
        for _ in range(_MOST_SHARED):
            asked = self._searches[index].ask(1, pending)
            if not asked:
                break
            key = evaluation_key(asked[0].assignment, asked[0].fidelity)
            if key in self._known:
                self._searches[index].tell([self._known[key]])
                answered = True
            elif key in self._waiting:
                self._waiting[key].append(index)
            else:
                self._waiting[key] = [index]
                return asked[0], answered
        return None, answered

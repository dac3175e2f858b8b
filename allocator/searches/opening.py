"""The opening of a search: which of several starts to begin from, and by whose table.

The problem: tables disagree on where the best plan is, and which of them is right differs from
model to model, menu to menu and budget to budget. Their optima cost a few sequences each to tell
apart, and a table whose optimum is far from the best misleads every step that is taken by it. So
all starts race on the same text, twice as much after every rung. Those that are significantly worse
than the best are dropped, or worse by much on every sequence, which little text shows; where text
does not tell the least mean wins. The race is short: between starts that four sequences cannot tell
apart it hardly matters, and the text is worth more to the steps that follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.racing import Verdict, judge
from allocator.solvers.dynamic import Oracle
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment


@dataclass(frozen=True)
class OpeningOptions:
    """Tuning of :class:`Opening`.

    Attributes:
        first_sequences: Of the first rung.
        most_sequences: The race ends after so many.
        level: Of each judgement; see :func:`allocator.searches.racing.judge`.
        hopeless: A start is dropped too if it loses on every sequence so many times the best.
    """

    first_sequences: int = 2
    most_sequences: int = 4
    level: float = 0.05
    hopeless: float = 1.1

    def __post_init__(self) -> None:
        if not 1 <= self.first_sequences <= self.most_sequences:
            raise ValueError(
                "expected 1 <= first_sequences <= most_sequences, got "
                f"{self.first_sequences} and {self.most_sequences}"
            )
        if not 1 < self.hopeless < math.inf:
            raise ValueError(f"hopeless must be above 1 and finite, got {self.hopeless}")
        if not 0 <= self.level < 0.5:
            raise ValueError(f"level must be 0 to below 0.5, got {self.level}")


_DEFAULTS = OpeningOptions()
_LEAST = 2  # sequences that may show someone to be hopeless


class Opening:
    """A race of a setting's starts.

    Proposals of one rung can be measured in parallel; between rungs it waits. A single start wins
    unmeasured.

    Args:
        setting: Starts, the earlier the better where losses are equal; windows of the search
            split, of which the first are read.
        options: Tuning.

    Attributes:
        winner: Where to begin; ``None`` while the race is open.
    """

    def __init__(self, setting: SearchSetting, options: OpeningOptions = _DEFAULTS) -> None:
        size = setting.batch_sequences
        num_windows = min(max(1, options.most_sequences // size), -(-setting.num_sequences // size))
        self._setting = setting
        self._first = max(1, options.first_sequences // size)
        self._num_read = 0
        self._text = [setting.fidelity(index) for index in range(num_windows)]
        self._options = options
        self._losses: dict[Assignment, list[float]] = {start: [] for start in setting.starts}
        self._queue: list[Proposal] = []
        self._told: dict[Proposal, tuple[float, ...] | None] = {}
        self.winner: Assignment | None = None
        self._next_rung()

    def ask(self) -> Proposal | None:
        """The next proposal of the rung; ``None`` while it waits for results, or at its end."""
        return self._queue.pop(0) if self._queue else None

    def tell(self, evaluation: Evaluation) -> None:
        """Take in a result; those that this race did not ask for are ignored."""
        proposal = Proposal(evaluation.assignment, evaluation.fidelity)
        if proposal not in self._told:
            return
        failed = (math.inf,) * evaluation.fidelity.count
        self._told[proposal] = evaluation.sequence_nats if evaluation.ok else failed
        if None not in self._told.values():
            self._judge()
            self._told = {}
            self._next_rung()

    @cached_property
    def own(self) -> SearchSetting:
        """The setting from the winner on: it is the first start, and its table the problem's.

        That is the table whose optimum it is, the problem's own before others; where it is
        nobody's, the problem's stays.
        """
        assert self.winner is not None, "the race is open"
        problem, oracle = self._setting.problem, Oracle(self._setting.problem.bytes)
        for table in (problem.losses, *self._setting.tables):
            if oracle.solve(table, problem.budget_bytes).choice == self.winner:
                problem = replace(problem, losses=table)
                break
        starts = dict.fromkeys([self.winner, *self._setting.starts])
        return replace(self._setting, problem=problem, starts=tuple(starts))

    def _judge(self) -> None:
        """Drop who is clearly worse than the best on the text so far."""
        for proposal, losses in self._told.items():
            self._losses[proposal.assignment] += losses or ()
        best = self._losses[self._best()]
        self._losses = {
            start: losses for start, losses in self._losses.items() if self._stays(losses, best)
        }

    def _stays(self, losses: list[float], best: list[float]) -> bool:
        """Whether a start may still be the best; ``best`` itself does."""
        if judge(losses, best, self._options.level) is Verdict.WORSE:
            return losses is best
        factor = self._options.hopeless
        return len(losses) < _LEAST or any(
            theirs <= 0 or ours <= factor * theirs
            for ours, theirs in zip(losses, best, strict=True)
        )

    def _next_rung(self) -> None:
        """All that are left on as much text again as was read; or the end."""
        if len(self._losses) == 1 or self._num_read == len(self._text):
            self.winner = self._best()
            return
        rung = self._text[self._num_read :][: self._num_read or self._first]
        self._num_read += len(rung)
        self._queue = [Proposal(start, text) for text in rung for start in self._losses]
        self._told = dict.fromkeys(self._queue)

    def _best(self) -> Assignment:
        """Of the least mean; the earliest start wins ties."""
        return min(self._losses, key=lambda start: float(np.mean(self._losses[start] or [0.0])))

"""Descent: from assignment to assignment along measured slopes, each step decoded exactly.

The problem: a hundred measurements of whole assignments say little about a thousand options. One
backward pass says something about each of them, at the assignment it is taken at. So slopes are
read off at the best assignment so far, the exact solver finds the best step by them within the
budget, and the step is taken if it is better on text that its slopes have not seen, on which the
next slopes are read. That is Gauss and Newton's method with a knapsack for the linear system: the
damping that keeps steps short grows when one fails and shrinks when one succeeds, as Levenberg and
Marquardt's.

Steps read little text at first, and more when they fail. A candidate races against the assignment
it would replace: it is dropped, or taken, as soon as their difference on the text read so far is
significant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.local_table import DAMPING, LocalTable
from allocator.searches.racing import Verdict, judge
from allocator.solvers.dynamic import Oracle
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment


@dataclass(frozen=True)
class DescentOptions:
    """Tuning of :class:`Descent`.

    Attributes:
        first_sequences: Sequences for slopes, and as many at most for candidates, at first.
        most_sequences: And at most; doubled after steps that failed.
        race_sequences: A race may read at least so many.
        damping: Of the first step; see :mod:`allocator.searches.local_table`.
        calmer: Factor of the damping after a step that failed.
        bolder: And after one that succeeded.
        attempts: Candidates from one measurement of slopes.
        patience: The descent ends after so many failed steps in a row on the most sequences.
        rung_sequences: A candidate's race is judged after every so many sequences.
        level: Of each judgement; see :func:`allocator.searches.racing.judge`.
    """

    first_sequences: int = 4
    most_sequences: int = 16
    damping: float = DAMPING
    calmer: float = 1.5
    bolder: float = 0.9
    attempts: int = 2
    patience: int = 2
    race_sequences: int = 4
    rung_sequences: int = 4
    level: float = 0.05

    def __post_init__(self) -> None:
        whole = ("first_sequences", "attempts", "patience", "race_sequences", "rung_sequences")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.most_sequences < self.first_sequences:
            raise ValueError(
                f"expected at least first_sequences ({self.first_sequences}) as most_sequences, "
                f"got {self.most_sequences}"
            )
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be positive and finite, got {self.damping}")
        if not 0 <= self.level < 0.5:
            raise ValueError(f"level must be 0 to below 0.5, got {self.level}")
        if not 0 < self.bolder < 1 < self.calmer:
            raise ValueError(
                f"expected bolder < 1 < calmer, got bolder {self.bolder} and calmer {self.calmer}"
            )


_DEFAULTS = DescentOptions()
_LEAST_DAMPING = 0.5


class Descent:
    """Damped Gauss-Newton steps over assignments.

    Proposals of one round can be measured in parallel; between rounds it waits.

    Args:
        setting: Problem, windows of the search split; the seed orders them. The first start is
            where it begins.
        options: Tuning.

    Attributes:
        table: Slopes so far; its centre is where the descent stands.
        damping: Of the next step.
        ended: Nothing more is proposed: steps do not help any more, or there are no slopes.
    """

    def __init__(self, setting: SearchSetting, options: DescentOptions = _DEFAULTS) -> None:
        self.table = LocalTable(setting.problem)
        self.damping = options.damping
        self.ended = False
        self._setting = setting
        self._options = options
        self._oracle = Oracle(setting.problem.bytes)
        size = setting.batch_sequences
        self._num_windows = -(-setting.num_sequences // size)
        self._most = min(max(1, options.most_sequences // size), self._num_windows)
        self._count = min(max(1, options.first_sequences // size), self._most)
        self._order = np.random.default_rng(setting.seed).permutation(self._num_windows)
        self._next_window = 0
        self._centre = setting.starts[0]
        self._tried = {self._centre}
        self._num_failed = 0
        self._num_attempts = 0
        self._candidate: Assignment | None = None
        self._queue: list[Proposal] = []
        self._waiting: set[Proposal] = set()
        self._losses: dict[tuple[Assignment, Fidelity], tuple[float, ...]] = {}
        self._rung = max(1, options.rung_sequences // size)
        self._longest_race = min(max(1, options.race_sequences // size), self._num_windows)
        self._windows: list[Fidelity] = []
        self._num_raced = 0
        self._differentiated: tuple[Assignment, list[Fidelity]]
        self._differentiate()

    def ask(self) -> Proposal | None:
        """The next proposal of the round; ``None`` while it waits for results, or at its end."""
        return None if self.ended or not self._queue else self._queue.pop(0)

    def tell(self, evaluation: Evaluation) -> None:
        """Take in a result; those that this descent did not ask for are ignored."""
        proposal = Proposal(evaluation.assignment, evaluation.fidelity)
        if self.ended or proposal not in self._waiting:
            return
        self._waiting.remove(proposal)
        if evaluation.fidelity.slopes:
            if not evaluation.ok or evaluation.slopes is None:
                self.ended = True  # out of memory, or a model without gradients
                return
            self.table.tell(evaluation)
        window = replace(evaluation.fidelity, slopes=False)
        self._losses[evaluation.assignment, window] = (
            evaluation.sequence_nats if evaluation.ok else (math.inf,) * evaluation.fidelity.count
        )
        if not self._waiting:
            self._advance()

    def _more_text(self, count: int) -> list[Fidelity]:
        """The next windows of the split, in the seed's order."""
        places = np.arange(self._next_window, self._next_window + count) % self._num_windows
        self._next_window += count
        return [self._setting.fidelity(int(window)) for window in self._order[places]]

    def _differentiate(self) -> None:
        """Slopes at the centre, on text at hand."""
        self._windows = self._windows[: self._count]
        self._windows += self._more_text(self._count - len(self._windows))
        self._candidate, self._num_attempts = None, 0
        self._differentiated = self._centre, self._windows
        for window in self._windows:
            self._submit(Proposal(self._centre, replace(window, slopes=True)))

    def _measure(self, assignment: Assignment, windows: list[Fidelity]) -> None:
        """The loss of an assignment on text, where it is not known."""
        for window in windows:
            if (assignment, window) not in self._losses:
                self._submit(Proposal(assignment, window))

    def _submit(self, proposal: Proposal) -> None:
        self._queue.append(proposal)
        self._waiting.add(proposal)

    def _advance(self) -> None:
        """Everything asked for was told: judge the race, take the step, or begin another one."""
        if self._candidate is not None:
            self._judge(self._candidate)
        else:
            self._step()

    def _read(self, assignment: Assignment, count: int | None = None) -> list[float]:
        """Losses of the sequences of the text at hand, or of its first windows."""
        windows = self._windows[:count]
        return [nats for window in windows for nats in self._losses[assignment, window]]

    def _step(self) -> None:
        """Begin the race of the best step by the slopes; if it was measured before, of a bolder."""
        while self.damping >= _LEAST_DAMPING:
            losses = self.table.changes(self.damping)
            choice = self._oracle.solve(losses, self._setting.problem.budget_bytes).choice
            if choice not in self._tried:
                self._tried.add(choice)
                self._candidate, self._num_raced = choice, 0
                if not self._num_attempts:
                    self._windows = []
                self._num_attempts += 1
                self._race(choice)
                return
            self.damping *= self._options.bolder
        self.damping = self._options.damping
        self._fail()

    def _race(self, candidate: Assignment) -> None:
        """Read both sides on the next rung of the text at hand."""
        rung = self._windows[self._num_raced :][: self._rung]
        if not rung:
            rung = self._more_text(min(self._rung, self._most_raced - self._num_raced))
            self._windows += rung
        self._num_raced += len(rung)
        self._measure(self._centre, rung)
        self._measure(candidate, rung)
        if not self._waiting:  # both were read there before: text that came round again
            self._judge(candidate)

    @property
    def _most_raced(self) -> int:
        """Windows that a race may read."""
        return max(self._count, self._longest_race)

    def _judge(self, candidate: Assignment) -> None:
        """Go on from a better candidate; from a worse one, with shorter steps; or read on."""
        ours = self._read(candidate, self._num_raced)
        theirs = self._read(self._centre, self._num_raced)
        verdict = judge(ours, theirs, self._options.level)
        if verdict is Verdict.OPEN:
            if self._num_raced < self._most_raced:
                self._race(candidate)
                return
            verdict = Verdict.BETTER if _mean(ours) < _mean(theirs) else Verdict.WORSE
        if verdict is Verdict.BETTER:
            self._centre, self._num_failed = candidate, 0
            self.damping = max(self.damping * self._options.bolder, _LEAST_DAMPING)
            self._differentiate()
            return
        self.damping *= self._options.calmer
        if self._num_attempts < self._options.attempts:
            self._step()
        else:
            self._fail()

    def _fail(self) -> None:
        """No step from these slopes was better: read more text, or end."""
        if self._count == self._most:
            self._num_failed += 1
        if self._num_failed >= self._options.patience:
            self.ended = True
            return
        self._count = min(2 * self._count, self._most)
        if self._differentiated == (self._centre, self._windows):
            self._windows = []
        self._differentiate()


def _mean(losses: list[float]) -> float:
    """Nats per token."""
    return float(np.mean(losses))

"""A toy search and a toy measure for the tests of the loop and the executors.

Plain module-level code without pytest, so that Ray's workers and subprocesses can use it.
"""

import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from allocator.executors.in_process import InProcess
from allocator.journal import Journal
from allocator.loop import Limits, run_search
from allocator.searches.base import Proposal
from objectives.evaluation import Evaluation, Fidelity, round_significant

NUM_UNITS, NUM_OPTIONS, TOKENS_PER_SEQUENCE = 6, 5, 8
HEADER = {"seed": 0, "window": 4}


class ToySearch:
    """Perturbs the best so far as often as it was told something: order and content matter."""

    name: ClassVar[str] = "toy"

    def __init__(self, seed=0, most=None):
        self._rng = np.random.default_rng(seed)
        self._best, self._best_nats = (0,) * NUM_UNITS, math.inf
        self._told_nats = 0.0
        self._left = most

    def ask(self, count, pending):
        if self._left == 0:
            return []
        if self._left is not None:
            self._left -= 1
        choice = list(self._best)
        for _ in range(1 + int(self._told_nats * 1e6) % 3 + len(pending) % 2):
            choice[self._rng.integers(NUM_UNITS)] = int(self._rng.integers(NUM_OPTIONS))
        return [Proposal(tuple(choice), Fidelity("search", 0, 2 + choice[0] % 2))]

    def tell(self, evaluations):
        for evaluation in evaluations:
            if not evaluation.ok:
                continue
            self._told_nats = evaluation.loss_nats + self._told_nats / 2
            if evaluation.loss_nats < self._best_nats:
                self._best, self._best_nats = evaluation.assignment, evaluation.loss_nats

    @property
    def best(self):
        return self._best if self._best_nats < math.inf else None


class ScriptedSearch(ToySearch):
    """Proposes given assignments, then has finished."""

    def __init__(self, assignments, fidelity=None):
        super().__init__()
        self._assignments = list(assignments)
        self._fidelity = fidelity or Fidelity("search", 0, 2)

    def ask(self, count, pending):
        taken, self._assignments = self._assignments[:count], self._assignments[count:]
        return [Proposal(assignment, self._fidelity) for assignment in taken]


def toy_nats(assignment, index):
    """A loss with structure and no two values equal."""
    return round_significant(
        sum((option - unit % 3) ** 2 * (1 + 0.1 * unit) for unit, option in enumerate(assignment))
        + 0.01 * index
        + 1e-3 * math.sin(hash(assignment))
    )


@dataclass(frozen=True)
class ToyMeasure:
    """Measures by formula, in a time that varies; some assignments misbehave.

    Attributes:
        folder: Where it notes its process, and every measurement that it starts.
        seconds: Longest time of a measurement.
        poison: What goes wrong with which assignment.
    """

    folder: Path
    seconds: float = 0.0
    poison: dict[tuple[int, ...], str] = field(default_factory=dict)

    def __call__(self, assignment, fidelity):
        note(self.folder / "started", f"{assignment}")
        time.sleep(self.seconds * np.random.default_rng().random())
        values = [toy_nats(assignment, i) for i in fidelity.indices(100)]
        match self.poison.get(assignment):
            case "raise":
                raise ValueError("bad layer\non two lines")
            case "memory":
                raise MemoryError
            case "interrupt":
                raise KeyboardInterrupt
            case "nan":
                values[-1] = math.nan
            case "inf":
                values[0] = math.inf
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once":
                if first_time(self.folder / "died"):
                    os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
        return Evaluation(
            assignment, fidelity, tuple(values), (), fidelity.count * TOKENS_PER_SEQUENCE
        )


@dataclass(frozen=True)
class MakeToyMeasure:
    """Builds a :class:`ToyMeasure`, or fails to."""

    folder: Path
    seconds: float = 0.0
    poison: dict[tuple[int, ...], str] = field(default_factory=dict)
    broken: bool = False

    def __call__(self):
        if self.broken:
            raise ImportError("no model file")
        note(self.folder / "processes", str(os.getpid()))
        return ToyMeasure(self.folder, self.seconds, self.poison)


def note(path, text):
    """Append a line in one write, from whichever process."""
    with path.open("a") as file:
        file.write(f"{text}\n")


def first_time(marker):
    """Whether this is the first call for this marker, in any process; notes which."""
    try:
        with marker.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def run(executor, *, search=None, journal=None, limits=None, after=lambda progress: None):
    """The loop on the toy search, with a journal as its cache."""
    records = journal.records if journal else []
    evaluations = [Evaluation.from_json(record) for record in records]
    return run_search(
        search or ToySearch(),
        executor,
        limits=limits or Limits(4, TOKENS_PER_SEQUENCE, trials=40),
        cache={evaluation.key: evaluation for evaluation in evaluations},
        record=lambda evaluation: journal and journal.append(evaluation.to_json()),
        progress=after,
    )


def main(path):
    """Start or go on with a run whose driver may be killed at any moment; print its history."""
    try:
        journal = Journal.open(path, HEADER)
    except ValueError:
        journal = Journal.create(path, HEADER)
    executor = InProcess(MakeToyMeasure(path.parent, seconds=0.01))
    limits = Limits(HEADER["window"], TOKENS_PER_SEQUENCE, trials=100)
    print(run(executor, journal=journal, limits=limits).sha256)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

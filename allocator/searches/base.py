"""What a search is: ask/tell over proposals, seeded, knowing nothing of models or workers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment


@dataclass(frozen=True)
class Proposal:
    """An assignment to measure, and on which sequences."""

    assignment: Assignment
    fidelity: Fidelity


@dataclass(frozen=True)
class SearchSetting:
    """Everything a search may know when it starts.

    Attributes:
        problem: Bytes, budget and the additive loss table (the prior), in nats per token where the
            scorer gives nats.
        starts: Assignments worth measuring first, within the budget: the DP plan, then uniform.
        depths: For each unit its block index, -1 for embeddings and heads.
        kinds: For each unit its projection class.
        num_sequences: Sequences in the search split.
        batch_sequences: Sequences one evaluation should use; at most ``num_sequences``.
        seed: Of the search's own generator.
        importances: For each unit a sorted sample of its weights' importance, the same number for
            all; empty when the run has none.
        removed: For each unit the ratio that each option removes, what searches over ratios speak
            of; empty for the share of the bytes of the unit's largest option.
        slopes: Whether fidelities may ask for slopes.
        latency: For each unit the seconds of each option, for searches that minimise them too;
            empty where nothing is known of them.
        labels: For each unit the names of its options, by which units share what they have in
            common; empty for their places in the menu.
        tables: Tables of losses beside the problem's, in any unit; the optima of some are among
            the starts.
    """

    problem: Problem
    starts: tuple[Assignment, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...]
    num_sequences: int
    batch_sequences: int
    seed: int
    importances: tuple[NDArray[np.float64], ...] = ()
    removed: tuple[NDArray[np.float64], ...] = ()
    slopes: bool = False
    latency: tuple[NDArray[np.float64], ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    tables: tuple[tuple[NDArray[np.float64], ...], ...] = ()

    @property
    def ratios(self) -> tuple[NDArray[np.float64], ...]:
        """``removed``, or what stands for it where that is empty."""
        return self.removed or tuple(
            1 - cost / max(int(cost.max()), 1) for cost in self.problem.bytes
        )

    def fidelity(self, index: int) -> Fidelity:
        """The ``index``-th window of the search split; windows tile it, then start over."""
        first = index * self.batch_sequences % self.num_sequences
        return Fidelity("search", first, self.batch_sequences)


class Search(Protocol):
    """Proposes assignments within the budget and learns from what they measured.

    The state of a search is a function of its setting and of what it was asked and told, in order:
    resuming replays the journal, nothing is pickled. ``ask`` may be called while earlier proposals
    are still being measured; those are ``pending``. Failed evaluations are told too.
    """

    name: ClassVar[str]

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals, or fewer (none) when the search has finished."""
        ...

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from finished evaluations, in the order they were asked."""
        ...

    @property
    def best(self) -> Assignment | None:
        """What the search would return now; ``None`` before anything succeeded."""
        ...


class FrontPoint(NamedTuple):
    """One point of a front of loss against bytes.

    Attributes:
        assignment: Option index of each unit.
        bytes: Its exact bytes.
        loss_nats: Its loss, with the difficulty of its sequences removed.
        standard_error_nats: Of that loss.
        num_sequences: How many sequences it was measured on.
    """

    assignment: Assignment
    bytes: int
    loss_nats: float
    standard_error_nats: float
    num_sequences: int


@runtime_checkable
class Noting(Protocol):
    """A search that has more to say at its end than its best; no search has to."""

    def notes(self) -> dict[str, float]:
        """Finite numbers worth keeping with the run, such as a hypervolume."""
        ...

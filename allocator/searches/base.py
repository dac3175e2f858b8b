"""What a search is: ask/tell over proposals, seeded, knowing nothing of models or workers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
    """

    problem: Problem
    starts: tuple[Assignment, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...]
    num_sequences: int
    batch_sequences: int
    seed: int

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

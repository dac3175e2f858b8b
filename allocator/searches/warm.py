"""Start a search from what an earlier run measured.

The problem: a second run on the same model and text, with another seed, search or a larger budget,
measures again what the first one knows. Told to the search before it starts, those measurements are
part of its archive, its surrogate, its sampler's trials or its choice of a parent, as far as it has
words for them (:mod:`allocator.searches.portfolio` says which), and their best is its best so far.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import ClassVar

from allocator.searches.base import Proposal, Search, SearchSetting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

logger = logging.getLogger(__name__)


class WarmStarted:
    """A search that is told known evaluations before it is asked anything.

    The caller answers for them being of the same space, model and text. Evaluations that the
    setting cannot hold (over its budget, of another split, failed) are left out.

    Args:
        search: Fresh.
        setting: What it was made from, with full menus where the search sees thinned ones.
        known: In the order in which they were made; repeated ones count once.
    """

    name: ClassVar[str] = "warm_started"

    def __init__(self, search: Search, setting: SearchSetting, known: Sequence[Evaluation]) -> None:
        self._search = search
        usable = {e.key: e for e in known if e.ok and _fits(setting, e)}
        logger.info("%d of %d known evaluations are of use here", len(usable), len(known))
        for evaluation in usable.values():
            search.tell([evaluation])

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The search's proposals."""
        return self._search.ask(count, pending)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Hand results on."""
        self._search.tell(evaluations)

    @property
    def best(self) -> Assignment | None:
        """The search's best, which may be a known one."""
        return self._search.best


def _fits(setting: SearchSetting, evaluation: Evaluation) -> bool:
    """Whether an evaluation is one that a search on this setting could have asked for."""
    problem, fidelity = setting.problem, evaluation.fidelity
    if len(evaluation.assignment) != len(problem.bytes):
        raise ValueError(
            f"a known evaluation chooses for {len(evaluation.assignment)} units, this space has "
            f"{len(problem.bytes)}: warm starts need a run on the same space"
        )
    pairs = zip(evaluation.assignment, problem.bytes, strict=True)
    return (
        all(0 <= option < len(cost) for option, cost in pairs)
        and problem.total_bytes(evaluation.assignment) <= problem.budget_bytes
        and fidelity.split == "search"
        and 1 <= fidelity.count <= setting.num_sequences
        and 0 <= fidelity.first < setting.num_sequences
    )

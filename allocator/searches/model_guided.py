"""Model-guided search: a table of losses says where to measure, and every measurement corrects it.

First the optima of several tables and other starts race (:mod:`allocator.searches.opening`), and
the winner's table is the one to go on with. Then it is re-made where it matters: a
:class:`~allocator.searches.descent.Descent` follows slopes that are measured at the best assignment
so far. Where its steps stop helping, the table around its last assignment is the prior of a
:class:`~allocator.searches.posterior_sampling.PosteriorSampling`, which corrects it by what all
assignments together were measured to lose, and ends when it expects less than noise. Where a loss
has no slopes there is no descent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.descent import Descent, DescentOptions
from allocator.searches.ledger import Ledger
from allocator.searches.opening import Opening, OpeningOptions
from allocator.searches.posterior_sampling import PosteriorSampling, SamplingOptions
from allocator.searches.repair import check_setting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

_OPENING = OpeningOptions()
_DESCENT = DescentOptions()
_SAMPLING = SamplingOptions()


class ModelGuided:
    """A race of starts, descent along slopes, then Thompson sampling around where that ended.

    Args:
        setting: Problem, starts, tables, search split, seed.
        opening: Tuning of the first part.
        descent: Tuning of the second part.
        sampling: Tuning of the third part.
    """

    name: ClassVar[str] = "model_guided"
    preferred_sequences: ClassVar[int] = 1
    """Many candidates on little text each: the surrogate averages the noise over all of them."""

    def __init__(
        self,
        setting: SearchSetting,
        opening: OpeningOptions = _OPENING,
        descent: DescentOptions = _DESCENT,
        sampling: SamplingOptions = _SAMPLING,
    ) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = opening, descent, sampling
        self._ledger = Ledger(setting.num_sequences)
        self._told: list[Evaluation] = []
        self._opening: Opening | None = None
        self._descent: Descent | None = None
        self._sampling: PosteriorSampling | None = None

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The rungs of the opening, the descent's rounds, with waits between; then samples."""
        opening = self._opening = self._opening or self._begin_opening()
        if opening.winner is None:
            return _some(opening.ask, count)
        if self._sampling is None and self._setting.slopes:
            descent = self._descent = self._descent or Descent(opening.own, self._options[1])
            if not descent.ended:
                return _some(descent.ask, count)
        sampling = self._sampling = self._sampling or self._begin_sampling(opening)
        return sampling.ask(count, pending)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn; failed evaluations teach nothing and are never the best."""
        for evaluation in evaluations:
            self._ledger.add(evaluation)
            if self._sampling is not None:
                self._sampling.tell([evaluation])
                continue
            self._told.append(evaluation)
            if self._opening is not None:
                self._opening.tell(evaluation)
            if self._descent is not None:
                self._descent.tell(evaluation)

    @property
    def best(self) -> Assignment | None:
        """The assignment of least loss: of those met so far, then of the posterior's."""
        if self._sampling is not None and self._sampling.knows_enough:
            return self._sampling.best
        return self._ledger.best()

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, if that is for want of promise."""
        return "" if self._sampling is None else self._sampling.ended

    def notes(self) -> dict[str, float]:
        """What the posterior mean's optimum promises over the best, and how well that is known."""
        return {} if self._sampling is None else self._sampling.notes()

    def _begin_opening(self) -> Opening:
        """Of the starts, and of the best of what was told before the search began."""
        known = self._ledger.best()
        starts = self._setting.starts if known is None else (known, *self._setting.starts)
        setting = replace(self._setting, starts=tuple(dict.fromkeys(starts)))
        return Opening(setting, self._options[0])

    def _begin_sampling(self, opening: Opening) -> PosteriorSampling:
        """Around where the descent ended, knowing all that was measured."""
        setting = opening.own
        if self._descent is not None and self._descent.table.centre is not None:
            setting = self._descent.table.around(setting, self._descent.damping)
        sampling = PosteriorSampling(setting, self._options[2])
        sampling.tell(self._told)
        return sampling


def _some(ask: Callable[[], Proposal | None], count: int) -> list[Proposal]:
    """At most so many, until there is nothing to ask now."""
    return list(islice(iter(ask, None), count))

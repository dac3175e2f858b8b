"""Model-guided search: a table of losses says where to measure, and every measurement corrects it.

First the table is re-made where it matters: a :class:`~allocator.searches.descent.Descent` follows
slopes that are measured at the best assignment so far. Where its steps stop helping, the table
around its last assignment is the prior of a
:class:`~allocator.searches.posterior_sampling.PosteriorSampling`, which corrects it by what all
assignments together were measured to lose, and ends when it expects less than noise. Where a loss
has no slopes the search is the second part alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.descent import Descent, DescentOptions
from allocator.searches.ledger import Ledger
from allocator.searches.posterior_sampling import PosteriorSampling, SamplingOptions
from allocator.searches.repair import check_setting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

_DESCENT = DescentOptions()
_SAMPLING = SamplingOptions()


class ModelGuided:
    """Descent along slopes, then Thompson sampling around where it ended.

    Args:
        setting: Problem, starts, search split, seed.
        descent: Tuning of the first part.
        sampling: Tuning of the second part.
    """

    name: ClassVar[str] = "model_guided"
    preferred_sequences: ClassVar[int] = 1
    """Many candidates on little text each: the surrogate averages the noise over all of them."""

    def __init__(
        self,
        setting: SearchSetting,
        descent: DescentOptions = _DESCENT,
        sampling: SamplingOptions = _SAMPLING,
    ) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = descent
        self._sampling_options = sampling
        self._ledger = Ledger(setting.num_sequences)
        self._told: list[Evaluation] = []
        self._descent: Descent | None = None
        self._sampling = None if setting.slopes else PosteriorSampling(setting, sampling)

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The descent's rounds, with waits between them; then posterior samples."""
        if self._sampling is None:
            descent = self._descent = self._descent or self._begin_descent()
            if not descent.ended:
                asked = (descent.ask() for _ in range(count))
                return [proposal for proposal in asked if proposal is not None]
            self._sampling = self._begin_sampling(descent)
        return self._sampling.ask(count, pending)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn; failed evaluations teach nothing and are never the best."""
        for evaluation in evaluations:
            self._ledger.add(evaluation)
            if self._sampling is not None:
                self._sampling.tell([evaluation])
                continue
            self._told.append(evaluation)
            if self._descent is not None:
                self._descent.tell(evaluation)

    @property
    def best(self) -> Assignment | None:
        """The assignment of least loss: of those the descent met, then of the posterior's."""
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

    def _begin_descent(self) -> Descent:
        """From the first start, or from the best of what was told before the search began."""
        known = self._ledger.best()
        starts = self._setting.starts if known is None else (known, *self._setting.starts)
        return Descent(replace(self._setting, starts=tuple(dict.fromkeys(starts))), self._options)

    def _begin_sampling(self, descent: Descent) -> PosteriorSampling:
        """Around where the descent ended, knowing all that was measured."""
        setting, table = self._setting, descent.table
        if table.centre is not None:
            setting = table.around(setting, descent.damping)
        sampling = PosteriorSampling(setting, self._sampling_options)
        sampling.tell(self._told)
        return sampling

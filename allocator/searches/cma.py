"""CMA-ES on priorities of groups of units, decoded by the exact solver.

Each generation is drawn from a normal distribution whose mean and covariance follow the better half
of the generation before. What it adapts are the multipliers of the reduced space: continuous
priorities, of which the solver makes assignments within the budget. Of what others measured, the
best so far join the generation that is under way; all of it would drown what the distribution
learns of itself.

Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772; "Injecting external solutions
into CMA-ES", arXiv 1110.4181.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allocator.searches.base import SearchSetting
from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.sampled import Sampled
from search_spaces.space import Assignment

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class CMAOptions(ReducedOptions):
    """How the reduced space is cut and sampled.

    Attributes:
        population: Trials of a generation; ``None`` for ``4 + 3 ln(coordinates)``.
    """

    population: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population is not None and self.population < 4:
            raise ValueError(f"expected a population of at least 4, got {self.population}")


_DEFAULTS = CMAOptions()


class CMA(Sampled):
    """Covariance matrix adaptation over multipliers of the loss table.

    With a single multiplier there is no covariance and Optuna draws at random.

    Args:
        setting: What to search.
        options: How the reduced space is cut and sampled.
    """

    name: ClassVar[str] = "cma"
    _has_generations: ClassVar[bool] = True

    def __init__(self, setting: SearchSetting, options: CMAOptions = _DEFAULTS) -> None:
        space = ReducedSpace.from_setting(setting, options)
        usual = 4 + math.floor(3 * math.log(max(len(space.axes), 1)))
        population = usual if options.population is None else options.population
        super().__init__(
            setting,
            space,
            lambda: _sampler(setting.seed, population),
            remeasure_every=options.remeasure_every,
        )
        self._population = population

    def _worth_learning(self, foreign: list[Assignment]) -> list[Assignment]:
        """What is better than every trial, at most a generation of it.

        The worst comes first, for Optuna's sampler counts no trial to a generation before it has
        seen one.
        """
        losses = {assignment: self._ledger.adjusted(assignment)[0] for assignment in self._ledger}
        least = min((losses[a] for a in losses if a in self._points), default=math.inf)
        better = sorted((a for a in foreign if losses[a] < least), key=losses.__getitem__)
        return better[: self._population][::-1]


def _sampler(seed: int, population: int) -> optuna.samplers.CmaEsSampler:
    """Optuna's sampler; it starts at the DP plan with a third of the log range as deviation.

    Those two and restarts are deprecated options, which must not be passed.
    """
    import optuna

    return optuna.samplers.CmaEsSampler(
        n_startup_trials=0,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_independent_sampling=False,
        seed=seed,
        popsize=population,
        consider_pruned_trials=False,
        use_separable_cma=False,
        with_margin=False,
        lr_adapt=False,
        source_trials=None,
    )

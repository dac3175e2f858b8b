"""CMA-ES on priorities of groups of units, decoded by the exact solver.

Each generation is drawn from a normal distribution whose mean and covariance follow the better half
of the generation before. What it adapts are the multipliers of the reduced space: continuous
priorities, of which the solver makes assignments within the budget.

Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allocator.searches.base import SearchSetting
from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.sampled import Sampled

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
        if self.population is not None and self.population < 3:
            raise ValueError(f"expected a population of at least 3, got {self.population}")


_DEFAULTS = CMAOptions()


class CMA(Sampled):
    """Covariance matrix adaptation over multipliers of the loss table.

    With a single multiplier there is no covariance and Optuna draws at random.

    Args:
        setting: What to search.
        options: How the reduced space is cut and sampled.
    """

    name: ClassVar[str] = "cma"

    def __init__(self, setting: SearchSetting, options: CMAOptions = _DEFAULTS) -> None:
        super().__init__(
            setting,
            ReducedSpace.from_setting(setting, options),
            lambda: _sampler(setting.seed, options.population),
            remeasure_every=options.remeasure_every,
        )


def _sampler(seed: int, population: int | None) -> optuna.samplers.CmaEsSampler:
    """Optuna's sampler; it starts at the DP plan with a third of the log range as deviation."""
    import optuna

    return optuna.samplers.CmaEsSampler(
        n_startup_trials=0,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        warn_independent_sampling=False,
        seed=seed,
        popsize=population,
    )

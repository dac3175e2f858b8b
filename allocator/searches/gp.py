"""Bayesian optimisation with a Gaussian process on the reduced space.

The process (Matern 5/2, one length scale per multiplier, noise estimated) models the measured loss
as a function of the multipliers, and each proposal maximises the expected improvement over what is
measured and under way. It is the dearest of the samplers: see ``GPOptions.most_trials``.

Ament et al., "Unexpected improvements to expected improvement for Bayesian optimization", NeurIPS
2023, as implemented by Optuna.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allocator.searches.base import SearchSetting
from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.sampled import Sampled, quiet
from search_spaces.space import Assignment

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class GPOptions(ReducedOptions):
    """How the reduced space is cut and sampled.

    Attributes:
        num_startup_trials: Finished trials before the sampler models anything.
        most_trials: The search ends after so many of its own; of what others measured it learns
            from half as many, the best first. With 11 to 15 multipliers a proposal takes
            0.3 s of one core after 100 trials, 0.6 s after 300 and 1.4 s after 500.
    """

    num_startup_trials: int = 10
    most_trials: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_startup_trials < 1 or self.most_trials < 1:
            raise ValueError(
                "expected at least one startup trial and one trial, got "
                f"{self.num_startup_trials} and {self.most_trials}"
            )


_DEFAULTS = GPOptions()


class GP(Sampled):
    """Expected improvement of a Gaussian process over multipliers of the loss table.

    Args:
        setting: What to search.
        options: How the reduced space is cut and sampled.
    """

    name: ClassVar[str] = "gp"

    def __init__(self, setting: SearchSetting, options: GPOptions = _DEFAULTS) -> None:
        super().__init__(
            setting,
            ReducedSpace.from_setting(setting, options),
            lambda: _sampler(setting.seed, options.num_startup_trials),
            remeasure_every=options.remeasure_every,
            most_trials=options.most_trials,
        )
        self._room = options.most_trials // 2

    def _worth_learning(self, foreign: list[Assignment]) -> list[Assignment]:
        """The best, as many as there is room for."""
        room = self._room
        ordered = sorted(foreign, key=lambda assignment: self._ledger.adjusted(assignment)[0])
        self._room -= min(room, len(ordered))
        return ordered[:room]

    def _ask_study(self, point: tuple[float, ...] | None = None) -> optuna.trial.Trial:
        with quiet():  # on first use Optuna says that with greenlet it would be faster
            return super()._ask_study(point)


def _sampler(seed: int, num_startup_trials: int) -> optuna.samplers.GPSampler:
    import optuna

    return optuna.samplers.GPSampler(
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        n_startup_trials=num_startup_trials,
        deterministic_objective=False,
        warn_independent_sampling=False,
    )

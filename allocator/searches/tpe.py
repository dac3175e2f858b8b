"""Optuna's TPE on a reduced space: a dozen multipliers on the loss table, decoded by the DP.

TPE ranks what it has seen, models the densities of the good and of the other points and proposes
where their ratio is greatest. Multivariate, because multipliers act together, and grouped, which
for trials of the same coordinates is one group; unfinished trials count as bad ones, which spreads
a window's proposals.

Watanabe, "Tree-structured Parzen estimator", arXiv 2304.11127.
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
class TPEOptions(ReducedOptions):
    """How the reduced space is cut and sampled.

    Attributes:
        num_startup_trials: Finished trials before the sampler models anything.
        num_ei_candidates: Points drawn for each proposal, of which the best is taken.
    """

    num_startup_trials: int = 10
    num_ei_candidates: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ei_candidates < 1 or self.num_startup_trials < 0:
            raise ValueError(
                "expected at least one candidate per proposal and no negative number of startup "
                f"trials, got {self.num_ei_candidates} and {self.num_startup_trials}"
            )


_DEFAULTS = TPEOptions()


class TPE(Sampled):
    """Tree-structured Parzen estimator over multipliers of the loss table.

    Args:
        setting: What to search.
        options: How the reduced space is cut and sampled.
    """

    name: ClassVar[str] = "tpe"

    def __init__(self, setting: SearchSetting, options: TPEOptions = _DEFAULTS) -> None:
        super().__init__(
            setting,
            ReducedSpace.from_setting(setting, options),
            lambda: tpe_sampler(
                setting.seed,
                multivariate=True,
                num_startup_trials=options.num_startup_trials,
                num_ei_candidates=options.num_ei_candidates,
            ),
            remeasure_every=options.remeasure_every,
        )


def tpe_sampler(
    seed: int, *, multivariate: bool, num_startup_trials: int, num_ei_candidates: int
) -> optuna.samplers.TPESampler:
    """Optuna's sampler with everything said that it does not deprecate.

    Args:
        seed: Of its generator.
        multivariate: Model the coordinates together, in groups of those that trials share;
            ``False`` for each on its own.
        num_startup_trials: Finished trials before it models anything.
        num_ei_candidates: Points drawn for each proposal.
    """
    import optuna

    return optuna.samplers.TPESampler(
        n_startup_trials=num_startup_trials,
        n_ei_candidates=num_ei_candidates,
        seed=seed,
        multivariate=multivariate,
        group=multivariate,
        constant_liar=True,
    )

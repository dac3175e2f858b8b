"""Optuna's TPE on a reduced space: a dozen multipliers on the loss table, decoded by the DP.

Optuna serves as a library of samplers: one study in memory, asked and told, never the store of
record; replaying the history rebuilds it. No proposal can break the budget, because the DP decodes
it. What a trial is told is its loss with the difficulty of its sequences removed, as far as it is
known by then. Every few asks the best so far is measured once more on text it has not met, so that
an assignment which was merely lucky does not stay the best.

Watanabe, "Tree-structured Parzen estimator", arXiv 2304.11127.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.ledger import Ledger
from allocator.searches.reduced import ReducedSpace
from allocator.searches.repair import check_setting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class TPEOptions:
    """How the reduced space is cut and sampled.

    Attributes:
        num_bands: Depth bands, each with one multiplier.
        log_range: Multipliers lie within ``exp(-log_range)`` and ``exp(log_range)``.
        num_startup_trials: Finished trials before the sampler models anything.
        num_ei_candidates: Points drawn for each proposal, of which the best is taken.
        remeasure_every: Every so many asks the best so far is measured on further sequences;
            0 never does.
    """

    num_bands: int = 4
    log_range: float = 1.5
    num_startup_trials: int = 10
    num_ei_candidates: int = 24
    remeasure_every: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_range) and self.log_range > 0):
            raise ValueError(f"expected a positive log range, got {self.log_range}")
        if min(self.num_bands, self.num_ei_candidates) < 1:
            raise ValueError("expected at least one depth band and one candidate per proposal")
        if min(self.num_startup_trials, self.remeasure_every) < 0:
            raise ValueError("startup trials and the remeasuring interval must not be negative")


_MOST_REPEATS = 50  # proposals in a row that were all asked before: the sampler has converged
_DEFAULTS = TPEOptions()


class TPE:
    """Tree-structured Parzen estimator over multipliers of the loss table.

    Args:
        setting: What to search. The start that multipliers of 1 decode to is the study's first
            trial; other starts have no multipliers and are only compared.
        options: How the reduced space is cut and sampled.
    """

    name: ClassVar[str] = "tpe"

    def __init__(self, setting: SearchSetting, options: TPEOptions = _DEFAULTS) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = options
        self._space = ReducedSpace.from_setting(setting, options.num_bands)
        self._plan = self._space.decode(np.zeros(len(self._space.factors)))
        self._study, self._distributions = _make_study(setting.seed, options, self._space.factors)
        self._ledger = Ledger(setting.num_sequences)
        self._trials: dict[Proposal, deque[optuna.trial.Trial]] = {}
        self._asked: set[Proposal] = set()
        self._starts = list(dict.fromkeys(setting.starts))
        self._num_asks = 0
        self._num_repeats = 0
        self._num_windows = -(-setting.num_sequences // setting.batch_sequences)

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """``count`` proposals; fewer where nothing is left to multiply or all is decoded again."""
        proposals: list[Proposal] = []
        while len(proposals) < count and self._has_more():
            proposal = self._propose_start() or self._propose_again() or self._propose_new()
            self._num_repeats = self._num_repeats + 1 if proposal in self._asked else 0
            self._asked.add(proposal)
            self._num_asks += 1
            proposals.append(proposal)
        return proposals

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Learn from finished evaluations; a failed one is a failed trial."""
        from optuna.trial import TrialState

        for evaluation in evaluations:
            self._ledger.add(evaluation)
            proposal = Proposal(evaluation.assignment, evaluation.fidelity)
            waiting = self._trials.get(proposal)
            if not waiting:
                continue
            trial = waiting.popleft()
            if evaluation.ok:
                self._study.tell(trial, self._ledger.adjusted(evaluation.assignment)[0])
            else:
                self._study.tell(trial, state=TrialState.FAIL)

    @property
    def best(self) -> Assignment | None:
        """The least loss after removing the sequences' difficulty."""
        return self._ledger.best()

    def _has_more(self) -> bool:
        if self._starts:
            return True
        return bool(self._space.factors) and self._num_repeats < _MOST_REPEATS

    def _propose_start(self) -> Proposal | None:
        if not self._starts:
            return None
        proposal = Proposal(self._starts.pop(0), self._setting.fidelity(0))
        if self._space.factors and proposal.assignment == self._plan:
            self._wait_for(self._ask_study(), proposal)
        return proposal

    def _propose_again(self) -> Proposal | None:
        """The best so far on the first window it was not asked on, when its turn has come."""
        every = self._options.remeasure_every
        best = self._ledger.best()
        if best is None or not every or self._num_asks % every:
            return None
        for window in range(self._num_windows):
            proposal = Proposal(best, self._setting.fidelity(window))
            if proposal not in self._asked:
                return proposal
        return None

    def _propose_new(self) -> Proposal:
        trial = self._ask_study()
        point = np.array([trial.params[factor] for factor in self._space.factors])
        proposal = Proposal(self._space.decode(point), self._setting.fidelity(trial.number))
        self._wait_for(trial, proposal)
        return proposal

    def _ask_study(self) -> optuna.trial.Trial:
        """A trial with all its multipliers; the first has them at 1, which is the DP plan."""
        return self._study.ask(self._distributions)

    def _wait_for(self, trial: optuna.trial.Trial, proposal: Proposal) -> None:
        self._trials.setdefault(proposal, deque()).append(trial)


def _make_study(
    seed: int, options: TPEOptions, factors: Sequence[str]
) -> tuple[optuna.Study, dict[str, optuna.distributions.BaseDistribution]]:
    """A study in memory with the DP plan waiting to be its first trial, and its parameters.

    Leaves Optuna's logging as it was.
    """
    import optuna

    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        factor: optuna.distributions.FloatDistribution(-options.log_range, options.log_range)
        for factor in factors
    }

    sampler = optuna.samplers.TPESampler(
        n_startup_trials=options.num_startup_trials,
        n_ei_candidates=options.num_ei_candidates,
        seed=seed,
        multivariate=True,
        group=False,
        constant_liar=True,
    )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(),
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
            study_name="allocator",
            direction="minimize",
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.enqueue_trial(dict.fromkeys(factors, 0.0))
    return study, distributions

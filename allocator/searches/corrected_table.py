"""An additive loss table corrected by measurements of whole assignments on parts of a text.

The problem: text differs in difficulty far more than good assignments differ in loss. So every
measurement is compared with that of one reference assignment, the first start, on the same
sequences, and only then given to the surrogate as the loss on the whole text that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import SearchSetting
from allocator.searches.surrogate import Observation, Relatives, Spreads, Surrogate
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

_FIRST_TUNING = 16  # observations
_NEXT_TUNING = 1.5  # times as many
_SEQUENCE_SPREAD = 0.1  # of one sequence's ratio to the reference, where it cannot be estimated
_PRECISION = 1e-3  # of a loss
_LEAST_DEVIATION = 1e-9  # nats, where the reference loses nothing
_LEAST_RATIO = 0.2  # of the reference's mean loss; ratios to less say little


class CorrectedTable:
    """The table of a setting, what was measured, and the surrogate of both.

    Args:
        setting: Prior losses, reference (its first start), number of sequences.
        spreads: Prior standard deviations of the surrogate.
        num_reference: Sequences of the reference that must be told before the surrogate begins, one
            of them at least without a failure.
    """

    def __init__(self, setting: SearchSetting, spreads: Spreads, *, num_reference: int) -> None:
        self._setting = setting
        self._spreads = spreads
        self._num_reference = num_reference
        self._reference: dict[int, float] = {}
        self._failed: set[int] = set()
        self._told: set[tuple[Assignment, Fidelity]] = set()
        self._waiting: list[Evaluation] = []
        self._next_tuning = float(_FIRST_TUNING)
        self._scale = 0.0
        self._proportional = True
        self.surrogate: Surrogate | None = None
        """``None`` before enough of the reference is measured."""

    def tell(self, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """Learn; failed evaluations and repetitions teach nothing.

        Returns:
            Those whose reference is known now, in the order in which they were told.
        """
        for evaluation in evaluations:
            # with slopes or without, it is one measurement of these sequences
            key = evaluation.assignment, replace(evaluation.fidelity, slopes=False)
            is_reference = evaluation.assignment == self._setting.starts[0]
            if not evaluation.ok and is_reference:
                self._failed.update(self._indices(evaluation))
            if not evaluation.ok or key in self._told:
                continue
            self._told.add(key)
            self._waiting.append(evaluation)
            if is_reference:
                indices = self._indices(evaluation)
                self._reference.update(zip(indices, evaluation.sequence_nats, strict=True))
        known = len(self._reference.keys() | self._failed) >= self._num_reference
        if self.surrogate is None and self._reference and known:
            self.surrogate = self._begin()
        if self.surrogate is None:
            return []
        usable = [e for e in self._waiting if self._reference.keys() >= set(self._indices(e))]
        self._waiting = [e for e in self._waiting if e not in usable]
        for evaluation in usable:
            self.surrogate.add(self._observe(evaluation))
            if self.surrogate.num_observations >= self._next_tuning:
                self._next_tuning = self.surrogate.num_observations * _NEXT_TUNING
                self.surrogate.tune()
        return usable

    def best(self) -> Assignment | None:
        """The measured assignment of least posterior loss; before, of least measured loss."""
        if self.surrogate is not None and (found := self.surrogate.best()) is not None:
            return found[0]
        return min(self._waiting, key=lambda e: e.loss_nats).assignment if self._waiting else None

    def losses(self) -> tuple[NDArray[np.float64], ...] | None:
        """The corrected loss of every option, nats; ``None`` before the surrogate begins."""
        if self.surrogate is None:
            return None
        known = np.mean(list(self._reference.values())) / self._scale if self._proportional else 1.0
        return tuple(row * known for row in self.surrogate.table())

    def _indices(self, evaluation: Evaluation) -> tuple[int, ...]:
        return tuple(evaluation.fidelity.indices(self._setting.num_sequences))

    def _begin(self) -> Surrogate:
        """The table scaled so that it explains the reference's measured loss."""
        problem, first = self._setting.problem, self._setting.starts[0]
        self._scale = float(np.mean(list(self._reference.values())))
        self._proportional = self._clearly_positive()
        predicted = problem.total_loss(first)
        factor = self._scale / predicted if predicted > 0 and self._scale > 0 else 1.0
        floor = 1e-6 * abs(self._scale) / len(problem.losses)
        return Surrogate(
            [np.maximum(row * factor, floor) for row in problem.losses],
            Relatives(self._setting.kinds, self._setting.depths, self._setting.labels),
            reference=first,
            reference_loss=abs(self._scale),
            spreads=self._spreads,
        )

    def _clearly_positive(self) -> bool:
        """Whether ratios to the reference mean something.

        A KL is positive on every text; the increase of another loss over the dense model's need
        not be.
        """
        size = self._setting.batch_sequences
        known = [self._reference[i] for i in sorted(self._reference)]
        means = [np.mean(known[i : i + size]) for i in range(0, len(known), size)]
        return bool(min(means) > _LEAST_RATIO * self._scale > 0)

    def _observe(self, evaluation: Evaluation) -> Observation:
        """The loss on the whole text that a measurement on part of it stands for.

        Hard sequences lose more under every assignment, in proportion: the ratio to the reference
        on the same sequences is what carries over (the ratio estimator of survey sampling). Where
        the reference loses next to nothing, the difference does.
        """
        ours = np.array(evaluation.sequence_nats)
        theirs = np.array([self._reference[i] for i in self._indices(evaluation)])
        if self._proportional and theirs.mean() > _LEAST_RATIO * self._scale:
            ratio = float(ours.mean() / theirs.mean())
            deviations = (ours - ratio * theirs) * self._scale / theirs.mean()
            loss = ratio * self._scale
        else:
            deviations = ours - theirs
            loss = self._scale + float(deviations.mean())
        known = len(ours) > 1
        spread = float(deviations.std(ddof=1)) if known else _SEQUENCE_SPREAD * abs(self._scale)
        unseen = 1 - len(ours) / self._setting.num_sequences
        least = max(_PRECISION * abs(self._scale), _LEAST_DEVIATION)
        variance = unseen * spread**2 / len(ours) + least**2
        return Observation(evaluation.assignment, loss, variance)

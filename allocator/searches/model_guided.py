"""Model-guided search: the additive table, corrected by every measurement, decoded exactly.

The problem: additive tables rank allocations well when compression is mild and badly at 2 and 3
bits, while searches that move a few units at a time need tens of thousands of evaluations. Here
every measurement corrects a Bayesian surrogate of the table, and each proposal is the exact
optimum (dynamic programming over bytes) of a posterior sample: Thompson sampling with a
combinatorial oracle. No proposal can break the budget.

Text differs in difficulty far more than good assignments differ in loss, so every measurement is
compared with the first start's on the same sequences, and the losses it stands for are those of
the whole split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import Proposal, SearchSetting
from allocator.searches.repair import check_setting
from allocator.searches.surrogate import Observation, Spreads, Surrogate
from allocator.solvers.dynamic import Oracle
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment


@dataclass(frozen=True)
class ModelGuidedOptions:
    """Tuning of :class:`ModelGuided`.

    Attributes:
        spreads: Prior standard deviations of the surrogate.
        confirm_every: Every so many proposals the best assignment so far is measured on text it
            has not seen, while there is any.
        exploit_every: Every so many proposals the posterior mean is decoded instead of a sample.
        temperature: Scales the samples' deviation from the posterior mean. In a thousand dimensions
            an exact optimum of a full posterior sample mostly fits the sample's noise.
        first_changes: Share of the units that a proposal may change of the best assignment, at
            first: the trust radius.
        least_changes: The trust radius never falls below this share of the units.
        shrink: Factor of the trust radius after a proposal that was not the best.
    """

    spreads: Spreads = field(default_factory=Spreads)
    confirm_every: int = 6
    exploit_every: int = 3
    temperature: float = 0.5
    first_changes: float = 0.3
    least_changes: float = 0.1
    shrink: float = 0.95

    def __post_init__(self) -> None:
        if self.confirm_every < 1 or self.exploit_every < 1:
            raise ValueError(
                "confirm_every and exploit_every must be at least 1, "
                f"got {self.confirm_every} and {self.exploit_every}"
            )


_DEFAULTS = ModelGuidedOptions()
_MOST_ATTEMPTS = 8
_BISECTIONS = 10
_FIRST_TUNING = 16  # observations


def _distance(ours: Assignment, theirs: Assignment) -> int:
    """Number of units that differ."""
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


class ModelGuided:
    """Thompson sampling on the loss table with the exact solver as oracle.

    Args:
        setting: Problem, starts, search split, seed.
        options: Tuning.
    """

    name: ClassVar[str] = "model_guided"
    preferred_sequences: ClassVar[int] = 1
    """Many candidates on little text each: the surrogate averages the noise over all of them."""

    def __init__(self, setting: SearchSetting, options: ModelGuidedOptions = _DEFAULTS) -> None:
        check_setting(setting)
        self._setting = setting
        self._options = options
        self._rng = np.random.default_rng(setting.seed)
        self._oracle = Oracle(setting.problem.bytes)
        self._num_windows = -(-setting.num_sequences // setting.batch_sequences)
        self._queue = self._opening()
        self._reference: dict[int, float] = {}
        self._waiting: list[Evaluation] = []
        self._surrogate: Surrogate | None = None
        self._asked: set[tuple[Assignment, Fidelity]] = set()
        self._told: set[str] = set()
        self._num_asked = 0
        self._radius = max(2.0, options.first_changes * len(setting.problem.bytes))
        self._next_tuning = float(_FIRST_TUNING)

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The opening first; then posterior samples, decoded exactly.

        Nothing more comes once only assignments that are already measured on all text come out.
        """
        proposals = (self._propose(pending) for _ in range(count))
        return [proposal for proposal in proposals if proposal is not None]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Correct the surrogate; failed evaluations teach nothing and are never the best."""
        for evaluation in evaluations:
            if not evaluation.ok or evaluation.key in self._told:
                continue
            self._told.add(evaluation.key)
            if evaluation.assignment == self._setting.starts[0]:
                indices = evaluation.fidelity.indices(self._setting.num_sequences)
                self._reference.update(zip(indices, evaluation.sequence_nats, strict=True))
            self._waiting.append(evaluation)
        self._digest()

    @property
    def best(self) -> Assignment | None:
        """The measured assignment of least posterior loss."""
        if self._surrogate is not None and (found := self._surrogate.best()) is not None:
            return found[0]
        ok = [evaluation for evaluation in self._waiting if evaluation.ok]
        return min(ok, key=lambda e: e.loss_nats).assignment if ok else None

    def table(self) -> tuple[NDArray[np.float64], ...] | None:
        """The corrected losses of every option, nats; ``None`` before the reference is measured."""
        return None if self._surrogate is None else tuple(self._surrogate.table())

    def _opening(self) -> list[Proposal]:
        """The first start on all windows, which is what others are compared with; then the rest."""
        first, *others = self._setting.starts
        reference = [Proposal(first, self._setting.fidelity(w)) for w in range(self._num_windows)]
        rest = [Proposal(start, self._setting.fidelity(i)) for i, start in enumerate(others)]
        return [reference[0], *rest, *reference[1:]]

    def _propose(self, pending: Collection[Assignment]) -> Proposal | None:
        self._num_asked += 1
        if self._queue:
            return self._note(self._queue.pop(0))
        turn = self._num_asked
        if turn % self._options.confirm_every == 0 and (again := self._confirmation()) is not None:
            return self._note(again)
        window = self._setting.fidelity(turn)
        for attempt in range(_MOST_ATTEMPTS):
            greedy = turn % self._options.exploit_every == 0 and attempt == 0
            proposal = Proposal(self._decode(greedy=greedy), window)
            if proposal.assignment not in pending and (
                (proposal.assignment, window) not in self._asked
            ):
                return self._note(proposal)
        # Samples bring nothing new: read more text with the best ones, or stop.
        again = self._confirmation()
        return None if again is None else self._note(again)

    def _note(self, proposal: Proposal) -> Proposal:
        self._asked.add((proposal.assignment, proposal.fidelity))
        return proposal

    def _decode(self, *, greedy: bool) -> Assignment:
        """The exact optimum of the posterior mean, or of a sample."""
        problem = self._setting.problem
        if self._surrogate is None:
            losses = [
                row * np.exp(self._rng.normal(scale=0.3, size=len(row))) for row in problem.losses
            ]
        else:
            losses = self._surrogate.table(
                None if greedy else self._rng, temperature=self._options.temperature
            )
        choice = self._oracle.solve(losses, problem.budget_bytes).choice
        return choice if self._surrogate is None else self._pull(choice, losses)

    def _pull(self, choice: Assignment, losses: Sequence[NDArray[np.float64]]) -> Assignment:
        """Keep a proposal within the trust radius of the best assignment, still decoded exactly.

        Every option that the best assignment does not take is charged the same extra loss, just
        enough (by bisection) that no more than ``radius`` units change.
        """
        centre = self.best
        assert centre is not None
        if _distance(choice, centre) <= self._radius:
            return choice
        budget = self._setting.problem.budget_bytes
        total = sum(float(row[i]) for row, i in zip(losses, centre, strict=True))
        low, high = 0.0, total
        for _ in range(_BISECTIONS):
            charge = (low * high) ** 0.5 if low > 0 else high * 1e-3
            charged = [
                row + charge * (np.arange(len(row)) != i)
                for row, i in zip(losses, centre, strict=True)
            ]
            pulled = self._oracle.solve(charged, budget).choice
            if _distance(pulled, centre) <= self._radius:
                high, choice = charge, pulled
            else:
                low = charge
        return choice if _distance(choice, centre) <= self._radius else centre

    def _confirmation(self) -> Proposal | None:
        """The best assignments so far on windows they have not been measured on."""
        if self._surrogate is None:
            return None
        for assignment in self._surrogate.ranked()[:3]:
            for window in range(self._num_windows):
                fidelity = self._setting.fidelity(window)
                if (assignment, fidelity) not in self._asked:
                    return Proposal(assignment, fidelity)
        return None

    def _digest(self) -> None:
        """Turn evaluations whose reference is known into observations."""
        if len(self._reference) < self._setting.num_sequences:
            return
        total = float(np.mean(list(self._reference.values())))
        if self._surrogate is None:
            self._surrogate = self._make_surrogate(total)
        for evaluation in self._waiting:
            before = self.best
            self._surrogate.add(self._observe(evaluation, total))
            self._adapt(before, evaluation.assignment)
        self._waiting = []
        if self._surrogate.num_observations >= self._next_tuning:
            self._next_tuning = self._surrogate.num_observations * 1.5
            self._surrogate.tune()

    def _adapt(self, before: Assignment | None, told: Assignment) -> None:
        """Widen the trust radius after an improvement, narrow it after a proposal that failed."""
        if before is None or told == before or told in self._setting.starts:
            return
        factor = 1.5 if self.best == told else self._options.shrink
        least = max(2.0, self._options.least_changes * len(told))
        self._radius = min(max(self._radius * factor, least), float(len(told)))

    def _make_surrogate(self, reference_loss: float) -> Surrogate:
        """The table scaled so that it explains the first start's measured loss."""
        problem, first = self._setting.problem, self._setting.starts[0]
        predicted = problem.total_loss(first)
        scale = reference_loss / predicted if predicted > 0 and reference_loss > 0 else 1.0
        floor = 1e-6 * abs(reference_loss) / len(problem.losses)
        return Surrogate(
            [np.maximum(row * scale, floor) for row in problem.losses],
            self._setting.kinds,
            self._setting.depths,
            reference_loss=abs(reference_loss),
            spreads=self._options.spreads,
        )

    def _observe(self, evaluation: Evaluation, total: float) -> Observation:
        """The loss on the whole split that a measurement on part of it stands for.

        Hard sequences lose more under every assignment, in proportion: the ratio to the reference
        on the same sequences is what carries over (the ratio estimator of survey sampling).
        """
        indices = evaluation.fidelity.indices(self._setting.num_sequences)
        ours = np.array(evaluation.sequence_nats)
        theirs = np.array([self._reference[i] for i in indices])
        if self._proportional(total):
            ratio = float(ours.mean() / theirs.mean())
            deviations = ours - ratio * theirs
            loss = ratio * total
        else:
            deviations = ours - theirs
            loss = total + float(deviations.mean())
        spread = float(deviations.std(ddof=1)) if len(ours) > 1 else 0.1 * abs(total)
        unseen = 1 - len(ours) / self._setting.num_sequences
        variance = unseen * spread**2 / len(ours) + (1e-3 * total) ** 2
        return Observation(evaluation.assignment, loss, variance)

    def _proportional(self, total: float) -> bool:
        """Whether the reference is clearly positive on every window, so that ratios mean something.

        A KL is; the increase of another loss over the dense model's need not be.
        """
        windows = [
            self._setting.fidelity(w).indices(self._setting.num_sequences)
            for w in range(self._num_windows)
        ]
        means = [np.mean([self._reference[i] for i in window]) for window in windows]
        return bool(min(means) > 0.2 * total > 0)

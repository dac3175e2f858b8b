"""Several tasks as one: general and domain text, or several losses, weighted.

The problem: a model compressed for one text forgets another (D-Pruner), and one that serves several
tasks needs one allocation for all of them. Here tasks that line up sequence by sequence become a
single task. Weights are given, or found by AdapMTL's rule: a task whose loss reacts more to
compression weighs more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from objectives.bank import Bank
from objectives.calibration import SPLITS
from objectives.evaluation import mean, round_significant
from objectives.task import SequenceLosses, Task, TokenMeter
from search_spaces.space import Assignment, SearchSpace

NUM_PROBES = 6
PROBE_SEQUENCES = 4


class MultiTask:
    """The weighted mean of several tasks' losses; sequence ``i`` is sequence ``i`` of each.

    Weights say how much a task counts beside the others. They are scaled to sum to the number of
    tasks, so that the loss of equal tasks is that of each, in its unit. Tasks whose losses differ
    in scale are weighted as they are: nats beside a relative error say nothing of fairness.

    Args:
        tasks: With as many sequences as each other in every split. The cross-entropy that is
            reported is that of the first.
        weights: One positive number each; equal ones if left out.

    Attributes:
        weights: Scaled to sum to the number of tasks.

    Raises:
        ValueError: No tasks, splits that do not line up, or weights that are not positive.
    """

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None) -> None:
        if not tasks:
            raise ValueError("a multi-task needs at least one task")
        for split in SPLITS:
            counts = [task.num_sequences(split) for task in tasks]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"the tasks' {split} splits have {', '.join(map(str, counts))} sequences: "
                    "give all tasks the same number"
                )
        given = [1.0] * len(tasks) if weights is None else list(weights)
        self.weights = check_weights(given, len(tasks))
        self.name = " + ".join(dict.fromkeys(task.name for task in tasks))
        self.has_slopes = all(task.has_slopes for task in tasks)
        self._tasks = tuple(tasks)

    @property
    def tokens_per_sequence(self) -> int:
        """Of all tasks together: each runs the model on its own tokens."""
        return sum(task.tokens_per_sequence for task in self._tasks)

    def num_sequences(self, split: str) -> int:
        """Sequences in a split of each task."""
        return self._tasks[0].num_sequences(split)

    def prepare(self, model: nn.Module, split: str) -> int:
        """Prepare every task; returns the tokens spent."""
        return sum(task.prepare(model, split) for task in self._tasks)

    def sequence_losses(
        self, model: nn.Module, split: str, indices: Sequence[int]
    ) -> SequenceLosses:
        """The weighted mean of the tasks' losses, and the first task's cross-entropy."""
        found = [task.sequence_losses(model, split, indices) for task in self._tasks]
        nats = [
            mean([weight * loss for weight, loss in zip(self.weights, losses, strict=True)])
            for losses in zip(*(one.nats for one in found), strict=True)
        ]
        return SequenceLosses(nats, found[0].cross_entropy_nats)

    def likelihood_loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The tasks' likelihood losses, scaled so that their empirical Fishers add up by weight.

        That is exact where the tasks' gradients are uncorrelated, as on different texts. Losses of
        one text that share a likelihood count more than once, all cells alike.
        """
        total = self.tokens_per_sequence * len(self._tasks)
        return _sum(
            [
                (weight * task.tokens_per_sequence / total) ** 0.5
                * task.likelihood_loss(model, split, index)
                for weight, task in zip(self.weights, self._tasks, strict=True)
            ]
        )

    def loss(self, model: nn.Module, split: str, index: int) -> Tensor:
        """The weighted mean of the tasks' measured losses, with a graph."""
        return _sum(
            [
                weight / len(self._tasks) * task.loss(model, split, index)
                for weight, task in zip(self.weights, self._tasks, strict=True)
            ]
        )


def check_weights(weights: Sequence[float], num_tasks: int) -> tuple[float, ...]:
    """Weights scaled to sum to the number of tasks.

    Raises:
        ValueError: Not one positive, finite number for each task.
    """
    if len(weights) != num_tasks:
        raise ValueError(f"expected {num_tasks} weights, one for each task, got {len(weights)}")
    bad = [weight for weight in weights if not 0 < weight < float("inf")]
    if bad:
        raise ValueError(f"weights must be positive and finite, got {bad[0]}")
    scale = num_tasks / sum(weights)
    return tuple(weight * scale for weight in weights)


def adaptive_weights(losses: ArrayLike, window: int | None = None) -> tuple[float, ...]:
    """AdapMTL's weights: how much each task's loss moves, relative to itself.

    The mean over a sliding window of ``|L(i) - L(i-1)| / L(i)``, scaled to sum to the number of
    tasks (AdapMTL, ACM MM 2024, its adaptive task weighting). Where a loss did not move its term is
    0. Terms of losses that only rise are below 1.

    Args:
        losses: (num_steps, num_tasks) measured one after the other.
        window: Latest changes that count; ``None`` for all.

    Raises:
        ValueError: Fewer than two steps, a faulty window, losses that are not finite, or a task
            whose loss never moved, which has no weight.
    """
    table: NDArray[np.float64] = np.asarray(losses, np.float64)
    if table.ndim != 2 or len(table) < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"expected finite losses (at least two steps, tasks), got {list(table.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"the window must hold at least one change, got {window}")
    moved = np.abs(np.diff(table, axis=0))
    size = np.abs(table[1:])
    with np.errstate(divide="ignore"):
        relative = np.divide(moved, size, out=np.zeros_like(moved), where=moved > 0)
    if not np.isfinite(relative).all():
        raise ValueError("a task's loss fell to exactly zero: its relative change is not defined")
    means = relative[-window if window else 0 :].mean(0)
    if not means.all():
        task = int(np.argmin(means))
        raise ValueError(f"the loss of task {task} does not react to compression: give weights")
    return check_weights(means.tolist(), table.shape[1])


def probe_assignments(space: SearchSpace, num_probes: int = NUM_PROBES) -> list[Assignment]:
    """From every unit's dearest option to its cheapest, in equal steps; equal for equal spaces."""
    steps = np.linspace(1.0, 0.0, num_probes)
    return [tuple(round(step * (len(menu) - 1)) for menu in space.menus) for step in steps]


def probe_weights(
    model: nn.Module, tasks: Sequence[Task], bank: Bank, meter: TokenMeter
) -> tuple[float, ...]:
    """AdapMTL's weights from measuring fixed assignments, milder ones first, before any search.

    The published rule follows a training run and changes the weights under way. A search whose
    loss changed under way could not compare its measurements, so they are found once, from the
    first sequences of the statistics text, and frozen.

    Args:
        model: The model of the bank; it is dense again afterwards.
        tasks: To be weighted.
        bank: Swaps the probes in.
        meter: Where tokens are counted, as ``probes``.

    Raises:
        ValueError: As :func:`adaptive_weights`.
    """
    split = "statistics"
    indices = range(min(PROBE_SEQUENCES, tasks[0].num_sequences(split)))
    bank.restore()
    for task in tasks:
        meter.add("probes", task.prepare(model, split))
    table = []
    try:
        for probe in probe_assignments(bank.space):
            bank.swap(probe)
            row = []
            for task in tasks:
                row.append(mean(task.sequence_losses(model, split, indices).nats))
                meter.add("probes", len(indices) * task.tokens_per_sequence)
            table.append(row)
    finally:
        bank.restore()
    return tuple(round_significant(weight) for weight in adaptive_weights(table))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

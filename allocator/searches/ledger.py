"""Comparing assignments that were measured on different sequences.

Some text is harder than other text, and the spread between sequences is far larger than the
difference between good assignments. The loss of assignment ``a`` on sequence ``s`` is modelled as
``loss[a] + effect[s]`` plus noise and fitted by least squares over everything that was told, so
that an assignment is not called better for having met easy text. Assignments that share no
sequence are compared through those that link them. Where nothing links two sets of sequences, both
their difficulty and the assignments met there count as draws from populations, and whichever varies
less within the sets says more about what differs between them. That is weak: searches should
measure something on every window they use.

With every assignment on every sequence this is the plain mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.searches.base import FrontPoint
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

_LEAST_PRIOR = 1e-3  # keeps the system regular where nothing links two sets of sequences
_LEAST_SHARE, _MOST_SHARE = 1e-6, 1e3  # where the variances of two populations are compared
_TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True)
class _Fit:
    """Least squares fit; rows in the order of first telling."""

    means: NDArray[np.float64]
    standard_errors: NDArray[np.float64]
    effects: NDArray[np.float64]
    noise: float


class Ledger:
    """What was measured, and the loss of each assignment with the sequences' effects removed.

    Args:
        num_sequences: Sequences in the search split.
    """

    def __init__(self, num_sequences: int) -> None:
        self._num_sequences = num_sequences
        self._values: dict[Assignment, dict[int, float]] = {}
        self._rows: dict[Assignment, int] = {}
        self._fit: _Fit | None = None

    def __len__(self) -> int:
        """Number of assignments with a finite loss."""
        return len(self._values)

    def __iter__(self) -> Iterator[Assignment]:
        """The assignments with a finite loss, in the order of first telling."""
        return iter(self._values)

    def add(self, evaluation: Evaluation) -> None:
        """Take in one evaluation; failed ones leave no trace."""
        if not evaluation.ok:
            return
        if evaluation.assignment not in self._values:
            self._rows[evaluation.assignment] = len(self._rows)
        values = self._values.setdefault(evaluation.assignment, {})
        indices = evaluation.fidelity.indices(self._num_sequences)
        values.update(zip(indices, evaluation.sequence_nats, strict=True))
        self._fit = None

    def adjusted(self, assignment: Assignment) -> tuple[float, float]:
        """Loss of an assignment as if measured on every sequence seen so far.

        Returns:
            Mean of (value - effect) over its sequences plus the mean effect, and its standard
            error under the model, both in nats.

        Raises:
            KeyError: Nothing finite was told of it.
        """
        row = self._rows[assignment]
        fit = self._fitted()
        return float(fit.means[row]), float(fit.standard_errors[row])

    def num_sequences(self, assignment: Assignment) -> int:
        """How many sequences an assignment was measured on.

        Raises:
            KeyError: Nothing finite was told of it.
        """
        return len(self._values[assignment])

    def front_point(self, assignment: Assignment, size: int) -> FrontPoint:
        """An assignment of ``size`` bytes with what is known of it.

        Raises:
            KeyError: Nothing finite was told of it.
        """
        return FrontPoint(
            assignment, size, *self.adjusted(assignment), self.num_sequences(assignment)
        )

    def best(self) -> Assignment | None:
        """The least adjusted loss plus one standard error, or ``None`` before anything succeeded.

        The standard error is charged because the least of many noisy numbers is mostly the
        luckiest: an assignment seen on little text has to look better by more. The earliest told
        wins ties.
        """
        if not self._values:
            return None
        fit = self._fitted()
        row = int(np.argmin(fit.means + fit.standard_errors))
        return list(self._values)[row]

    def _fitted(self) -> _Fit:
        if self._fit is None:
            self._fit = _fit(list(self._values.values()))
        return self._fit


def _fit(table: list[dict[int, float]]) -> _Fit:
    """Fit twice: the first fit's variances say how alike the second may take assignments to be."""
    columns = {index: j for j, index in enumerate(sorted({i for row in table for i in row}))}
    seen = np.zeros((len(table), len(columns)))
    values = np.zeros_like(seen)
    for i, row in enumerate(table):
        for index, value in row.items():
            seen[i, columns[index]] = 1.0
            values[i, columns[index]] = value
    sets, rows, sequences = _components(seen)
    first = _fit_additive(seen, values, sets=sets)
    alike = first.noise / max(float(first.means.var()), _TINY)
    prior = min(max(alike, _LEAST_PRIOR), 1.0)
    text = _within(first.effects, sequences) if sets > 1 else None
    if text is None:  # all is linked; or sets of one sequence say nothing of how text differs
        return _fit_additive(seen, values, prior, sets=sets)
    losses = _within(first.means, rows)
    variances = np.array([np.inf if losses is None else losses, text])
    noise = max(first.noise, _LEAST_SHARE * float(variances[np.isfinite(variances)].max()))
    # by how many sequences an assignment, and an effect, is known before any
    shares = np.minimum(noise / np.maximum(variances, _TINY), _MOST_SHARE)
    return _fit_additive(seen, values, max(shares[0], _LEAST_SHARE), shares[1], sets=sets)


def _components(
    seen: NDArray[np.float64],
) -> tuple[int, NDArray[np.intp], NDArray[np.intp]]:
    """How many sets nothing links; the set of each assignment, and of each sequence."""
    from scipy.sparse import coo_array  # slow to load
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.nonzero(seen)
    size = sum(seen.shape)
    graph = coo_array((np.ones(len(rows)), (rows, columns + len(seen))), shape=(size, size))
    count, found = connected_components(graph, directed=False)
    labels = found.astype(np.intp)
    return int(count), labels[: len(seen)], labels[len(seen) :]


def _within(values: NDArray[np.float64], labels: NDArray[np.intp]) -> float | None:
    """Variance of values around the means of their sets; ``None`` if each stands alone."""
    counts = np.bincount(labels)
    means = np.bincount(labels, values) / counts
    freedom = len(values) - len(counts)
    return float(((values - means[labels]) ** 2).sum() / freedom) if freedom else None


def _fit_additive(
    seen: NDArray[np.float64],
    values: NDArray[np.float64],
    prior: float = _LEAST_PRIOR,
    text_prior: float = 0.0,
    *,
    sets: int = 1,
) -> _Fit:
    """Two-way additive least squares, assignments and effects drawn to their common means.

    The assignments are eliminated first, which leaves one small system C in the effects; the common
    mean lives in the effects. The variance of a row mean given the effects is
    ``noise * (1 / n + k' C^-1 k)`` with ``k`` the row's average of effects minus that of all.

    Args:
        seen: (num_assignments, num_sequences) 1 where there is a value, else 0.
        values: The same shape, 0 where there is none.
        prior: Variance of the noise over that of the assignments: each is drawn to the mean as if
            by so many more sequences.
        text_prior: The same for the effects of sequences; 0 draws them to nothing.
        sets: How many sets of sequences nothing links.
    """
    counts = seen.sum(1)
    num_sequences = seen.shape[1]
    drawn = seen / (counts + prior)[:, None]
    system = np.diag(seen.sum(0)) - seen.T @ drawn
    system += text_prior * (np.eye(num_sequences) - 1 / num_sequences)
    effects = np.linalg.solve(system, values.sum(0) - drawn.T @ values.sum(1))
    losses = (values.sum(1) - seen @ effects) / counts
    residuals = seen * (values - effects - losses[:, None])
    freedom = seen.sum() - len(seen) - num_sequences + sets
    if freedom < 1:  # effects cannot be told from noise yet: the raw spread stands in
        raw = values[seen > 0]
        noise = float(raw.var(ddof=1)) if len(raw) > 1 else 0.0
    else:
        noise = float((residuals**2).sum() / freedom)
    contrast = seen / counts[:, None] - 1.0 / num_sequences
    spread = (contrast * np.linalg.solve(system, contrast.T).T).sum(1)
    errors = np.sqrt(noise * (1.0 / counts + spread))
    return _Fit(losses + float(effects.mean()), errors, effects, noise)

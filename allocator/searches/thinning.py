"""Search only among options that can win: menus without dominated ones.

The problem: a menu of bits, sparsities and ranks holds options that another one beats in bytes and
in loss by every estimate there is. Each of them costs the search measurements, and its surrogate
parameters. They are left out of what the search sees; everything outside keeps the full menus.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem
from allocator.searches.base import Proposal, Search, SearchSetting
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment

if TYPE_CHECKING:
    from objectives.sensitivity import LossTable  # loads torch

Kept = tuple[tuple[int, ...], ...]
"""For each unit the options that are left, in the menu's order."""


def undominated(
    problem: Problem,
    tables: Collection[LossTable],
    always: Iterable[Assignment],
    latency: Sequence[NDArray[np.float64]] = (),
) -> Kept:
    """The options of each unit that no other one beats in bytes and in every table.

    Args:
        problem: Gives the bytes.
        tables: Estimates; an option must lose in all of them to be left out. Equal ones lose to
            the first of the menu.
        always: Assignments whose options stay, such as uniform.
        latency: For each unit the seconds of its options, where they count: an option must lose in
            them too.
    """
    starts = tuple(always)
    kept = []
    for unit, sizes in enumerate(problem.bytes):
        losses = [*(table.losses[unit] for table in tables), *latency[unit : unit + 1]]
        criteria = np.stack([sizes.astype(float), *losses])
        stays = {start[unit] for start in starts}
        # [i, j]: option i is no larger and nowhere worse than option j
        no_worse = np.asarray((criteria[:, :, None] <= criteria[:, None, :]).all(axis=0))
        for option in range(len(sizes)):
            rivals = no_worse[:, option] & ~(no_worse[option] & (np.arange(len(sizes)) >= option))
            rivals[option] = False
            if not rivals.any():
                stays.add(option)
        kept.append(tuple(sorted(stays)))
    return tuple(kept)


def thinned_setting(setting: SearchSetting, kept: Kept) -> SearchSetting:
    """The setting of a search that knows only the options that are left."""
    return replace(
        setting,
        problem=thinned_problem(setting.problem, kept),
        starts=tuple(narrow(start, kept) for start in setting.starts),
        removed=_thinned_rows(setting.removed, kept),
        latency=_thinned_rows(setting.latency, kept),
        labels=tuple(
            tuple(names[i] for i in options)
            for names, options in zip(setting.labels, kept, strict=False)
        ),
        tables=tuple(_thinned_rows(table, kept) for table in setting.tables),
    )


def _thinned_rows(
    rows: Sequence[NDArray[np.float64]], kept: Kept
) -> tuple[NDArray[np.float64], ...]:
    """A value per option, of those that are left; empty where there are none."""
    return tuple(row[np.array(options)] for row, options in zip(rows, kept, strict=False))


def thinned_problem(full: Problem, kept: Kept) -> Problem:
    """The same budget and the options that are left."""
    pairs = [np.array(options) for options in kept]
    return Problem(
        tuple(sizes[chosen] for sizes, chosen in zip(full.bytes, pairs, strict=True)),
        tuple(losses[chosen] for losses, chosen in zip(full.losses, pairs, strict=True)),
        full.budget_bytes,
    )


class Thinned:
    """A search over the options that are left, seen from outside as one over the full menus."""

    name: ClassVar[str] = "thinned"

    def __init__(self, search: Search, kept: Kept) -> None:
        self._search = search
        self._kept = kept

    def ask(self, count: int, pending: Collection[Assignment]) -> list[Proposal]:
        """The inner search's proposals, in options of the full menus."""
        pending_kept = {narrow(assignment, self._kept) for assignment in pending}
        return [
            Proposal(widen(proposal.assignment, self._kept), proposal.fidelity)
            for proposal in self._search.ask(count, pending_kept)
        ]

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Hand results on in the inner search's options; it has no words for the others."""
        self._search.tell(
            [
                replace(
                    e,
                    assignment=narrow(e.assignment, self._kept),
                    slopes=None if e.slopes is None else e.slopes.kept(self._kept),
                )
                for e in evaluations
                if all(i in options for i, options in zip(e.assignment, self._kept, strict=True))
            ]
        )

    @property
    def best(self) -> Assignment | None:
        """The inner search's best, in options of the full menus."""
        best = self._search.best
        return None if best is None else widen(best, self._kept)


def narrow(assignment: Assignment, kept: Kept) -> Assignment:
    """An assignment of kept options, counted among them."""
    return tuple(options.index(i) for options, i in zip(kept, assignment, strict=True))


def widen(assignment: Assignment, kept: Kept) -> Assignment:
    """The inverse of :func:`narrow`."""
    return tuple(options[i] for options, i in zip(kept, assignment, strict=True))

"""The exact search between the relaxed bound and the best known assignment.

Few options can be part of a better assignment: those whose reduced loss is below the gap. They are
added unit by unit, cheapest deviation first, to a list of undominated states, starting from the
relaxed optimum itself (the "minimal core" of Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem", sections 3 to 5). Every state is a complete assignment, since
the units not yet added stay where the relaxation put them, so the best known one improves on the
way and the core closes by itself. Bytes are never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Costs, Losses
from allocator.solvers.hull import Indices, Relaxation, rounding

_NEVER = 1e200  # a price per quantum that no state can pay; finite, since 0 * inf is not 0


@dataclass(frozen=True)
class CoreResult:
    """The best assignment found.

    Attributes:
        columns: (num_units,) its columns.
        excess: Its loss above the relaxed bound.
        excess_bound: No assignment has less excess; equals ``excess`` when proved optimal.
        num_units: Units whose options were searched.
        num_states: States kept, summed over units.
    """

    columns: Indices
    excess: float
    excess_bound: float
    num_units: int
    num_states: int


@dataclass(frozen=True)
class _Core:
    """The deviations worth trying, flat, grouped by unit, units ordered by cheapest deviation.

    Attributes:
        units: (num_core_units,) unit indices.
        begins: (num_core_units + 1,) where each unit's deviations begin in the flat arrays.
        columns: (num_deviations,) the column that a deviation takes.
        extra: (num_deviations,) its quanta relative to the relaxed optimum, may be negative.
        reduced: (num_deviations,) its reduced loss.
        nearest: (num_core_units + 1,) least reduced loss from this unit on.
        filling: (num_core_units + 1,) least reduced loss per quantum added from this unit on.
        freeing: (num_core_units + 1,) least reduced loss per quantum freed from this unit on.
    """

    units: Indices
    begins: Indices
    columns: Indices
    extra: Costs
    reduced: Losses
    nearest: Losses
    filling: Losses
    freeing: Losses


class _Layer(NamedTuple):
    """The states kept after a unit was added.

    Attributes:
        kept: (num_states,) for each its parent among the states before, plus ``num_before`` times
            the number of the unit's deviation, counted from 1; 0 for none.
        num_before: States before.
    """

    kept: Indices
    num_before: int


@dataclass
class _Best:
    """The best assignment so far: a state before a unit was added, and that unit's deviation."""

    excess: float
    step: int = -1
    state: int = -1
    deviation: int = -1


def search_core(
    weights: Costs, losses: Losses, relaxation: Relaxation, *, most_states: int
) -> CoreResult:
    """Find the assignment of least excess over the relaxed bound.

    Args:
        weights: (num_units, num_columns) quanta.
        losses: (num_units, num_columns).
        relaxation: The relaxed optimum at the budget.
        most_states: States kept at most after each unit; beyond it those of least bound are kept
            and the least bound given up limits ``excess_bound``.
    """
    extra, reduced = relaxation.reduced(weights, losses)
    columns, excess = improve_once(extra, reduced, relaxation)
    tolerance = rounding(losses, relaxation.columns)
    core = _make_core(extra, np.where(_undominated(losses), reduced, np.inf), excess - tolerance)
    best = _Best(excess)
    layers, given_up = _expand(core, relaxation, best, tolerance=tolerance, most_states=most_states)
    if best.step >= 0:
        columns = relaxation.columns.copy()
        _trace_back(core, layers, best, columns)
    bound = best.excess if given_up >= best.excess - tolerance else given_up
    num_states = sum(len(layer.kept) for layer in layers)
    return CoreResult(columns, best.excess, bound, len(layers), num_states)


def improve_once(extra: Costs, reduced: Losses, relaxation: Relaxation) -> tuple[Indices, float]:
    """The best feasible choice one deviation away from the relaxed optimum rounded down or up.

    Returns:
        (num_units,) columns and their excess.
    """
    columns, multiplier, left = relaxation.columns, relaxation.multiplier, relaxation.left
    excess = multiplier * left
    best: list[tuple[int, int]] = []
    tries: list[tuple[int, list[tuple[int, int]]]] = [(left, [])]
    if relaxation.unit >= 0:
        step = (relaxation.unit, relaxation.column)
        tries.append((left - int(extra[step]), [step]))
    for room, taken in tries:
        total = np.where(extra <= room, reduced + multiplier * (room - extra), np.inf)
        if taken:
            total[relaxation.unit] = np.inf
        unit, column = divmod(int(total.argmin()), total.shape[1])
        if total[unit, column] < excess:
            excess = float(total[unit, column])
            best = [*taken, (unit, column)]
    columns = columns.copy()
    for unit, column in best:
        columns[unit] = column
    return columns, excess


def _undominated(losses: Losses) -> NDArray[np.bool_]:
    """Where a column, in order of bytes, has less loss than all before it."""
    least = np.minimum.accumulate(losses, axis=1)
    keep = np.ones(losses.shape, dtype=np.bool_)
    keep[:, 1:] = losses[:, 1:] < least[:, :-1]
    return keep


def _make_core(extra: Costs, reduced: Losses, limit: float) -> _Core:
    """Keep the deviations whose reduced loss is below the limit, in the order of their units."""
    rows, columns = np.nonzero((reduced < limit) & (extra != 0))
    flat_reduced, flat_extra = reduced[rows, columns], extra[rows, columns]
    cheapest = np.full(len(reduced), np.inf)
    np.minimum.at(cheapest, rows, flat_reduced)
    order = np.lexsort((flat_reduced, rows, cheapest[rows]))
    rows, columns = rows[order], columns[order]
    flat_reduced, flat_extra = flat_reduced[order], flat_extra[order]
    begins = np.flatnonzero(np.diff(rows, prepend=-1))
    per_quantum = flat_reduced / np.abs(flat_extra)
    return _Core(
        units=rows[begins],
        begins=np.append(begins, len(rows)),
        columns=columns,
        extra=flat_extra,
        reduced=flat_reduced,
        nearest=np.append(cheapest[rows[begins]], np.inf),
        filling=_least_from(np.where(flat_extra > 0, per_quantum, _NEVER), begins),
        freeing=_least_from(np.where(flat_extra < 0, per_quantum, _NEVER), begins),
    )


def _least_from(values: Losses, begins: Indices) -> Losses:
    """(num_deviations,) -> (num_groups + 1,) least value from each group to the end."""
    if not len(begins):
        return np.array([_NEVER])
    least = np.append(np.minimum.reduceat(values, begins), _NEVER)
    return np.minimum.accumulate(least[::-1])[::-1]


def _expand(
    core: _Core, relaxation: Relaxation, best: _Best, *, tolerance: float, most_states: int
) -> tuple[list[_Layer], float]:
    """Add unit after unit to the undominated states; improves ``best`` in place.

    Returns:
        A layer for each unit added; and the least excess that given-up states could have led to.
    """
    multiplier = relaxation.multiplier
    over = np.array([-relaxation.left], dtype=np.int64)  # quanta over the budget, ascending
    spent_loss = np.zeros(1)  # summed reduced loss
    layers: list[_Layer] = []
    given_up = np.inf
    for step in range(len(core.units)):
        limit = best.excess - tolerance
        begin, end = int(core.begins[step]), int(core.begins[step + 1])
        end = begin + int(np.searchsorted(core.reduced[begin:end], limit))
        if begin == end or not len(over):
            break  # neither this unit nor a later one can improve on the best
        num_old = len(over)
        over = np.add.outer(np.append(0, core.extra[begin:end]), over).ravel()
        spent_loss = np.add.outer(np.append(0.0, core.reduced[begin:end]), spent_loss).ravel()
        total = spent_loss - multiplier * over  # with what the room left is worth
        finished = np.where(over <= 0, total, np.inf)
        winner = int(finished.argmin())
        if finished[winner] < best.excess:
            best.excess, best.step = float(finished[winner]), step
            best.state, best.deviation = winner % num_old, begin + winner // num_old - 1
            limit = best.excess - tolerance
        # A state that is to become better than the best must still deviate somewhere, and room
        # left or lacking is paid at the best remaining rate.
        rate = min(multiplier, core.filling[step + 1])
        to_pay = over * np.where(over < 0, -rate, core.freeing[step + 1])
        bound = spent_loss + np.maximum(to_pay, core.nearest[step + 1])
        alive = np.flatnonzero(bound < limit)
        alive = alive[_undominated_states(over[alive], total[alive])]
        if len(alive) > most_states:
            by_bound = np.argsort(bound[alive], kind="stable")
            given_up = min(given_up, float(bound[alive[by_bound[most_states]]]))
            alive = alive[np.sort(by_bound[:most_states])]
        over, spent_loss = over[alive], spent_loss[alive]
        layers.append(_Layer(alive, num_old))
    return layers, given_up


def _undominated_states(over: Costs, total: Losses) -> Indices:
    """Indices of the states that no other has more room and less loss than, by descending room.

    Args:
        over: (num_states,) quanta over the budget.
        total: (num_states,) loss with what the room left is worth.
    """
    order = np.argsort(over, kind="stable")  # merges runs that are sorted already
    over, total = over[order], total[order]
    better = np.ones(len(order), dtype=np.bool_)
    better[1:] = total[1:] < np.minimum.accumulate(total)[:-1]
    order, over = order[better], over[better]
    # Of equal room the last one kept has the least loss.
    last = np.ones(len(order), dtype=np.bool_)
    last[:-1] = over[:-1] != over[1:]
    return order[last]


def _trace_back(core: _Core, layers: list[_Layer], best: _Best, columns: Indices) -> None:
    """Write the deviations that led to the best state into ``columns``."""
    deviation, state = best.deviation, best.state
    for step in range(best.step, -1, -1):
        if step < best.step:
            taken, state = divmod(int(layers[step].kept[state]), layers[step].num_before)
            if not taken:  # the unit stays where the relaxation put it
                continue
            deviation = int(core.begins[step]) + taken - 1
        columns[core.units[step]] = core.columns[deviation]

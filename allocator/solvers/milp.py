"""The additive problem with everything in it: several limits and tied units, by HiGHS.

One binary variable per option of each group of tied units, one row per group that picks exactly
one, one row per limit. Branch and bound gives a bound and a gap with every answer. Where a byte
budget is all there is, `dynamic.py` is exact and far faster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.problem import Problem, Solution, Status
from allocator.solvers.base import check_extras, infeasible

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint  # slow to load

_Array = NDArray[np.float64]
_ABSOLUTE_GAP = 1e-6  # HiGHS stops here, in the unit of its objective
_OBJECTIVE_RANGE = 1e6  # so we hand it losses scaled to this range
_LARGEST_COEFFICIENT = 2.0**20
_MOST_CUTS = 50


@dataclass(frozen=True)
class MixedInteger:
    """Branch and bound through ``scipy.optimize.milp``; takes constraints and ties.

    Attributes:
        time_limit_s: Seconds before the best found is returned, as ``FEASIBLE`` with the bound
            reached; ``None`` for no limit.
        relative_gap: Gap, relative to the loss above the sum of all units' least, at which to
            stop; a solution further than HiGHS's absolute tolerance from its bound is called
            ``FEASIBLE``.
    """

    name: ClassVar[str] = "milp"
    time_limit_s: float | None = None
    relative_gap: float = 0.0

    def solve(self, problem: Problem) -> Solution:
        """The optimum, or the best found within the time.

        Raises:
            ValueError: A tie or a constraint does not fit the units, or nothing feasible was found
                within the time.
            RuntimeError: HiGHS failed.
        """
        from scipy.optimize import Bounds, milp

        check_extras(problem)
        model = _Model.of(problem)
        started = time.monotonic()
        cuts: list[NDArray[np.intp]] = []
        while len(cuts) <= _MOST_CUTS:
            result = milp(
                model.losses,
                integrality=np.ones(len(model.losses), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=model.constraints(cuts),
                options={"mip_rel_gap": self.relative_gap, "time_limit": self._left_s(started)},
            )
            if result.status == 2:
                return infeasible()
            if result.status not in (0, 1):
                raise RuntimeError(f"HiGHS failed: {result.message}")
            if result.x is None:
                raise ValueError(
                    f"no feasible assignment found within time_limit_s={self.time_limit_s}; "
                    "allow more time"
                )
            picked = model.picked(result.x)
            choice = model.choice(picked)
            if _fits(problem, choice):
                bound = model.unscaled(max(0.0, result.mip_dual_bound or 0.0))
                loss = problem.total_loss(choice)
                tolerance = 2 * _ABSOLUTE_GAP / model.scale
                proved = result.status == 0 and loss - bound <= tolerance
                return Solution(
                    choice=choice,
                    loss=loss,
                    bytes=problem.total_bytes(choice),
                    lower_bound=min(loss, bound),
                    status=Status.OPTIMAL if proved else Status.FEASIBLE,
                    statistics={"num_nodes": int(result.mip_node_count), "num_cuts": len(cuts)},
                )
            cuts.append(picked)  # within HiGHS's tolerance of a limit, but beyond it: forbid it
        raise RuntimeError(
            f"HiGHS proposed {_MOST_CUTS} assignments that break a limit by less than its tolerance"
        )

    def _left_s(self, started: float) -> float:
        """Seconds left; the limit is for all calls of HiGHS together."""
        limit = np.inf if self.time_limit_s is None else self.time_limit_s
        return max(0.0, limit - (time.monotonic() - started))


@dataclass(frozen=True)
class _Model:
    """The problem as HiGHS sees it: variables are the options of groups of tied units.

    Attributes:
        groups: (num_units,) the group of each unit.
        begins: (num_groups + 1,) where each group's variables begin.
        losses: (num_variables,) above the group's least, scaled.
        scale: What losses were multiplied by.
        offset: Sum of the groups' least losses, not scaled.
        limits: For each limit its (num_variables,) coefficients and upper bound.
    """

    groups: NDArray[np.intp]
    begins: NDArray[np.intp]
    losses: _Array
    scale: float
    offset: float
    limits: tuple[tuple[_Array, float], ...]

    @classmethod
    def of(cls, problem: Problem) -> _Model:
        """Merge tied units, shift and scale."""
        groups = _tied_groups(problem)
        loss_rows = _merge(problem.losses, groups)
        least = [float(row.min()) for row in loss_rows]
        above = np.concatenate([row - low for row, low in zip(loss_rows, least, strict=True)])
        total_range = float(sum(row.max() - row.min() for row in loss_rows))
        scale = _OBJECTIVE_RANGE / total_range if total_range > 0 else 1.0

        byte_rows = _merge(problem.bytes, groups)
        cheapest = [int(row.min()) for row in byte_rows]
        extra = np.concatenate([row - low for row, low in zip(byte_rows, cheapest, strict=True)])
        quantum = int(np.gcd.reduce(extra)) or 1
        capacity = (problem.budget_bytes - sum(cheapest)) // quantum
        limits = [_scaled((extra // quantum).astype(np.float64), float(capacity))]
        for constraint in problem.constraints:
            costs = np.concatenate(_merge(constraint.costs, groups))
            limits.append(_scaled(costs, float(constraint.limit)))
        begins = np.cumsum([0, *map(len, loss_rows)])
        return cls(groups, begins, above * scale, scale, sum(least), tuple(limits))

    def constraints(self, cuts: Sequence[NDArray[np.intp]]) -> list[LinearConstraint]:
        """One option per group, the limits, and the forbidden assignments."""
        from scipy import sparse
        from scipy.optimize import LinearConstraint

        num_variables, num_groups = len(self.losses), len(self.begins) - 1
        pick_one = sparse.csr_matrix(
            (np.ones(num_variables), np.arange(num_variables), self.begins),
            shape=(num_groups, num_variables),
        )
        rows = [coefficients for coefficients, _ in self.limits]
        uppers = [upper for _, upper in self.limits]
        for picked in cuts:
            row = np.zeros(num_variables)
            row[picked] = 1.0
            rows.append(row)
            uppers.append(num_groups - 1.0)
        return [
            LinearConstraint(pick_one, 1, 1),
            LinearConstraint(sparse.csr_matrix(np.stack(rows)), -np.inf, np.array(uppers)),
        ]

    def picked(self, values: _Array) -> NDArray[np.intp]:
        """(num_variables,) near-binary values -> (num_groups,) the variable each group picks."""
        ends = zip(self.begins[:-1], self.begins[1:], strict=True)
        return np.array([begin + int(values[begin:end].argmax()) for begin, end in ends])

    def choice(self, picked: NDArray[np.intp]) -> tuple[int, ...]:
        """(num_groups,) picked variables -> one option index per unit."""
        return tuple((picked - self.begins[:-1])[self.groups].tolist())

    def unscaled(self, objective: float) -> float:
        """HiGHS's objective as a summed loss."""
        return self.offset + objective / self.scale


def _tied_groups(problem: Problem) -> NDArray[np.intp]:
    """(num_units,) a group number for each unit; overlapping ties make one group."""
    labels = np.arange(len(problem.bytes))
    for tie in problem.ties:
        touched = labels[list(tie)]
        labels[np.isin(labels, touched)] = touched.min()
    groups: NDArray[np.intp] = np.unique(labels, return_inverse=True)[1]
    return groups


def _merge(rows: Sequence[NDArray[Any]], groups: NDArray[np.intp]) -> list[NDArray[Any]]:
    """Sum the rows of each group; options beyond a group's shortest menu cannot be shared."""
    merged: list[NDArray[Any] | None] = [None] * (int(groups.max()) + 1)
    for row, group in zip(rows, groups.tolist(), strict=True):
        so_far = merged[group]
        if so_far is None:
            merged[group] = row
        else:
            shared = min(len(so_far), len(row))
            merged[group] = so_far[:shared] + row[:shared]
    return [row for row in merged if row is not None]


def _scaled(coefficients: _Array, upper: float) -> tuple[_Array, float]:
    """Bring large coefficients to where HiGHS's absolute tolerances mean something."""
    factor = min(1.0, _LARGEST_COEFFICIENT / max(1.0, float(np.abs(coefficients).max())))
    return coefficients * factor, upper * factor


def _fits(problem: Problem, choice: Sequence[int]) -> bool:
    """Whether an assignment keeps every limit exactly."""
    if problem.total_bytes(choice) > problem.budget_bytes:
        return False
    return all(
        sum(float(cost[index]) for cost, index in zip(limit.costs, choice, strict=True))
        <= limit.limit
        for limit in problem.constraints
    )

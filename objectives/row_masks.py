"""Which weights of a row a sparsity drops: ranks of importance, and exact numbers of survivors.

The problem: what learns how much of a row to drop needs masks that follow a number smoothly and in
the end whole numbers of weights. Ranks within the row, by Wanda's score, serve both: dropping a
share s of n weights drops the ranks up to s n.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from objectives.mappers import box_project
from search_spaces.operators import Statistics
from search_spaces.operators.prune import num_pruned, score_weights
from search_spaces.space import Member


def row_ranks(weight: Tensor, member: Member, stats: Statistics, scorer: str) -> Tensor:
    """Rank of each weight in its row, 1 for the least important, by Wanda's score.

    Args:
        weight: (matrices, rows, columns).
        member: For the message.
        stats: Holds the second moment.
        scorer: For the message.

    Returns:
        (matrices, rows, columns) int16, or int32 for wider rows.

    Raises:
        ValueError: The inputs of the member could not be observed.
    """
    if stats.second_moment is None:
        raise ValueError(
            f"scorer {scorer}: the inputs of {member.name} cannot be observed; exclude it"
        )
    columns = weight.shape[-1]
    dtype = torch.int16 if columns < 2**15 else torch.int32
    ranks = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    places = torch.arange(1, columns + 1, dtype=dtype, device=weight.device)
    for matrix, made in zip(weight, ranks, strict=True):
        order = score_weights("wanda", matrix.float(), stats, scorer).argsort(dim=1, stable=True)
        made.scatter_(1, order, places.expand_as(made))
    return ranks


def least_share(columns: NDArray[np.int64], floor: float) -> float:
    """The smallest share that keeps whole weights, at least ``floor`` and one, of every row."""
    return max(max(1, math.ceil(floor * n - 1e-9)) / n for n in {int(n) for n in columns})


def exact_survivors(
    keep: NDArray[np.float64], columns: NDArray[np.int64], removed: float, least: float
) -> NDArray[np.int64]:
    """Shift all rows by one share, then round by largest remainder, until the total is exact.

    Args:
        keep: (rows,) share that each row would keep.
        columns: (rows,) weights of each.
        removed: Share of all weights to drop, rounded to whole weights.
        least: Share that each row keeps at least.

    Returns:
        (rows,) weights that each row keeps.

    Raises:
        ValueError: The target lies outside what the rows can do.
    """
    num_weights = int(columns.sum())
    num_kept = num_weights - num_pruned(num_weights, removed)
    wanted = columns * box_project(keep, columns, num_kept / num_weights, least=least, most=1.0)
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    missing = num_kept - int(counts.sum())
    assert 0 <= missing <= len(counts), missing
    # Shares that differ by less than rounding still round in their own order.
    counts[np.lexsort((-keep, counts - wanted))[:missing]] += 1
    return counts

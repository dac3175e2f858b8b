"""Fronts: what no other point beats in every objective, and how much of the plane they dominate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nondominated(points: NDArray[np.float64]) -> list[int]:
    """Rows that no other row beats, in ascending order of their columns; equal rows count once.

    Args:
        points: (num_points, num_objectives), lower is better.
    """
    order = np.lexsort(points.T[::-1])
    front: list[int] = []
    for row in order:  # whatever beats a row comes before it
        if not front or not (points[front] <= points[row]).all(axis=1).any():
            front.append(int(row))
    return front


def hypervolume(points: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Volume of what is beaten by some point and beats the reference.

    Args:
        points: (num_points, num_objectives), lower is better.
        reference: (num_objectives,); points that do not beat it contribute nothing.
    """
    points = points[(points < reference).all(axis=1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    points = points[points[:, -1].argsort(kind="stable")]
    depths = np.diff(points[:, -1], append=reference[-1])  # slices of the last objective
    return float(
        sum(
            depth * hypervolume(points[: i + 1, :-1], reference[:-1])
            for i, depth in enumerate(depths)
            if depth > 0
        )
    )

"""Means with intervals over seeds, and the order of the cells: for the table and the curves."""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student

OURS = "model_guided"


def interval(values) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds; the half is NaN for one seed."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    half = student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(half)


def place_order(place: tuple[str, str]) -> tuple[str, float]:
    """Spaces by name, their budgets by size."""
    return place[0], float(place[1].split()[0])

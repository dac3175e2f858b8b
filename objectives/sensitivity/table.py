"""The additive loss table: what scorers fill and solvers read. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LossTable:
    """Additive losses of every option of every unit.

    Attributes:
        scorer: Who made it.
        unit: ``nats`` per token, or a unit of the scorer's own.
        losses: For each unit a float64 (num_options,) array.
    """

    scorer: str
    unit: str
    losses: tuple[NDArray[np.float64], ...]

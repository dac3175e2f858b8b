"""Racing: two assignments are read on the same text until one of them has clearly lost.

The problem: most candidates are settled on a fraction of the text that the closest of them need.
Reading both in rungs, with a paired test after each, spends text where the question is open
(Maron and Moore, 1994; Birattari et al., 2002: "F-race").
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

_LEAST_PAIRS = 3


class Verdict(Enum):
    """What a race has shown of the challenger so far."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "open"


def judge(challenger: Sequence[float], incumbent: Sequence[float], level: float) -> Verdict:
    """Paired t-test of losses on the same sequences, each side at a level.

    The level is that of one look; looking again after each rung errs more often, by less than the
    number of looks.

    Args:
        challenger: Loss of each sequence, nats per token; infinite where a measurement failed.
        incumbent: Of the same sequences.
        level: Probability of calling a race whose losses do not differ, to each side; 0 never
            calls one but for a failed challenger.
    """
    from scipy.special import stdtr  # slow to load

    ours, theirs = np.asarray(challenger), np.asarray(incumbent)
    if not np.isfinite(ours).all():
        return Verdict.WORSE
    differences = ours - theirs
    if len(differences) < _LEAST_PAIRS or not np.isfinite(differences).all():
        return Verdict.OPEN
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation == 0:
        found = float(np.sign(mean)) * np.inf if mean else 0.0
    else:
        found = mean / deviation * len(differences) ** 0.5
    if stdtr(len(differences) - 1, -abs(found)) >= level:
        return Verdict.OPEN
    return Verdict.WORSE if mean > 0 else Verdict.BETTER

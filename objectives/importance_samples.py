"""What searches over layer statistics look at: a small sorted sample of each unit's importances.

The problem: an expression of a layer's importances is evaluated thousands of times, on models whose
importances are as many as their weights. Evenly spaced quantiles keep what a reduction over all of
them would see, in a few kilobytes per unit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from objectives.bank import Bank
from search_spaces.operators import Statistics
from search_spaces.operators.members import logical
from search_spaces.space import SearchSpace

NUM_SAMPLES = 1024


def importance_samples(
    space: SearchSpace,
    bank: Bank,
    statistics: Mapping[str, Statistics],
    *,
    num_samples: int = NUM_SAMPLES,
) -> tuple[NDArray[np.float64], ...]:
    """Quantiles of ``abs(W_ij) sqrt(E x_j^2)`` (Wanda's score) over all weights of each unit.

    Args:
        space: The units.
        bank: Gives the dense weights.
        statistics: By member name, with second moments.
        num_samples: Quantiles of each unit, at the middles of as many equal shares.

    Returns:
        For each unit (num_samples,), ascending.

    Raises:
        ValueError: A unit is a cache, or the inputs of a parameter could not be observed.
    """
    samples = []
    for index, unit in enumerate(space.units):
        if unit.is_cache:
            raise ValueError(f"importances: {unit.name} is a cache, which has no weights")
        scores = []
        for member, dense in zip(unit.members, bank.dense(index), strict=True):
            moment = statistics.get(member.name, Statistics()).second_moment
            if moment is None:
                raise ValueError(
                    f"importances: the inputs of {member.name} cannot be observed; exclude it"
                )
            weight = logical(dense, member).detach().float()
            scores.append((weight.abs() * moment.to(weight.device).sqrt()).flatten())
        ordered = torch.cat(scores).sort().values
        middles = (torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples
        positions = (middles * len(ordered)).long().to(ordered.device)
        samples.append(ordered[positions].double().cpu().numpy())
    return tuple(samples)

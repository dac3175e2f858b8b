"""Empirical Fisher: a second-order estimate of the KL that compression causes.

Around the dense model the KL is ``1/2 d' F d`` with F the Fisher information per token and d the
weight error; F is replaced by its diagonal, estimated from one gradient per sequence. The numbers
are nats per token, too small where errors leave the quadratic region or correlate (2 and 3 bits).
A cache has no weights: its nats are measured, one cache at a time.
"""

from __future__ import annotations

from typing import ClassVar

from objectives.sensitivity.base import CellScorer, ScoringContext, weighted_square


class Fisher(CellScorer):
    """``1/2 sum F_ij (W - W')_ij^2``, nats per token."""

    name: ClassVar[str] = "fisher"
    unit: ClassVar[str] = "nats"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    def cell(self, context: ScoringContext, unit: int, option: int) -> float:
        """Second-order loss of one option, nats per token."""
        if (cached := context.cache_loss(unit, option)) is not None:
            return cached.nats
        total = 0.0
        for member, _, error, stats in context.errors(unit, option):
            assert stats.fisher is not None, member.name
            total += 0.5 * weighted_square(error, stats.fisher.to(error.device))
        return total

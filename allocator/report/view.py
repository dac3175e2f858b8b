"""What a report shows: plain numbers gathered from a finished run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from allocator.plan import Plan
from allocator.searches.base import FrontPoint


@dataclass(frozen=True)
class Measurement:
    """One told evaluation of the search.

    Attributes:
        tokens: Search tokens spent up to and including it.
        loss_nats: Measured loss, adjusted to the whole search split; ``None`` when it failed.
        standard_error_nats: Of that loss.
        predicted_nats: What the additive loss table said.
        origin: ``dp``, ``uniform``, ``start`` or ``search``.
    """

    tokens: int
    loss_nats: float | None
    standard_error_nats: float
    predicted_nats: float
    origin: str


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the additive frontier: payload bytes of the searched units, predicted nats."""

    searched_bytes: int
    predicted_nats: float


@dataclass(frozen=True)
class RunView:
    """Everything the report needs.

    Attributes:
        name: The run's name.
        plan: The returned plan, with all measured baselines in it.
        dp_plan_labels: For each unit the operator label in the DP plan, in the plan's unit order.
        num_weights: Searched weights.
        dense_searched_bytes: Payload of the searched units at 16 bits.
        container_bytes: Header of the packed file.
        frontier: The additive frontier, by rising bytes.
        front: The measured front of a search of several objectives, by rising bytes.
        measurements: Told evaluations in order.
        rank_correlation: Spearman's between predicted and measured losses of the distinct search
            evaluations; ``None`` with fewer than three.
        settings: What the run was asked to do, as label -> text, in display order.
        notes: Warnings and facts worth a reader's attention, one sentence each.
        predicted_unit: Unit of every predicted loss: that of the plan's measured losses, or the
            scorer's own, which only ranks.
        method_bytes: For ``uniform``, ``dp`` and ``search``, each if it exists, the payload of the
            searched units; what is missing is not drawn on the frontier.
    """

    name: str
    plan: Plan
    dp_plan_labels: tuple[str, ...]
    num_weights: int
    dense_searched_bytes: int
    container_bytes: int
    frontier: tuple[FrontierPoint, ...]
    measurements: tuple[Measurement, ...]
    rank_correlation: float | None
    settings: dict[str, str]
    notes: tuple[str, ...] = ()
    predicted_unit: str = "unknown unit"
    front: tuple[FrontPoint, ...] = ()
    method_bytes: dict[str, int] = field(default_factory=dict)

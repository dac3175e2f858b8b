"""How good the plan is: what was measured, what was only predicted, and what is proved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.plan import Measured, Plan
from allocator.report.figures import (
    agreement_figure,
    best_so_far,
    frontier_figure,
    heldout_figure,
    progress_figure,
)
from allocator.report.markup import (
    Markup,
    Table,
    columns,
    details,
    facts,
    figure,
    join,
    paragraph,
    render_table,
    section,
)
from allocator.report.view import Measurement, RunView
from allocator.report.wording import METHOD_NAMES, method_name, methods, number, with_error

_MOST_SHOWN = 500
"""Measurements in a figure and its table; the journal holds all of them."""

_MOST_FRONTIER_POINTS = 200


def heldout_section(view: RunView) -> Markup:
    """Uniform, DP and search on text that decided nothing."""
    compared = methods(view.plan)
    title = "On held-out text"
    if not compared:
        return section(title, paragraph("Nothing was measured on held-out text."))
    losses = "; ".join(
        f"{method.name} {with_error(method.measured.nats, method.measured.standard_error_nats)}"
        for method in compared
    )
    unit = "KL to the dense model" if view.plan.objective == "kl" else view.plan.objective
    shown = figure(
        heldout_figure(compared, view.plan.loss_unit_text),
        label=f"Dot plot of held-out losses in {view.plan.loss_unit_text}: {losses}",
        caption=(
            f"Loss ({unit}) in {view.plan.loss_unit_text} on text that neither the search nor the "
            "choice between the plans has seen. Bars, and ± everywhere, are one standard error "
            "over sequences. The plans are measured on the same sequences, so their paired "
            "difference is surer than the bars suggest."
        ),
    )
    differences = _differences_table(view.plan)
    beside = render_table(differences) if differences.rows else Markup("")
    losses_table = render_table(_losses_table(view.plan))
    return section(title, columns(shown, beside), losses_table)


def frontier_section(view: RunView) -> Markup:
    """Predicted loss for every budget, and what was measured at this one."""
    plan = view.plan
    compared = methods(plan)
    priced = {**view.method_bytes, plan.returned: plan.searched_bytes}
    drawn = [method for method in compared if method.key in priced]
    caption = (
        f"The line is predicted, not measured: the least sum of the {plan.scorer} scores "
        f"({view.predicted_unit}) that any assignment of so many bytes can have. The points are "
        "measured on held-out text, with one standard error; the dotted line is the budget"
    )
    if view.predicted_unit != plan.loss_unit:
        caption += (
            f". The scores are not known to compare with {plan.loss_unit_text}, so line and points "
            "share the axis of bytes only"
        )
    if view.front:
        caption += (
            f". The broken line joins the {len(view.front)} points of the measured front, on text "
            "that the search has seen: 'allocator pick' makes a plan of any"
        )
    for method in compared:
        if method not in drawn:
            caption += f". {method.name} is not drawn: its bytes are not recorded"
    shown = figure(
        frontier_figure(view, drawn, priced),
        label=(
            f"Predicted loss falls as the payload grows over {len(view.frontier)} frontier points; "
            f"{len(drawn)} measured plans beside the budget of {plan.searched_budget_bytes:,} bytes"
        ),
        caption=f"{caption}.",
    )
    rows = [
        (
            method.name,
            f"{priced[method.key]:,}",
            number(8 * priced[method.key] / view.num_weights),
            with_error(method.measured.nats, method.measured.standard_error_nats),
        )
        for method in drawn
    ]
    heads = ("Plan", "Payload bytes", "Bits per weight", f"Measured {plan.loss_unit}")
    beside = render_table(Table("Measured on held-out text", heads, rows)) if rows else ""
    points = [view.frontier[i] for i in _spread(len(view.frontier), _MOST_FRONTIER_POINTS)]
    frontier = Table(
        "The predicted frontier",
        ("Payload bytes", "Bits per weight", f"Predicted, {view.predicted_unit}"),
        [
            (
                f"{point.searched_bytes:,}",
                number(8 * point.searched_bytes / view.num_weights),
                number(point.predicted_nats),
            )
            for point in points
        ],
    )
    behind = [frontier, *([_front_table(view)] if view.front else [])]
    return section("Loss against bytes", columns(shown, join(beside, details(*behind))))


def _front_table(view: RunView) -> Table:
    rows = [
        (
            f"{point.bytes:,}",
            number(8 * point.bytes / view.num_weights),
            with_error(point.loss_nats, point.standard_error_nats),
            f"{point.num_sequences}",
        )
        for point in view.front
    ]
    unit = view.plan.loss_unit
    heads = ("Payload bytes", "Bits per weight", f"Measured {unit}, search text", "Sequences")
    return Table("The measured front", heads, rows)


def search_section(view: RunView) -> Markup:
    """What the search measured, and how well the additive model had foreseen it."""
    title = "The search"
    total = len(view.measurements)
    if not any(m.loss_nats is not None for m in view.measurements):
        failed = f" All {total} evaluations failed." if total else ""
        return section(title, paragraph(f"The search measured no loss.{failed}"))
    shown = _thinned(view.measurements)
    num_failed = sum(m.loss_nats is None for m in view.measurements)
    progress = figure(
        progress_figure(shown, view.plan.loss_unit),
        label=(
            f"Loss of {total} measurements against search tokens spent; the best falls to "
            f"{number(_lowest(shown))} {view.plan.loss_unit_text}"
        ),
        caption=(
            f"{total:,} measurements on the search text, {num_failed:,} of them failed. The "
            "horizontal lines are the first measurements of uniform and of the DP plan. The lowest "
            "of many noisy measurements flatters itself; the held-out comparison does not."
        ),
    )
    agreement = figure(
        agreement_figure(view, shown),
        label=f"Measured against predicted loss of {total - num_failed} measurements",
        caption=_agreement(view),
    )
    table = details(_measurements_table(view, shown))
    return section(title, columns(progress, agreement), table)


def _estimate(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{number(value)} {unit}"


def bound_section(view: RunView) -> Markup:
    """The solver's proof and its reach."""
    plan, unit = view.plan, view.predicted_unit
    rows = [
        ("Solver's answer", plan.solver_status),
        ("Lower bound for any plan", _estimate(plan.lower_bound_nats, unit)),
        ("Gap of the DP plan", _estimate(plan.gap_nats, unit)),
        ("Predicted loss of the returned plan", _estimate(plan.predicted_nats, unit)),
    ]
    reach = (
        f"The bound proves that no assignment within the budget has a smaller sum of {plan.scorer} "
        "scores; it does not bound the measured loss, since a sum of scores of single units "
        "ignores how their errors act on each other."
    )
    return section("What is proved", paragraph(reach), facts("Of the additive model", rows))


def _losses_table(plan: Plan) -> Table:
    """Every measured assignment on every text it was measured on."""
    splits = (plan.heldout_nats, plan.guard_nats, plan.search_nats)
    known = {key for losses in splits for key in losses if key != "returned"} | {plan.returned}
    ordered = [key for key in METHOD_NAMES if key in known]
    ordered += sorted(known.difference(METHOD_NAMES))
    rows = []
    for key in ordered:
        alias = "returned" if key == plan.returned else key
        found = [losses.get(key, losses.get(alias)) for losses in splits]
        if any(found):
            name = method_name(key) + (" (returned)" if key == plan.returned else "")
            perplexity = found[0].perplexity if found[0] else None
            shown = "" if perplexity is None else number(perplexity)
            rows.append((name, _loss_text(found[0]), shown, *map(_loss_text, found[1:])))
    heads = ("Plan", "Held-out", "Perplexity", "Guard", "Search text")
    return Table(f"Measured losses, {plan.loss_unit_text}", heads, rows)


def _loss_text(measured: Measured | None) -> str:
    return with_error(measured.nats, measured.standard_error_nats) if measured else ""


def _differences_table(plan: Plan) -> Table:
    """Returned minus each baseline, with the ratio and the number of standard errors."""
    rows = []
    returned = plan.heldout_nats.get("returned")
    for key, paired in plan.heldout_differences_nats.items():
        name = key.removeprefix("returned - ")
        baseline = plan.heldout_nats.get(name)
        if name == plan.returned or baseline is None or returned is None:
            continue
        error = paired.standard_error_nats
        rows.append(
            (
                f"Returned minus {method_name(name)}",
                with_error(paired.nats, error),
                number(paired.nats / error, 2) if error else "",
                number(returned.nats / baseline.nats, 3) if baseline.nats > 0 else "",
            )
        )
    heads = ("Difference", plan.loss_unit_text.capitalize(), "In standard errors", "Ratio")
    return Table("Paired differences on held-out text", heads, rows)


def _measurements_table(view: RunView, shown: Sequence[Measurement]) -> Table:
    numbers = {id(m): index for index, m in enumerate(view.measurements, 1)}
    rows = [
        (
            str(numbers[id(measurement)]),
            measurement.origin,
            f"{measurement.tokens:,}",
            "failed"
            if measurement.loss_nats is None
            else with_error(measurement.loss_nats, measurement.standard_error_nats),
            number(measurement.predicted_nats),
            "" if best is None else number(best),
        )
        for measurement, best in zip(shown, best_so_far(shown), strict=True)
    ]
    heads = (
        "Number",
        "Origin",
        "Tokens spent",
        f"Measured {view.plan.loss_unit}",
        f"Predicted, {view.predicted_unit}",
        "Best so far",
    )
    caption = f"{len(shown):,} of {len(view.measurements):,} measurements"
    if len(shown) < len(view.measurements):
        caption += ": every new best and an even sample of the others; the journal holds all"
    return Table(caption, heads, rows, num_texts=2)


def _agreement(view: RunView) -> str:
    if view.rank_correlation is None:
        rank = "There are too few distinct measurements for a rank correlation."
    else:
        rank = (
            f"Spearman's rank correlation {number(view.rank_correlation, 2)} over the distinct "
            "assignments measured: 1 would mean that the additive model ranks them as measured."
        )
    where = (
        ""
        if view.predicted_unit != view.plan.loss_unit
        else " On the dotted line predicted equals measured."
    )
    return f"{rank}{where}"


def _thinned(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Few enough to draw: every new best, everything but proposals, and an even sample."""
    if len(measurements) <= _MOST_SHOWN:
        return list(measurements)
    best = best_so_far(measurements)
    kept = set(_spread(len(measurements), _MOST_SHOWN))
    kept |= {i for i in range(1, len(best)) if best[i] != best[i - 1]}
    return [measurements[i] for i in sorted(kept)]


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices, evenly from first to last."""
    indices: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return indices


def _lowest(measurements: Sequence[Measurement]) -> float:
    return min(m.loss_nats for m in measurements if m.loss_nats is not None)

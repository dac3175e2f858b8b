"""Where the bytes went: the plan unit by unit, and the budget part by part."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from allocator.plan import Plan, PlanUnit
from allocator.report.heatmap import HeatMap
from allocator.report.markup import (
    Markup,
    Table,
    details,
    escape,
    figure,
    join,
    render_table,
    section,
    tag,
)
from allocator.report.view import RunView
from allocator.report.wording import number, size
from search_spaces.storage import StoredTensor

_NUM_COLOURS = 10
"""Colours of the style sheet for projection kinds; more kinds start over."""


@dataclass(frozen=True)
class _Part:
    """One slice of the budget."""

    name: str
    css_class: str
    num_bytes: int
    num_units: int | None = None
    num_weights: int | None = None


def plan_section(view: RunView) -> Markup:
    """The allocation as a heat map."""
    heat_map = HeatMap(view.plan, view.dp_plan_labels)
    num_units = len(view.plan.units)
    caption = (
        "Rows and columns are blocks and projection kinds; the colour is the stored bits per "
        "weight, all metadata included, on a logarithmic scale"
    )
    if heat_map.num_differing:
        caption += (
            f". A dot marks the {heat_map.num_differing} of {num_units} units that got "
            "something else than in the DP plan"
        )
    if heat_map.has_mixed_cells:
        caption += ". Where units of a cell differ it shows their mean bits, after ~"
    label = (
        f"Heat map of the chosen option of {num_units} units by depth and kind, "
        f"{number(view.plan.bits_per_weight)} bits per weight on average; the table below it "
        "holds every cell"
    )
    shown = figure(heat_map.render(), label=label, caption=f"{caption}.")
    return section("The plan", shown, details(heat_map.table()))


def bytes_section(view: RunView) -> Markup:
    """The budget as one stacked bar and a table."""
    plan = view.plan
    parts = _parts(plan)
    segments = [
        Markup(f'<i class="{part.css_class}" style="flex:{part.num_bytes} 1 0"></i>')
        for part in parts
        if part.num_bytes
    ]
    bar = tag("div", *segments, attributes='class="bar"')
    shares = ", ".join(f"{part.name} {_share(part.num_bytes, plan)} %" for part in parts)
    caption = (
        f"The whole bar is the budget of {size(plan.budget_bytes)}. The searched units take "
        f"{size(plan.searched_bytes)}, {size(view.dense_searched_bytes)} at 16 bits."
    )
    if plan.fixed:
        largest = max(_fixed(plan), key=lambda tensor: tensor.bytes)
        caption += (
            f" Of the {len(plan.fixed)} tensors that were not up for choice {largest.name} is the "
            f"largest with {size(largest.bytes)}."
        )
    shown = figure(bar, label=f"Shares of the budget: {shares}", caption=caption)
    return section("The byte budget", shown, render_table(_parts_table(plan, parts)))


def _parts(plan: Plan) -> list[_Part]:
    """Kinds in the model's order, then what is not up for choice, then what is left."""
    by_kind: dict[str, list[PlanUnit]] = defaultdict(list)
    for entry in plan.units:
        by_kind[entry.kind].append(entry)
    parts = [
        _Part(
            kind,
            f"c{index % _NUM_COLOURS}",
            sum(entry.bytes for entry in entries),
            len(entries),
            sum(entry.unit.num_elements for entry in entries),
        )
        for index, (kind, entries) in enumerate(by_kind.items())
    ]
    fixed_bytes = sum(tensor.bytes for tensor in _fixed(plan))
    header_bytes = plan.achieved_bytes - plan.searched_bytes - fixed_bytes
    return [
        *parts,
        _Part("not searched", "fixed", fixed_bytes),
        _Part("file header", "header", header_bytes),
        _Part("slack", "slack", plan.slack_bytes),
    ]


def _parts_table(plan: Plan, parts: list[_Part]) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            join(Markup(f'<span class="swatch {part.css_class}"></span>'), escape(part.name)),
            f"{part.num_bytes:,}",
            f"{_share(part.num_bytes, plan)} %",
            "" if part.num_weights is None else number(8 * part.num_bytes / part.num_weights),
            "" if part.num_units is None else f"{part.num_units:,}",
            "" if part.num_weights is None else f"{part.num_weights:,}",
        )
        for part in parts
    ]
    rows.append(("budget", f"{plan.budget_bytes:,}", "100 %", "", "", ""))
    heads = ("Part", "Bytes", "Share", "Bits per weight", "Units", "Weights")
    return Table("The budget by part", heads, rows)


def _fixed(plan: Plan) -> list[StoredTensor]:
    return [StoredTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.fixed]


def _share(num_bytes: int, plan: Plan) -> str:
    return f"{100 * num_bytes / plan.budget_bytes:.2f}"

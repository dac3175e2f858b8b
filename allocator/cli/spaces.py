"""``allocator show MODEL --space SPACE``: what a space costs, without any weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from allocator.budget import parse_budgets, resolve_budget
from allocator.cli.terminal import console, format_bytes, print_json
from allocator.config import SpaceConfig
from allocator.session import price_space
from search_spaces.space import Menu, SearchSpace, Unit


@dataclass(frozen=True)
class _Kind:
    """Units of one kind that have the same shapes and options."""

    kind: str
    unit: Unit
    menu: Menu
    count: int


def show_space(model: str, wish: SpaceConfig, budget: str | None, *, as_json: bool) -> None:
    """Print units, menus and what is achievable.

    Raises:
        ValueError: No such model, a faulty space, or a budget that cannot be met.
    """
    space = price_space(model, wish)
    budgets = [resolve_budget(word, space) for word in parse_budgets(budget)] if budget else []
    kinds = list(_kinds(space))
    totals = {
        "units": len(space.units),
        "weights": space.num_weights,
        "fixed_bytes": space.fixed_bytes,
        "container_bytes": space.container_bytes,
        "least_bytes": space.least_bytes + space.overhead_bytes,
        "most_bytes": space.most_bytes + space.overhead_bytes,
    }
    if as_json:
        print_json(
            {
                "space": space.name,
                "ties": space.ties,
                **totals,
                "kinds": [
                    {
                        "kind": kind.kind,
                        "units": kind.count,
                        "shapes": [list(member.shape) for member in kind.unit.members],
                        "options": {o.operator.label: o.bytes for o in kind.menu},
                    }
                    for kind in kinds
                ],
                "budgets": {b.text: b.stored_bytes for b in budgets},
            }
        )
        return
    title = f"{model}: {space.name}"
    table = Table("kind", "units", "shape", "options", "bits/weight", title=title)
    for kind in kinds:
        bits = [8 * option.bytes / kind.unit.num_elements for option in kind.menu]
        labels = ", ".join(option.operator.label for option in kind.menu)
        shapes = " + ".join("x".join(map(str, m.shape)) for m in kind.unit.members)
        span = f"{min(bits):.3g} to {max(bits):.3g}"
        table.add_row(kind.kind, str(kind.count), shapes, labels, span)
    console.print(table)
    least, most = totals["least_bytes"], totals["most_bytes"]
    rows = [[option.bytes for option in menu] for menu in space.menus]
    cheapest, dearest = (tuple(row.index(end(row)) for row in rows) for end in (min, max))
    console.print(
        f"{space.num_weights:,} searched weights in {len(space.units)} units; "
        f"{space.overhead_bytes:,} bytes are not searched\n"
        f"achievable: {least:,} to {most:,} bytes ({format_bytes(least)} to {format_bytes(most)}), "
        f"{space.weight_bits(cheapest):.4g} to {space.weight_bits(dearest):.4g} bits per searched "
        f"weight{', caches left out' if space.has_caches else ''}",
        markup=False,
    )
    for found in budgets:
        console.print(
            f"{found.text}: {found.stored_bytes:,} bytes ({format_bytes(found.stored_bytes)})",
            markup=False,
        )


def _kinds(space: SearchSpace) -> Iterator[_Kind]:
    """Units alike in kind, shapes and menu, counted; in the model's order."""
    groups: dict[tuple[object, ...], list[tuple[Unit, Menu]]] = {}
    for unit, menu in zip(space.units, space.menus, strict=True):
        key = (unit.kind, tuple(member.shape for member in unit.members), menu)
        groups.setdefault(key, []).append((unit, menu))
    for members in groups.values():
        unit, menu = members[0]
        yield _Kind(unit.kind, unit, menu, len(members))

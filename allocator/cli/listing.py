"""``allocator list KIND``: what there is, one line each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from allocator.cli.terminal import console, print_json
from allocator.executors import EXECUTORS
from allocator.exporters import EXPORTERS
from allocator.searches import SEARCHES
from allocator.searches.options import options_of
from allocator.solvers import SOLVERS
from search_spaces.operators import OPERATORS
from search_spaces.presets import PRESETS
from search_spaces.registry import Registry, unknown_name
from search_spaces.spans import SPANS, bits_span
from search_spaces.ties import TIES

_ROLE = re.compile(r":[a-z]+:`~?([^`]*)`")


def _documented(registry: Registry[Any]) -> list[dict[str, Any]]:
    """Names with the first sentence of their documentation."""
    return [{"name": name, "summary": _first_line(registry[name])} for name in registry]


def _first_line(entry: object) -> str:
    text = inspect.getdoc(entry) or ""
    plain = _ROLE.sub(r"\1", text.split("\n\n")[0]).replace("``", "")
    return " ".join(plain.split())


def _operators() -> list[dict[str, Any]]:
    rows = []
    for row in _documented(OPERATORS):
        span = bits_span(row["name"]) if row["name"] in SPANS else None
        text = "-" if span is None else f"{span[0]:.3g} to {span[1]:.3g}"
        rows.append({**row, "bits_per_weight": text})
    return rows


def _spaces() -> list[dict[str, Any]]:
    rows = []
    for name in PRESETS:
        least, most = PRESETS[name].bits_per_weight
        rows.append(
            {
                "name": name,
                "summary": PRESETS[name].summary,
                "bits_per_weight": f"{least:.3g} to {most:.3g}",
            }
        )
    return rows


def _scorers() -> list[dict[str, Any]]:
    from objectives.sensitivity import SCORERS  # loads torch

    return _documented(SCORERS)


def _searches() -> list[dict[str, Any]]:
    rows = _documented(SEARCHES)
    options = [options_of(SEARCHES[row["name"]]) for row in rows]
    return [
        row | {"options": {key: str(option) for key, option in found.items()}}
        for row, found in zip(rows, options, strict=True)
    ]


def _ties() -> list[dict[str, Any]]:
    return [{"name": name, "summary": TIES[name].summary} for name in TIES]


_KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "executors": lambda: _documented(EXECUTORS),
    "exporters": lambda: _documented(EXPORTERS),
    "operators": _operators,
    "scorers": _scorers,
    "searches": _searches,
    "solvers": lambda: _documented(SOLVERS),
    "spaces": _spaces,
    "ties": _ties,
}


def list_kinds(
    kind: Annotated[str, typer.Argument(help=", ".join(_KINDS))],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List spaces, operators, scorers, solvers, searches, executors, exporters or ties."""
    if kind not in _KINDS:
        raise ValueError(unknown_name("kind", kind, list(_KINDS)))
    rows = _KINDS[kind]()
    if as_json:
        print_json(rows)
        return
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)


def _cell(value: str | dict[str, str]) -> str:
    """Options as they are written on the command line, with their defaults."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{key}={text}" for key, text in value.items()) or "-"

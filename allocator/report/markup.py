"""HTML from plain data, with everything escaped unless it is markup by type."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A data table; the first cell of each row is its header.

    Attributes:
        caption: What it shows.
        columns: Headings.
        rows: Cells, one per column.
        num_texts: So many first columns hold text; the others hold numbers, set to the right.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_texts: int = 1


def escape(text: str) -> Markup:
    """The text as HTML; markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def join(*parts: str) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(escape(part) for part in parts))


def tag(name: str, *content: str, attributes: str = "") -> Markup:
    """An element around its content; ``attributes`` must be safe as they are."""
    opening = f"{name} {attributes}" if attributes else name
    return Markup(f"<{opening}>{join(*content)}</{name}>")


def render_table(table: Table) -> Markup:
    """The table in a container that scrolls sideways by itself, also from the keyboard."""
    heads = [
        tag("th", text, attributes=f'scope="col"{_kind(column, table)}')
        for column, text in enumerate(table.columns)
    ]
    body = [
        tag(
            "tr",
            tag("th", row[0], attributes='scope="row"'),
            *(tag("td", cell, attributes=_kind(i, table).strip()) for i, cell in _rest(row)),
        )
        for row in table.rows
    ]
    inner = tag(
        "table",
        tag("caption", table.caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
    )
    return _scrolling(inner, table.caption)


def facts(caption: str, rows: Sequence[tuple[str, str]]) -> Markup:
    """Terms and their values as a table whose headings only screen readers need."""
    table = Table(caption, ("What", "Value"), rows, num_texts=2)
    return tag("div", render_table(table), attributes='class="facts"')


def figure(picture: str, *, label: str, caption: str) -> Markup:
    """A picture (markup) with a text alternative and a caption."""
    image = tag("div", Markup(picture), attributes=f'role="img" aria-label="{escape(label)}"')
    return tag("figure", image, tag("figcaption", caption))


def details(*tables: Table) -> Markup:
    """The numbers behind a figure, folded away."""
    summary = tag("summary", "The same numbers as a table")
    return tag("details", summary, *(render_table(table) for table in tables))


def section(title: str, *content: str) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *content)


def columns(*content: str) -> Markup:
    """Blocks beside each other where there is room."""
    blocks = (tag("div", block) for block in content)
    return tag("div", *blocks, attributes='class="columns"')


def paragraph(*content: str) -> Markup:
    """A paragraph."""
    return tag("p", *content)


def _scrolling(content: Markup, label: str) -> Markup:
    name = f'class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"'
    return tag("div", content, attributes=name)


def _rest(row: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(row))[1:]


def _kind(column: int, table: Table) -> str:
    return "" if column < table.num_texts else ' class="number"'

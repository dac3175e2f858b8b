"""The plan as a heat map: depth by projection kind, coloured by bits per weight.

The problem: thirty to a hundred layers of a dozen kinds must fit a screen and a phone. The cells
are one CSS grid whose axes the style sheet swaps: depth runs to the right where there is room, in
bands of a few dozen layers, and downwards on a phone.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from allocator.plan import Plan
from allocator.report.markup import Markup, Table, escape, join, tag
from allocator.report.wording import number

_BAND_WIDTH_REM = 58.0
"""What a band of cells may take on a wide screen, beside kinds' names and gaps."""

_LEAST_CELL_REM, _CHARACTER_REM = 1.6, 0.58
_USUAL_BITS = (2.0, 8.0)
"""The colour scale covers these and whatever else the plan holds, so that reports compare."""


@dataclass(frozen=True)
class _Choice:
    """What one unit got."""

    label: str
    dp_label: str
    num_weights: int
    num_bytes: int


@dataclass(frozen=True)
class _Cell:
    """The units of one kind in one block: mostly one, several where experts are not tied."""

    choices: tuple[_Choice, ...]

    @cached_property
    def bits(self) -> float:
        """Stored bits per weight."""
        num_weights = sum(choice.num_weights for choice in self.choices)
        return 8 * sum(choice.num_bytes for choice in self.choices) / num_weights

    @property
    def differs(self) -> bool:
        """Whether a unit got something else than in the DP plan."""
        return any(choice.label != choice.dp_label for choice in self.choices)

    def labels(self, *, of_dp: bool = False) -> str:
        """Its options, with how many units got each where they differ."""
        counts = Counter(choice.dp_label if of_dp else choice.label for choice in self.choices)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} x {label}" for label, count in counts.items())


class HeatMap:
    """The cells of a plan and their colours.

    Args:
        plan: The returned plan.
        dp_labels: What each unit got in the DP plan, in the plan's order.
    """

    def __init__(self, plan: Plan, dp_labels: Sequence[str]) -> None:
        cells: dict[tuple[int | None, str], list[_Choice]] = defaultdict(list)
        for entry, dp_label in zip(plan.units, dp_labels, strict=True):
            choice = _Choice(entry.choice.label, dp_label, entry.unit.num_elements, entry.bytes)
            # Units outside the blocks keep their names: there is one of each.
            row = entry.name if entry.depth is None else entry.kind
            cells[entry.depth, row].append(choice)
        self._cells = {key: _Cell(tuple(choices)) for key, choices in cells.items()}
        bits = [cell.bits for cell in self._cells.values()]
        stored = [b for b in bits if b > 0]  # an option may leave nothing of a unit
        self._low, self._high = min([*stored, _USUAL_BITS[0]]), max([*stored, _USUAL_BITS[1]])
        self._short = _short_labels(
            {c.label for cell in self._cells.values() for c in cell.choices}
        )
        self._depths = sorted({depth for depth, _ in cells if depth is not None})
        self._kinds = list(dict.fromkeys(kind for depth, kind in cells if depth is not None))

    @property
    def num_differing(self) -> int:
        """Units that got something else than in the DP plan."""
        choices = (choice for cell in self._cells.values() for choice in cell.choices)
        return sum(choice.label != choice.dp_label for choice in choices)

    @property
    def has_mixed_cells(self) -> bool:
        """Whether a cell shows the mean of units that got different options."""
        return any(len({c.label for c in cell.choices}) > 1 for cell in self._cells.values())

    def render(self) -> Markup:
        """The grid, the units outside the blocks, and the legend."""
        parts = []
        if self._depths:
            most = int(_BAND_WIDTH_REM / self._cell_rem)
            num_bands = math.ceil(len(self._depths) / most)
            step = math.ceil(len(self._depths) / num_bands)
            firsts = range(0, len(self._depths), step)
            parts += [self._band(self._depths[first : first + step]) for first in firsts]
        outside = [
            tag("span", self._render_cell(cell), name)
            for (depth, name), cell in self._cells.items()
            if depth is None
        ]
        if outside:
            label = tag("b", "Outside the blocks")
            parts.append(tag("div", label, *outside, attributes='class="chips"'))
        return join(*parts, self._legend())

    def table(self) -> Table:
        """Every cell as a row."""
        rows = [
            (
                "-" if depth is None else str(depth),
                kind,
                cell.labels(),
                cell.labels(of_dp=True),
                str(len(cell.choices)),
                number(cell.bits),
                f"{sum(choice.num_bytes for choice in cell.choices):,}",
            )
            for (depth, kind), cell in self._cells.items()
        ]
        heads = ("Depth", "Kind", "Option", "In the DP plan", "Units", "Bits per weight", "Bytes")
        return Table("What each unit got", heads, rows, num_texts=4)

    def _band(self, depths: Sequence[int]) -> Markup:
        heads = [_at(d, 0, str(depth), "depth") for d, depth in enumerate(depths, 1)]
        heads += [_at(0, k, kind, "kind") for k, kind in enumerate(self._kinds, 1)]
        cells = [
            self._render_cell(cell, f";--d:{d};--k:{k}")
            for d, depth in enumerate(depths, 1)
            for k, kind in enumerate(self._kinds, 1)
            if (cell := self._cells.get((depth, kind))) is not None
        ]
        sizes = f"--depths:{len(depths)};--kinds:{len(self._kinds)};--cell:{self._cell_rem:g}rem"
        grid = tag("div", *heads, *cells, attributes=f'class="map" style="{sizes}"')
        return tag("div", grid, attributes='class="scroll"')

    @cached_property
    def _cell_rem(self) -> float:
        """Least width of a cell in a block, so that its text fits."""
        inside = [cell for (depth, _), cell in self._cells.items() if depth is not None]
        longest = max(len(self._text(cell)) for cell in inside)
        return max(_LEAST_CELL_REM, _CHARACTER_REM * longest)

    def _text(self, cell: _Cell) -> str:
        """The short label, or the mean bits of a mixed cell."""
        labels = {choice.label for choice in cell.choices}
        return self._short[labels.pop()] if len(labels) == 1 else f"~{number(cell.bits, 2)}"

    def _render_cell(self, cell: _Cell, position: str = "") -> Markup:
        colour, text_colour = cell_colours(cell.bits, self._low, self._high)
        marks = "cell differs" if cell.differs else "cell"
        style = f"background:{colour};color:{text_colour}{position}"
        return tag("i", self._text(cell), attributes=f'class="{marks}" style="{style}"')

    def _legend(self) -> Markup:
        """One chip per option: its cell, full label, bits and number of units."""
        by_label: dict[str, list[_Choice]] = defaultdict(list)
        for cell in self._cells.values():
            for choice in cell.choices:
                by_label[choice.label].append(choice)
        options = sorted(
            (_Cell(tuple(choices)) for choices in by_label.values()),
            key=lambda option: (option.bits, option.labels()),
        )
        chips = []
        for option in options:
            same = tuple(
                _Choice(c.label, c.label, c.num_weights, c.num_bytes) for c in option.choices
            )
            count = len(same)
            text = (
                f"{option.labels()}: {number(option.bits, 3)} bits per weight, "
                f"{count} unit{'s' if count > 1 else ''}"
            )
            chips.append(tag("span", self._render_cell(_Cell(same)), text))
        if self.num_differing:
            sample = Markup('<i class="cell differs sample"></i>')
            chips.append(tag("span", sample, "differs from the DP plan"))
        return tag("div", *chips, attributes='class="chips legend"')


def cell_colours(bits: float, low: float, high: float) -> tuple[str, str]:
    """Background on the viridis scale of log bits, and black or white, whichever reads better."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    position = math.log(max(bits, low) / low) / math.log(high / low)
    colour = to_hex(colormaps["viridis"](min(1.0, max(0.0, position))))
    # Relative luminance as WCAG 2 defines it; above 0.179 black has the higher contrast.
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return colour, "#000" if luminance > 0.179 else "#fff"


def _short_labels(labels: set[str]) -> Mapping[str, str]:
    """For cells: ``int3-g64`` is ``3`` where that tells the plan's options apart."""
    heads = {label: re.split(r"[-(]", label)[0] for label in labels}
    short = {label: head.removeprefix("int") or head for label, head in heads.items()}
    return short if len(set(short.values())) == len(short) else {label: label for label in labels}


def _at(depth: int, kind: int, text: str, name: str) -> Markup:
    return Markup(f'<b class="{name}" style="--d:{depth};--k:{kind}">{escape(text)}</b>')

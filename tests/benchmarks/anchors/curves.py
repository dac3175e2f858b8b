"""The curves: held-out loss against tokens, one panel per space and budget."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from seeds import OURS, interval, place_order

COLUMNS = 3
"""Panels beside each other."""

LEAST_STEP = 1.6
"""Ratio of two labelled numbers of tokens."""

MARKERS = "s^vDPX*<>phd"
"""Of one-shots; searches have lines."""


@dataclass
class Panel:
    """What one panel shows: for each method losses of all seeds at each number of tokens."""

    methods: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, result) -> None:
        """A method's points of one seed."""
        points = self.methods.setdefault(result["method"], defaultdict(list))
        for point in result["points"]:
            points[point["tokens"]].append(float(np.mean(point["heldout"])))

    @property
    def seeds(self) -> int:
        """Of those that are shown: the most that any method has."""
        return max(len(v) for points in self.methods.values() for v in points.values())

    def shown(self) -> dict[str, dict[int, list[float]]]:
        """Methods with all the seeds: means over different ones would mislead."""
        most = self.seeds
        return {n: p for n, p in self.methods.items() if min(map(len, p.values())) == most}


def draw(records, path: Path) -> None:
    """Write the figure; nothing where no search has been measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = gather(records)
    if not panels:
        return
    looks = looks_of({name for panel in panels.values() for name in panel.shown()}, records)
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    size = (4.4 * columns, 3.8 * rows)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anchors", "font.size": 10}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        for axes in grid.ravel()[len(panels) :]:
            axes.set_visible(False)
        for axes, (place, panel) in zip(grid.ravel(), panels.items(), strict=False):
            draw_panel(axes, panel, looks)
            seeds = f"{panel.seeds} seed" + "s" * (panel.seeds > 1)
            axes.set_title(f"{place[0]}, {place[1]} ({seeds})")
        figure.tight_layout()
        add_legend(grid)  # a tall one would pull the rows apart
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def gather(records) -> dict[tuple[str, str], Panel]:
    """Panels of the places where a search was measured, in the order of the table."""
    panels: dict[tuple[str, str], Panel] = defaultdict(Panel)
    searched = {(r["space"], r["budget"]) for r in records if len(r["points"]) > 1}
    for result in records:
        panels[result["space"], result["budget"]].add(result)
    return {place: panels[place] for place in sorted(searched, key=place_order)}


def looks_of(names, records) -> dict[str, dict]:
    """Colours of lines and of markers, the same in all panels."""
    from matplotlib import colormaps

    lines = sorted(names & {r["method"] for r in records if len(r["points"]) > 1} - {OURS})
    points = sorted(names - {*lines, OURS, "uniform"})
    colours = [c for c in colormaps["tab10"].colors if c != colormaps["tab10"].colors[3]]
    looks = {OURS: {"color": colormaps["tab10"].colors[3], "lw": 2.6}}
    for index, name in enumerate(lines):
        style = "-" if index < len(colours) else "--"
        looks[name] = {"color": colours[index % len(colours)], "lw": 1.4, "ls": style}
    for index, name in enumerate(points):
        looks[name] = {"color": "#444", "marker": MARKERS[index % len(MARKERS)], "ls": ""}
    return looks


def draw_panel(axes, panel: Panel, looks) -> None:
    """Searches as lines with their intervals, one-shots as points, uniform as a level."""
    shown = panel.shown()
    reads = {tokens for points in shown.values() for tokens in points if tokens}
    first = min(reads, default=2) / 2  # where what reads nothing stands
    for name, points in sorted(shown.items()):
        tokens = sorted(points)
        means, halves = np.transpose([interval(points[t]) for t in tokens])
        if name == "uniform":
            axes.axhline(means[0], color="#888", lw=1, ls="--", label=name)
            continue
        places = [t or first for t in tokens]
        if len(tokens) > 1:
            axes.plot(places, means, marker="o", ms=4, label=name, **looks[name])
        else:
            axes.plot(places, means, ms=6, mfc="none", label=name, **looks[name])
        if panel.seeds > 1 and len(tokens) > 1:
            low, high = means - halves, means + halves
            axes.fill_between(places, low, high, color=looks[name]["color"], alpha=0.1, lw=0)
        elif panel.seeds > 1:
            axes.errorbar(places, means, halves, color="#444", lw=0.8, capsize=2, ls="")
    label_tokens(axes, shown, first)
    centre_on_means(axes, shown)
    axes.spines[["top", "right"]].set_visible(False)


def centre_on_means(axes, shown) -> None:
    """A vertical axis that the means fill: intervals of two seeds may reach far beyond them."""
    means = [np.mean(losses) for points in shown.values() for losses in points.values()]
    margin = 0.2 * (max(means) - min(means)) or 0.1 * max(means)
    axes.set_ylim(max(0.0, min(means) - margin), max(means) + margin)
    axes.set_ylabel("held-out nats")


def label_tokens(axes, shown, first: float) -> None:
    """A logarithmic axis with the searches' own numbers of tokens; 0 stands at its left end."""
    axes.set(xscale="log", xlabel="tokens, statistics included")
    ticks = sorted({t for points in shown.values() if len(points) > 1 for t in points})
    for tokens in sorted({t for points in shown.values() for t in points}):
        if not ticks or tokens > 4 * ticks[-1]:  # one-shots that read more than any search
            ticks.append(tokens)
    ticks = apart(ticks)
    labels = [f"{t / 1000:.3g}k" if t < 999_500 else f"{t / 1e6:.3g}M" for t in ticks]
    if any(name != "uniform" and 0 in points for name, points in shown.items()):
        ticks, labels = [first, *ticks], ["0", *labels]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.minorticks_off()


def apart(ticks: list[int]) -> list[int]:
    """Without those whose labels would touch the one before."""
    kept: list[int] = []
    for tokens in ticks:
        if not kept or tokens >= LEAST_STEP * kept[-1]:
            kept.append(tokens)
    return kept


def add_legend(grid) -> None:
    """One legend for all panels, beside the first row."""
    named = [axes.get_legend_handles_labels() for axes in grid.ravel()]
    lines = {label: line for found in named for line, label in zip(*found, strict=True)}
    grid[0][-1].legend(
        [lines[name] for name in sorted(lines)],
        sorted(lines),
        frameon=False,
        fontsize=9,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )

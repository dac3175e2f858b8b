"""The table, the CSV and the curves of what the benchmark has measured so far."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t as student

OURS = "model_guided"
COLUMNS = 3
"""Panels of the curves beside each other."""


def interval(values) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds; the half is NaN for one seed."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    half = student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(half)


def write_summary(folder: Path) -> None:
    """Write results.csv, results.md and curves.svg; print the table."""
    records = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    if not records:
        return
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = ["space", "budget", "method", "feasible", "seed", "tokens", "bytes", "heldout_nats"]
        writer.writerow(heads)
        for r in records:
            for point in r["points"]:
                mean = float(np.mean(point["heldout"]))
                cells = [r[key] for key in heads[:5]]
                writer.writerow([*cells, point["tokens"], point["bytes"], f"{mean:.6g}"])
    text = "\n".join(lines(records)) + "\n"
    (folder / "results.md").write_text(text)
    print(text)
    draw(records, folder / "curves.svg")


def place_order(place: tuple[str, str]) -> tuple[str, float]:
    """Spaces by name, their budgets by size."""
    return place[0], float(place[1].split()[0])


def lines(records):
    """Markdown: one table of all means, then one table per space and budget."""
    cells = defaultdict(lambda: defaultdict(dict))
    about = {}
    for r in records:
        last = r["points"][-1]
        cells[r["space"], r["budget"]][r["method"]][r["seed"]] = float(np.mean(last["heldout"]))
        about[r["method"]] = (r["feasible"], last["tokens"])
    yield from overview(cells)
    for (space, budget), methods in sorted(cells.items(), key=lambda item: place_order(item[0])):
        yield f"## {space}, {budget}"
        yield ""
        yield "| method | set | tokens | held-out nats | minus model_guided, paired | seeds |"
        yield "| --- | --- | ---: | ---: | ---: | ---: |"
        order = sorted(methods, key=lambda name: np.mean(list(methods[name].values())))
        for name in order:
            found, ours = methods[name], methods.get(OURS, {})
            mean, half = interval(list(found.values()))
            both = sorted(set(found) & set(ours))
            gap, width = interval([found[s] - ours[s] for s in both]) if both else (np.nan, np.nan)
            difference = "" if name == OURS or not both else with_interval(gap, width, "+")
            feasible, tokens = about[name]
            row = [name, feasible, f"{tokens:,}", with_interval(mean, half), difference]
            yield "| " + " | ".join([*row, str(len(found))]) + " |"
        yield ""


def overview(cells):
    """Markdown: ours in nats; of the others, ours divided by theirs on the seeds of both.

    The mean of the ratios, and on how many of these seeds ours was better.
    """
    places = sorted(cells, key=place_order)
    ratios = defaultdict(dict)
    for place in places:
        ours = cells[place].get(OURS, {})
        for name, found in cells[place].items():
            if name != OURS and (both := sorted(set(found) & set(ours))):
                ratios[name][place] = [ours[s] / found[s] for s in both]
    yield "## model_guided divided by each method, held-out nats"
    yield ""
    yield "| method | " + " | ".join(f"{space}, {budget}" for space, budget in places) + " |"
    yield "| --- |" + " ---: |" * len(places)
    row = [OURS + ", nats"]
    for place in places:
        ours = list(cells[place].get(OURS, {}).values())
        row.append(f"{np.mean(ours):.3f}" if ours else "")
    yield "| " + " | ".join(row) + " |"
    closest = {name: max(np.mean(v) for v in found.values()) for name, found in ratios.items()}
    for name in sorted(ratios, key=closest.__getitem__, reverse=True):
        row = [name]
        for place in places:
            found = ratios[name].get(place, [])
            won = f"{sum(r < 1 for r in found)}/{len(found)}"
            row.append(f"{np.mean(found):.3f} ({won})" if found else "")
        yield "| " + " | ".join(row) + " |"
    yield ""


def with_interval(mean: float, half: float, sign: str = "") -> str:
    """A mean, with its interval where there is one."""
    return f"{mean:{sign}.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")


def draw(records, path: Path) -> None:
    """Held-out loss against tokens, one panel per space and budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    level = defaultdict(list)
    for r in records:
        place = (r["space"], r["budget"])
        if len(r["points"]) > 1:
            for point in r["points"]:
                curves[place][r["method"]][point["tokens"]].append(np.mean(point["heldout"]))
        elif r["method"] == "uniform":
            level[place].append(np.mean(r["points"][0]["heldout"]))
    for methods in curves.values():  # means over different seeds would mislead
        most = max(len(v) for points in methods.values() for v in points.values())
        for name in [n for n, p in methods.items() if min(map(len, p.values())) < most]:
            del methods[name]
    places = sorted(curves, key=place_order)
    if not places:
        return
    colours = dict(
        zip(sorted({m for c in curves.values() for m in c}), pyplot.cm.tab10.colors, strict=False)
    )
    columns = min(len(places), COLUMNS)
    rows = -(-len(places) // columns)
    size = (4.4 * columns + 2.2, 3.8 * rows)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anchors", "font.size": 10}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        panels = grid.ravel()
        for axes in panels[len(places) :]:
            axes.set_visible(False)
        for axes, place in zip(panels, places, strict=False):
            for method, points in sorted(curves[place].items()):
                tokens = sorted(points)
                means = [np.mean(points[t]) for t in tokens]
                width = 2.6 if method == OURS else 1.4
                axes.plot(tokens, means, "o-", ms=4, lw=width, color=colours[method], label=method)
            if level[place]:
                axes.axhline(np.mean(level[place]), color="#888", lw=1, ls="--", label="uniform")
            axes.set(xscale="log", xlabel="tokens, statistics included", ylabel="held-out nats")
            ticks = sorted({t for points in curves[place].values() for t in points})
            axes.set_xticks(ticks, [f"{t / 1000:g}k" for t in ticks])
            axes.minorticks_off()
            axes.set_title(f"{place[0]}, {place[1]}")
            axes.spines[["top", "right"]].set_visible(False)
        named = [axes.get_legend_handles_labels() for axes in panels]
        shown = {label: line for found in named for line, label in zip(*found, strict=True)}
        grid[0][-1].legend(
            [shown[name] for name in sorted(shown)],
            sorted(shown),
            frameon=False,
            fontsize=9,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)

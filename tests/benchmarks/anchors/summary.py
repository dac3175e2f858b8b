"""The table, the CSV and the curves of what the benchmark has measured so far."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from curves import draw
from records import perplexity, write_csv
from seeds import OURS, interval, place_order


def write_summary(folder: Path, records) -> None:
    """Write results.csv, results.md and curves.svg of a folder's results; print the table."""
    if not records:
        return
    write_csv(folder / "results.csv", records)
    text = "\n".join(lines(records)) + "\n"
    (folder / "results.md").write_text(text)
    print(text)
    draw(records, folder / "curves.svg")


def lines(records):
    """Markdown: one table of all means, then one table per space and budget."""
    cells = defaultdict(lambda: defaultdict(dict))
    perplexities = defaultdict(list)
    about = {}
    for r in records:
        last = r["points"][-1]
        perplexities[r["space"], r["budget"], r["method"]].append(perplexity(last))
        cells[r["space"], r["budget"]][r["method"]][r["seed"]] = float(np.mean(last["heldout"]))
        about[r["space"], r["budget"], r["method"]] = (r["feasible"], last["tokens"])
    yield from overview(cells)
    for (space, budget), methods in sorted(cells.items(), key=lambda item: place_order(item[0])):
        yield f"## {space}, {budget}"
        yield ""
        ppls = {name: interval(perplexities[space, budget, name]) for name in methods}
        noted = not all(np.isnan(mean) for mean, _ in ppls.values())
        heads = ["method", "set", "tokens", "held-out nats", "minus model_guided, paired"]
        heads += ["perplexity"] * noted + ["seeds"]
        yield "| " + " | ".join(heads) + " |"
        yield "| --- | --- |" + " ---: |" * (len(heads) - 2)
        order = sorted(methods, key=lambda name: np.mean(list(methods[name].values())))
        for name in order:
            found, ours = methods[name], methods.get(OURS, {})
            mean, half = interval(list(found.values()))
            both = sorted(set(found) & set(ours))
            gap, width = interval([found[s] - ours[s] for s in both]) if both else (np.nan, np.nan)
            difference = "" if name == OURS or not both else with_interval(gap, width, "+")
            feasible, tokens = about[space, budget, name]
            row = [name, feasible, f"{tokens:,}", with_interval(mean, half), difference]
            if noted:
                ppl, spread = ppls[name]
                row.append("" if np.isnan(ppl) else with_interval(ppl, spread, places=2))
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


def with_interval(mean: float, half: float, sign: str = "", places: int = 4) -> str:
    """A mean, with its interval where there is one."""
    return f"{mean:{sign}.{places}f}" + ("" if np.isnan(half) else f" ± {half:.{places}f}")

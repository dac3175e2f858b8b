"""A comparison of scorers as CSV, Markdown and a drawing."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from allocator.profile import Agreement, Comparison

_HEADS = (
    "scorer",
    "unit",
    "units_spearman",
    "units_kendall",
    "random_spearman",
    "random_kendall",
    "tokens",
    "seconds",
)


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One row per scorer, best first, under the heads of :func:`comparison_csv`."""
    return [
        (
            found.scorer,
            found.unit,
            f"{found.units_spearman:.3f}",
            f"{found.units_kendall:.3f}",
            f"{found.random_spearman:.3f}",
            f"{found.random_kendall:.3f}",
            f"{found.cost.tokens}",
            f"{found.cost.seconds:.1f}",
        )
        for found in comparison.agreements
    ]


def comparison_csv(comparison: Comparison) -> str:
    """The comparison for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADS)
    writer.writerows(comparison_rows(comparison))
    return text.getvalue()


def comparison_markdown(comparison: Comparison, title: str) -> str:
    """The comparison as a table, with what was measured and who was left out."""
    lines = [
        f"# {title}",
        "",
        f"Rank correlations with measured losses on {comparison.num_tokens:,} tokens that no "
        f"scorer saw: of {comparison.num_units} units alone at the uniform option, and of "
        f"{comparison.num_random} random assignments that fill the budget.",
        "",
        "| " + " | ".join(_HEADS).replace("_", " ") + " |",
        "| --- | --- |" + " ---: |" * (len(_HEADS) - 2),
        *("| " + " | ".join(row) + " |" for row in comparison_rows(comparison)),
    ]
    if comparison.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {reason}" for name, reason in sorted(comparison.left_out.items())]
    return "\n".join(lines) + "\n"


def draw_comparison(comparison: Comparison, title: str, path: Path) -> None:
    """Two dots per scorer: how well it ranks single units, and how well whole assignments."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: tuple[Agreement, ...] = comparison.agreements[::-1]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "model-allocator", "font.size": 10}
    with pyplot.rc_context(settings):
        size = (7.2, 1.6 + 0.28 * len(found))
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        for row, agreement in enumerate(found):
            ends = sorted((agreement.units_spearman, agreement.random_spearman))
            axes.plot(ends, [row, row], color="#c8ccd2", linewidth=2, zorder=1)
        for label, colour, marker, values in (
            ("single units", "#7a8694", "o", [a.units_spearman for a in found]),
            ("random assignments", "#0a6ebd", "D", [a.random_spearman for a in found]),
        ):
            axes.scatter(values, range(len(found)), c=colour, marker=marker, s=34, label=label)
        axes.set_yticks(range(len(found)), [a.scorer for a in found])
        axes.axvline(0.0, color="#c8ccd2", linewidth=0.8, zorder=0)
        lowest = min(min(a.units_spearman, a.random_spearman) for a in found)
        axes.set_xlim(min(lowest, 0.0) - 0.05, 1.03)
        axes.set_xlabel("Spearman rank correlation with measured loss")
        axes.set_title(title, fontsize=11)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)

"""The report's charts as inline SVG, drawn with matplotlib.

The problem: one drawing must read on a wide screen and on a phone, in a light and in a dark theme,
and be the same bytes for the same run. So charts are small and large-lettered, their text stays
text, and their colours are CSS variables of the page: matplotlib draws with stand-in colours that
are replaced afterwards.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.report.view import Measurement, RunView
from allocator.report.wording import METHOD_NAMES, Method, method_name, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Stand-in colours, which nothing else in a drawing uses -> names of the page's CSS variables.
_INK, _MUTED, _GRID, _SURFACE = "#000001", "#000002", "#000003", "#000004"
_METHOD_COLOUR = {"uniform": "#000005", "dp": "#000006", "search": "#000007"}
_CSS_NAMES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _SURFACE: "surface",
    **{colour: key for key, colour in _METHOD_COLOUR.items()},
}
_METHOD_MARKER = {"uniform": "s", "dp": "^", "search": "o"}

_WIDTH_INCHES = 5.8
_LOG_RATIO = 8.0
"""Losses that differ more than this many times are drawn on a logarithmic axis."""

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 12.5,
    "ytick.labelsize": 12.5,
    "legend.fontsize": 12.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.2,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 1.0,
    "lines.solid_capstyle": "round",
}


def heldout_figure(compared: Sequence[Method], unit: str) -> str:
    """Held-out loss of each method with one standard error either side."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, method in enumerate(compared):
            measured = method.measured
            _point(axes, method.family, (measured.nats, row), x_error=measured.standard_error_nats)
            axes.annotate(
                with_error(measured.nats, measured.standard_error_nats),
                (measured.nats, row),
                xytext=(0, 12),
                textcoords="offset points",
                ha="center",
            )
        axes.set_yticks(range(len(compared)), [method.name for method in compared])
        axes.set_ylim(len(compared) - 0.5, -0.7)
        axes.margins(x=0.25)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"held-out loss, {unit}")
        axes.xaxis.set_major_locator(_few_ticks())

    return _svg("heldout", draw, 0.9 + 0.62 * len(compared))


def frontier_figure(
    view: RunView, compared: Sequence[Method], method_bytes: Mapping[str, int]
) -> str:
    """The additive frontier over bytes, with the measured methods.

    Where the scorer's unit is not nats the two share the axis of bytes only.
    """
    in_nats = view.predicted_unit == view.plan.loss_unit

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1 if in_nats else 2, 1, sharex=True, squeeze=False)[:, 0]
        predicted, measured = panels[0], panels[-1]
        most = _most_drawn(view)
        points = [p for p in view.frontier if p.predicted_nats > 0 and p.searched_bytes <= most]
        values = [point.predicted_nats for point in points]
        predicted.plot(
            [point.searched_bytes / 1e6 for point in points],
            values,
            color=_MUTED,
            linewidth=2,
            label=f"predicted, in {view.predicted_unit}",
        )
        if view.front:
            measured.errorbar(
                [point.bytes / 1e6 for point in view.front],
                [point.loss_nats for point in view.front],
                yerr=[point.standard_error_nats for point in view.front],
                color=_METHOD_COLOUR["search"],
                linewidth=1.2,
                linestyle="--",
                marker=".",
                label="front, on the search's text",
            )
        for method in compared:
            at = (method_bytes[method.key] / 1e6, method.measured.nats)
            error = method.measured.standard_error_nats
            name = method_name(method.key)
            _point(measured, method.family, at, y_error=error, label=f"{name}, measured")
        for axes in panels:
            axes.axvline(view.plan.searched_budget_bytes / 1e6, color=_MUTED, linestyle=":")
        _scale(predicted, "y", values)
        if in_nats:
            predicted.set_ylabel(view.plan.loss_unit_text)
        else:
            predicted.set_ylabel("predicted")
            measured.set_ylabel(view.plan.loss_unit_text)
            measured.margins(y=0.3)
            _scale(measured, "y", [point.loss_nats for point in view.front])
        measured.set_xlabel("payload of the searched units, MB")
        measured.xaxis.set_major_locator(_few_ticks())
        _bits_axis(panels[0], view.num_weights)
        figure.legend(loc="outside upper left", ncols=2)

    return _svg("frontier", draw, 4.4 if in_nats else 5.6)


def _most_drawn(view: RunView) -> float:
    """Where the axis of bytes ends: a little beyond the budget where a front is to be seen."""
    if not view.front:
        return math.inf
    return 1.1 * max(view.front[-1].bytes, view.plan.searched_budget_bytes)


def progress_figure(shown: Sequence[Measurement], unit: str) -> str:
    """Every measurement, the best so far, and the failed ones along the top."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        measured = [(m.tokens / 1e3, m.loss_nats) for m in shown if m.loss_nats is not None]
        axes.plot(
            *_columns(measured),
            "o",
            color=_METHOD_COLOUR["search"],
            markersize=4.5,
            alpha=0.45,
            markeredgewidth=0,
            label="measured",
        )
        best = zip(shown, best_so_far(shown), strict=True)
        steps = [(m.tokens / 1e3, low) for m, low in best if low is not None]
        axes.step(
            *_columns(steps),
            where="post",
            color=_METHOD_COLOUR["search"],
            linewidth=2.2,
            label="best so far",
        )
        for key in ("uniform", "dp"):
            losses = [m.loss_nats for m in shown if m.origin == key and m.loss_nats is not None]
            if losses:
                axes.axhline(
                    losses[0],
                    color=_METHOD_COLOUR[key],
                    linewidth=1.6,
                    linestyle="--" if key == "uniform" else "-.",
                    label=METHOD_NAMES[key],
                )
        _scale(axes, "y", [loss for _, loss in measured])
        failed = [m.tokens / 1e3 for m in shown if m.loss_nats is None]
        if failed:
            axes.plot(
                failed,
                [1.0] * len(failed),
                "x",
                color=_INK,
                markersize=6,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                label="failed",
            )
        axes.set_xlabel("search tokens spent, thousands")
        axes.set_ylabel(f"loss on search text, {unit}")
        axes.xaxis.set_major_locator(_few_ticks())
        figure.legend(loc="outside upper left", ncols=3)

    return _svg("progress", draw, 4.4)


def agreement_figure(view: RunView, shown: Sequence[Measurement]) -> str:
    """Predicted against measured loss; where both are nats, with the line of equality."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        good = [m for m in shown if m.loss_nats is not None]
        for key in METHOD_NAMES:
            is_search = key == "search"
            own = [m for m in good if m.origin == key or (is_search and m.origin == "start")]
            if own:
                axes.errorbar(
                    [m.predicted_nats for m in own],
                    [_loss(m) for m in own],
                    yerr=[m.standard_error_nats for m in own],
                    fmt=_METHOD_MARKER[key],
                    color=_METHOD_COLOUR[key],
                    markersize=5 if is_search else 9,
                    alpha=0.45 if is_search else 1.0,
                    elinewidth=0.8,
                    markeredgewidth=0,
                    zorder=2 if is_search else 3,
                    label=METHOD_NAMES[key],
                )
        predicted = [m.predicted_nats for m in good]
        measured = [_loss(m) for m in good]
        _scale(axes, "x", predicted)
        _scale(axes, "y", measured)
        if view.predicted_unit == view.plan.loss_unit and good:
            low, high = max(min(predicted), min(measured)), min(max(predicted), max(measured))
            if low < high:
                axes.plot([low, high], [low, high], color=_MUTED, linestyle=":", label="equal")
        axes.set_xlabel(f"predicted by the additive model, {view.predicted_unit}")
        axes.set_ylabel(f"measured, {view.plan.loss_unit_text}")
        figure.legend(loc="outside upper left", ncols=4)

    return _svg("agreement", draw, 4.4)


def best_so_far(measurements: Sequence[Measurement]) -> list[float | None]:
    """After each measurement the lowest loss until then; ``None`` before the first that worked."""
    lowest: float | None = None
    found = []
    for measurement in measurements:
        loss = measurement.loss_nats
        if loss is not None and (lowest is None or loss < lowest):
            lowest = loss
        found.append(lowest)
    return found


def _loss(measurement: Measurement) -> float:
    assert measurement.loss_nats is not None
    return measurement.loss_nats


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _point(
    axes: Axes,
    key: str,
    at: tuple[float, float],
    *,
    x_error: float | None = None,
    y_error: float | None = None,
    label: str | None = None,
) -> None:
    """A method's marker with its error bar."""
    axes.errorbar(
        [at[0]],
        [at[1]],
        xerr=x_error,
        yerr=y_error,
        fmt=_METHOD_MARKER[key],
        color=_METHOD_COLOUR[key],
        markersize=9,
        markeredgecolor=_SURFACE,
        elinewidth=2,
        capsize=5,
        capthick=2,
        zorder=3,
        label=label,
    )


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with plain labels where positive values spread widely."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    if not values or min(values) <= 0 or max(values) < _LOG_RATIO * min(values):
        axis.set_major_locator(_few_ticks())
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    decades = max(values) / min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _few_ticks() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10])


def _bits_axis(axes: Axes, num_weights: int) -> None:
    """Bits per weight along the top, beside megabytes along the bottom."""
    per_megabyte = 8e6 / num_weights

    def to_bits(megabytes: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(megabytes, np.float64) * per_megabyte

    def to_megabytes(bits: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(bits, np.float64) / per_megabyte

    top = axes.secondary_xaxis("top", functions=(to_bits, to_megabytes))
    top.set_xlabel("bits per weight")
    top.spines["top"].set_visible(True)


def _svg(name: str, draw: Callable[[Figure], None], height_inches: float) -> str:
    """Draw, and make the SVG fit to stand inside an HTML page beside others.

    Args:
        name: Prefix of the drawing's ids, unique in the page.
        draw: Fills the empty figure.
        height_inches: Of the figure; its width is the same for all.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Not the caller's style but matplotlib's own; a context would not give the backend back.
    style = {key: matplotlib.rcParamsDefault[key] for key in matplotlib.rcParamsDefault}
    del style["backend"]
    with matplotlib.rc_context({**style, **_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, css_name in _CSS_NAMES.items():
        body = body.replace(colour, f"var(--{css_name})")
    width, height = 72 * _WIDTH_INCHES, 72 * height_inches
    return f'<svg viewBox="0 0 {width:g} {height:g}">{body}'

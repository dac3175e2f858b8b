"""The report: complete, honest, self-contained, readable, and the same bytes for the same run."""

import dataclasses
import re
import resource
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_views import SHAPES, make_measurements, make_view, measured, with_plan

from allocator.plan import Paired
from allocator.report import FrontierPoint, write_report
from allocator.report.evidence import _MOST_SHOWN
from allocator.report.heatmap import HeatMap, cell_colours
from allocator.report.html import render_report
from allocator.report.wording import number, size, verdict, with_error
from allocator.searches.base import FrontPoint

MOST_BYTES = 2 * 10**6
VOID = {"meta", "br", "use", "path", "rect"}
NASTY = "</td><script>alert(1)</script>&\"'<img src=x>$x_1$"


class Page(HTMLParser):
    """Checks the nesting and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links, self.ids = [], [], [], []
        self.images, self.tables, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[k] for k in ("href", "src", "xlink:href", "action") if k in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if attrs.get("role") == "img":
            self.images.append(attrs["aria-label"])
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
            assert tag == "td" or attrs["scope"] in ("row", "col")
        if tag not in VOID or "svg" in self.open:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID or "svg" in self.open:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "caption" in self.open:
            self.tables[-1]["caption"] += data
        elif "td" in self.open or "th" in self.open:
            self.tables[-1]["rows"][-1][-1] += data

    def table(self, start):
        (found,) = [t["rows"] for t in self.tables if t["caption"].startswith(start)]
        return found

    def words(self):
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def view():
    return make_view()


@pytest.fixture(scope="module")
def page(view):
    return Page(render_report(view))


def plain(text):
    """With the signs of a keyboard."""
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def count(text):
    return int(text.replace(",", ""))


def test_needs_nothing_from_outside(view, page):
    text = render_report(view)
    assert len(text.encode()) < MOST_BYTES
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]*)\)", text))
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_every_figure_has_a_description_and_tables(page):
    assert len(page.images) == 6
    assert all(len(label) > 20 for label in page.images)
    assert len(page.ids) == len(set(page.ids))
    for table in page.tables:
        assert table["caption"]
        assert len({len(row) for row in table["rows"]}) == 1


def test_same_run_same_bytes(view, tmp_path):
    write_report(view, tmp_path / "a.html")
    write_report(make_view(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(view, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_report(view, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_bytes_add_up_to_the_budget(view, page):
    _, *parts, total = page.table("The budget by part")
    assert sum(count(row[1]) for row in parts) == count(total[1]) == view.plan.budget_bytes
    searched = [row for row in parts if row[4]]
    assert sum(count(row[1]) for row in searched) == view.plan.searched_bytes
    assert sum(count(row[5]) for row in searched) == view.num_weights


def test_the_heat_map_table_holds_every_unit(view, page):
    _, *rows = page.table("What each unit got")
    expected = [
        (
            "-" if entry.depth is None else str(entry.depth),
            entry.name if entry.depth is None else entry.kind,
            entry.choice.label,
            dp_label,
            f"{entry.bytes:,}",
        )
        for entry, dp_label in zip(view.plan.units, view.dp_plan_labels, strict=True)
    ]
    assert [(*row[:4], row[6]) for row in rows] == expected
    differing = sum(choice != dp for _, _, choice, dp, _ in expected)
    assert f"A dot marks the {differing} of 211 units" in page.words()


def test_every_measurement_is_in_the_table(view, page):
    _, *rows = page.table("150 of 150 measurements")
    for measurement, row in zip(view.measurements, rows, strict=True):
        assert row[1:3] == [measurement.origin, f"{measurement.tokens:,}"]
        expected = (
            "failed"
            if measurement.loss_nats is None
            else with_error(measurement.loss_nats, measurement.standard_error_nats)
        )
        assert row[3] == expected


def test_losses_differences_and_provenance_are_stated(view, page):
    losses = {row[0]: row[1:] for row in page.table("Measured losses")}
    shown = "0.906 ± 0.021", "0.926 ± 0.030", "0.836 ± 0.024"
    found = losses["Search (returned)"]
    assert [plain(text) for text in (found[0], *found[2:])] == [*shown]
    assert "DP by reconstruction" in losses
    differences = [row[0] for row in page.table("Paired differences")]
    assert differences[1:] == [
        "Returned minus Uniform",
        "Returned minus DP",
        "Returned minus DP by reconstruction",
    ]
    words = page.words()
    plan = view.plan
    for split in plan.calibration.splits.values():
        assert split.sha256 in words
    for text in (plan.search.history_sha256, plan.model.weights_sha256, plan.solver_status):
        assert text in words
    assert page.table("Tokens spent")[-1][:2] == ["all", f"{sum(plan.tokens.values()):,}"]
    assert view.notes[0] in words


@pytest.mark.parametrize(
    ("difference", "claim"),
    [
        (-0.3, "0.300 ± 0.011 less than uniform"),
        (0.3, "0.300 ± 0.011 more than uniform"),
        (-0.02, "cannot be told from uniform: the difference is -0.020 ± 0.011"),
        (0.0, "exactly as much as uniform"),
    ],
)
def test_the_verdict_claims_what_the_heldout_text_shows(view, difference, claim):
    paired = Paired(nats=difference, standard_error_nats=0.011)
    changed = with_plan(view, heldout_differences_nats={"returned - uniform": paired})
    assert claim in plain(verdict(changed))


def test_the_verdict_without_a_comparison(view):
    assert "less than uniform (0.742 of its loss)" in verdict(view)
    assert "nothing else did better" in verdict(make_view(2, returned="uniform"))
    other = verdict(make_view(2, returned="dp:reconstruction"))
    assert "exact plan of the reconstruction table was returned" in other
    single = Paired(nats=-0.3, standard_error_nats=0.0)
    unsure = with_plan(view, heldout_differences_nats={"returned - uniform": single})
    assert "cannot be told from uniform" in verdict(unsure)
    assert "no paired difference" in verdict(with_plan(view, heldout_differences_nats={}))
    assert "nothing was measured" in verdict(with_plan(view, heldout_nats={}))


def test_the_verdict_without_uniform(view):
    others = {k: v for k, v in view.plan.heldout_nats.items() if k != "uniform"}
    failed = with_plan(view, heldout_nats=others)
    assert "uniform assignment could not be measured" in verdict(failed)
    absent = dataclasses.replace(
        with_plan(failed, search_nats={}, guard_nats={}), measurements=view.measurements[2:]
    )
    sentence = verdict(absent)
    assert "no uniform assignment fits the budget" in sentence
    assert "less than the DP plan" in sentence
    words = Page(render_report(absent)).words()
    assert "Uniform: held-out loss" not in words


def test_predictions_in_another_unit_are_not_called_nats(view):
    other = dataclasses.replace(view, predicted_unit="relative_mse")
    page = Page(render_report(other))
    assert "line and points share the axis of bytes only" in page.words()
    assert page.table("The predicted frontier")[0][-1] == "Predicted, relative_mse"
    assert dict(page.table("Of the additive model")[1:])["Gap of the DP plan"] == "0 relative_mse"


def test_a_measured_front_is_drawn_and_listed(view):
    points = [(20_000_000, 2.0, 0.1, 4), (30_000_000, 1.25, 0.05, 64)]
    front = tuple(FrontPoint((0,), *point) for point in points)
    page = Page(render_report(dataclasses.replace(view, front=front)))
    assert "joins the 2 points of the measured front" in page.words()
    assert "front, on the search" in page.words()
    listed = page.table("The measured front")
    assert listed[1][0] == "20,000,000"
    assert listed[2][2:] == [with_error(1.25, 0.05), "64"]
    assert "measured front" not in Page(render_report(view)).words()


def test_a_plan_without_recorded_bytes_is_said_to_be_missing(view):
    page = Page(render_report(dataclasses.replace(view, method_bytes={})))
    words = page.words()
    assert "Uniform is not drawn: its bytes are not recorded" in words
    assert "Search (returned) is not drawn" not in words


def test_the_style_of_the_calling_program_stays(view):
    with matplotlib.rc_context({"backend": "pdf", "font.size": 30.0, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        styled = render_report(view)
        assert dict(matplotlib.rcParams) == before
    assert styled == render_report(view)


TIED = {"qkv_proj": (960, 576), "o_proj": (576, 576), "gate_up_proj": (3072, 576)}


@pytest.mark.parametrize(
    "edge",
    [
        make_view(1, {"q_proj": (64, 64)}, head=False, measurements=(), rank_correlation=None),
        make_view(2, measurements=(), frontier=(), notes=(), settings={}),
        make_view(2, measurements=make_measurements(1)),
        make_view(2, measurements=tuple(
            dataclasses.replace(m, loss_nats=None) for m in make_measurements(3)
        )),
        make_view(2, frontier=(FrontierPoint(1000, 0.0),), returned="dp", method_bytes={}),
        make_view(3, TIED, returned="uniform"),
        make_view(2, returned="dp:reconstruction"),
        make_view(0),
        with_plan(
            make_view(2), heldout_nats={}, heldout_differences_nats={}, guard_nats={},
            search_nats={}, calibration=None, search=None, tokens={}, versions={},
            solver_status="",
        ),
        with_plan(make_view(2), heldout_nats={"returned": measured(0.0, 0.0)}),
    ],
)  # fmt: skip
def test_edge_cases_make_whole_pages(edge):
    page = Page(render_report(edge))
    assert verdict(edge) in "".join(page.text)


def test_several_units_of_a_kind_in_a_block_share_a_cell():
    view = make_view(2)
    units = tuple(u.model_copy(update={"kind": "experts"}) for u in view.plan.units)
    page = Page(render_report(with_plan(view, units=units)))
    first, second, head = page.table("What each unit got")[1:]
    assert [row[4] for row in (first, second, head)] == ["7", "7", "1"]
    labels = [u.choice.label for u in units if u.depth == 0]
    counted = ", ".join(f"{labels.count(x)} x {x}" for x in dict.fromkeys(labels))
    assert first[2] == counted
    assert "mean bits, after ~" in page.words()


def test_large_runs_stay_small():
    view = make_view(80, SHAPES | TIED, measurements=make_measurements(20_000))
    text = render_report(view)
    assert len(text.encode()) < MOST_BYTES
    tables = Page(text).tables
    rows = next(t["rows"][1:] for t in tables if "20,000 measurements" in t["caption"])
    assert _MOST_SHOWN <= len(rows) < 2 * _MOST_SHOWN
    assert all(count(a[0]) < count(b[0]) for a, b in pairwise(rows))
    lowest = min(m.loss_nats for m in view.measurements if m.loss_nats is not None)
    assert rows[-1][5] == number(lowest)


def test_every_text_is_escaped(view):
    plan = view.plan
    split = next(iter(plan.calibration.splits.values()))
    nasty = dataclasses.replace(
        with_plan(
            view,
            model=plan.model.model_copy(update={"name": NASTY, "architecture": NASTY}),
            budget_text=NASTY,
            scorer=NASTY,
            objective=NASTY,
            solver_status=NASTY,
            units=tuple(u.model_copy(update={"kind": NASTY, "name": NASTY}) for u in plan.units),
            fixed=tuple(t.model_copy(update={"name": NASTY}) for t in plan.fixed),
            calibration=plan.calibration.model_copy(
                update={"source": NASTY, "splits": {NASTY: split}}
            ),
            search=plan.search.model_copy(update={"name": NASTY, "stopped": NASTY}),
            heldout_nats=plan.heldout_nats | {NASTY: measured(1.0, 0.1)},
            tokens={NASTY: 1},
            versions={NASTY: NASTY},
        ),
        name=NASTY,
        dp_plan_labels=(NASTY,) * len(plan.units),
        predicted_unit=NASTY,
        settings={NASTY: NASTY},
        notes=(NASTY,),
    )
    page = Page(render_report(nasty))
    assert not {"script", "img"} & set(page.tags)
    assert "".join(page.text).count(NASTY) > 20


@given(st.floats(0.5, 32))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_heat_map_text_reads_on_its_colour(bits):
    colour, text_colour = cell_colours(bits, min(bits, 2.0), max(bits, 8.0))
    assert contrast(colour, text_colour) >= 4.5


def test_a_plan_that_drops_every_unit_has_a_heat_map(view):
    dropped = [
        SimpleNamespace(
            choice=e.choice, unit=e.unit, bytes=0, depth=e.depth, name=e.name, kind=e.kind
        )
        for e in view.plan.units
    ]
    drawn = HeatMap(SimpleNamespace(units=dropped), [e.choice.label for e in dropped])
    assert "0 bits per weight" in str(drawn.render())


def test_the_themes_are_readable(view):
    style = re.search(r"<style>(.*?)</style>", render_report(view), re.DOTALL)[1]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    for theme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        for ground in ("page", "surface"):
            for text in ("ink", "muted", "accent"):
                assert contrast(colours[text], colours[ground]) >= 4.5
            for mark in ("uniform", "dp", "search"):
                assert contrast(colours[mark], colours[ground]) >= 3


def contrast(one, other):
    """WCAG 2 contrast ratio of two colours."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    digits = colour[1:7] if len(colour) == 7 else colour[1] * 6
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.00012345), "0.0001234"),
        (number(-1234567.0), "-1,234,567"),
        (number(0), "0"),
        (with_error(-0.3217, 0.0123), "-0.322 ± 0.012"),
        (with_error(123.4, 12.3), "123 ± 12"),
        (with_error(1.2, 0.0), "1.200 (no standard error)"),
        (size(999), "999 bytes"),
        (size(98_304_512), "98.3 MB"),
        (size(3 * 10**12), "3.00 TB"),
    ],
)
def test_numbers_keep_the_digits_that_mean_something(text, expected):
    assert plain(text) == expected

"""The report of a run: one HTML file that works offline and prints.

The problem: a plan is believed when its evidence can be checked without the program that made it.
So the page holds everything inline (no scripts, no requests, enforced by its own content policy),
every figure has its numbers as a table, and the same run gives the same bytes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from allocator.plan import Plan, TextRecord
from allocator.report.evidence import (
    bound_section,
    frontier_section,
    heldout_section,
    search_section,
)
from allocator.report.markup import (
    Markup,
    Table,
    columns,
    facts,
    join,
    paragraph,
    render_table,
    section,
    tag,
)
from allocator.report.memory import bytes_section, plan_section
from allocator.report.view import RunView
from allocator.report.wording import (
    Method,
    method_name,
    methods,
    number,
    size,
    verdict,
    with_error,
)
from search_spaces.whole_file import write_whole

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(view: RunView, path: Path) -> None:
    """Write the report so that a reader sees the old file or the whole new one, never half.

    Args:
        view: What to show.
        path: The HTML file.

    Raises:
        OSError: The file cannot be written; an older report then stays as it was.
    """
    write_whole(path, render_report(view))


def render_report(view: RunView) -> str:
    """The whole page."""
    style = resources.files("allocator.report").joinpath("report.css").read_text("utf-8")
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", f"{view.name}: allocation report"),
        tag("style", Markup(style)),
    )
    body = join(
        tag("header", tag("h1", f"Allocation report: {view.name}"), _verdict(view)),
        tag(
            "main",
            _key_figures(view),
            heldout_section(view),
            plan_section(view),
            bytes_section(view),
            frontier_section(view),
            search_section(view),
            bound_section(view),
            _provenance(view),
            _notes(view),
        ),
        tag("footer", "Made by model-allocator. All losses: lower is better. MB are 10⁶ bytes."),
    )
    language = 'lang="en"'
    document = tag("html", tag("head", head), tag("body", body), attributes=language)
    return f"<!doctype html>\n{document}\n"


def _verdict(view: RunView) -> Markup:
    return tag("p", verdict(view), attributes='class="verdict"')


def _key_figures(view: RunView) -> Markup:
    """The numbers to take away: bytes, then held-out losses."""
    plan = view.plan
    slack_share = plan.slack_bytes / plan.budget_bytes if plan.budget_bytes else 0.0
    dense_share = plan.achieved_bytes / plan.dense_bytes
    budget = (f"{plan.budget_bytes:,} bytes", f"asked as {plan.budget_text}")
    achieved = (
        f"{plan.achieved_bytes:,} bytes",
        f"{number(100 * dense_share, 3)} % of the 16-bit model",
    )
    slack = (f"{plan.slack_bytes:,} bytes", f"{number(100 * slack_share, 2)} % of the budget")
    bits = ("all metadata included", f"{view.num_weights:,} searched weights")
    cards = (
        _card("Budget", size(plan.budget_bytes), *budget),
        _card("Achieved", size(plan.achieved_bytes), *achieved),
        _card("Slack", size(plan.slack_bytes), *slack),
        _card("Bits per weight", number(plan.bits_per_weight), *bits),
    )
    return join(
        _cards(*cards),
        _cards(*(_heldout_card(method, plan.loss_unit_text) for method in methods(plan))),
    )


def _heldout_card(method: Method, unit: str) -> Markup:
    measured = method.measured
    remarks = [unit]
    if measured.perplexity is not None:
        remarks.append(f"perplexity {number(measured.perplexity)}")
    name = method_name(method.key) + (", returned" if method.is_returned else "")
    loss = with_error(measured.nats, measured.standard_error_nats)
    return _card(f"{name}: held-out loss", loss, *remarks, css_class=method.family)


def _cards(*cards: str) -> Markup:
    return tag("dl", *cards, attributes='class="cards"') if cards else Markup("")


def _card(term: str, value: str, *remarks: str, css_class: str = "plain") -> Markup:
    values = (tag("dd", text) for text in (value, *remarks))
    return tag("div", tag("dt", term), *values, attributes=f'class="{css_class}"')


def _provenance(view: RunView) -> Markup:
    """Everything needed to judge where the numbers come from, or to make them again."""
    plan = view.plan
    left = [facts("What was asked", list(view.settings.items()))]
    if plan.search is not None:
        record = plan.search
        rows = [
            ("Method", record.name),
            ("Seed", str(record.seed)),
            ("Window", str(record.window)),
            ("Evaluations", f"{record.num_evaluations:,} ({record.num_failed:,} failed)"),
            ("Stopped because", record.stopped),
            ("History SHA-256", _code(record.history_sha256)),
        ]
        left.append(facts("How it was searched", rows))
    rows = [
        ("Name", plan.model.name),
        ("Architecture", plan.model.architecture),
        ("Config SHA-256", _code(plan.model.config_sha256)),
        ("Weights SHA-256", _code(plan.model.weights_sha256)),
    ]
    right = [facts("The model", rows)]
    if plan.calibration is not None:
        right += [
            render_table(_text(text, alone=not plan.calibration.also))
            for text in plan.calibration.texts
        ]
    if plan.tokens:
        left.append(render_table(_spent(plan)))
    if plan.versions:
        right.append(facts("Versions", list(plan.versions.items())))
    return section("How it was made", columns(join(*left), join(*right)))


def _text(text: TextRecord, *, alone: bool) -> Table:
    """The splits of one calibration text, and how much it counts beside others."""
    splits = [
        (name, f"{split.num_sequences:,} x {split.sequence_length:,}", _code(split.sha256))
        for name, split in text.splits.items()
    ]
    caption = f"Calibration text: {text.source}" + ("" if alone else f", weight {text.weight:g}")
    heads = ("Split", "Sequences x tokens", "SHA-256 of the tokens")
    return Table(caption, heads, splits, num_texts=3)


def _spent(plan: Plan) -> Table:
    """Tokens by kind, and through how many blocks each went: fewer where a pass was shared."""
    blocks = plan.block_tokens
    totals = [*plan.tokens.items(), ("all", sum(plan.tokens.values()))]
    through = {**blocks, "all": sum(blocks.values())}
    rows = [
        (kind, f"{count:,}", f"{through.get(kind, 0) / count:.1f}" if blocks and count else "-")
        for kind, count in totals
    ]
    return Table("Tokens spent", ("For", "Tokens", "Blocks per token"), rows)


def _notes(view: RunView) -> Markup:
    if not view.notes:
        return Markup("")
    return section("Notes", *(paragraph(note) for note in view.notes))


def _code(text: str) -> Markup:
    return tag("code", text)

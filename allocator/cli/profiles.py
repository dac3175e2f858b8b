"""The verb profile: loss tables of any scorers, and how well they know the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from allocator.cli.options import (
    RUNS,
    DataSeed,
    Device,
    DeviceMapOption,
    DType,
    Exclude,
    Json,
    Length,
    Model,
    Pins,
    Runs,
    Space,
    Text,
    Ties,
    device_data,
    make_config,
    reading_data,
    space_data,
)
from allocator.cli.terminal import console, print_json, reporting
from allocator.config import DEFAULT_SCORER, RunConfig
from allocator.reporter import Reporter
from allocator.run_folder import RunFolder, load_losses, run_folder, save_losses, save_space
from search_spaces.space import SearchSpace
from search_spaces.whole_file import write_whole

if TYPE_CHECKING:
    from allocator.profile import Comparison
    from objectives.sensitivity import LossTable

_WHOLE = "100%"


def profile_model(
    model: Model,
    scorer: Annotated[
        str | None,
        typer.Option(
            help=f"One or several with commas ('allocator list scorers'); else {DEFAULT_SCORER}, "
            "or all with --compare."
        ),
    ] = None,
    compare_all: Annotated[
        bool,
        typer.Option("--compare", help="Hold scorers against measured losses."),
    ] = False,
    random: Annotated[int, typer.Option(min=2, help="With --compare: random assignments.")] = 50,
    budget: Annotated[
        str, typer.Option(help="Of incumbents and random assignments, such as 3.25bpw.")
    ] = _WHOLE,
    space: Space = "bits",
    ties: Ties = None,
    pin: Pins = [],
    exclude: Exclude = [],
    text: Text = "wiki-summaries",
    sequence_length: Length = 256,
    num_statistics: Annotated[int, typer.Option(help="Sequences that scorers read.")] = 16,
    num_search: Annotated[int, typer.Option(help="Sequences to hold them against.")] = 8,
    data_seed: DataSeed = 0,
    objective: Annotated[str, typer.Option(help="What is measured, as in search.")] = "kl",
    dtype: DType = "auto",
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: all cores.")] = 0,
    stream: Annotated[
        bool, typer.Option(help="Block by block, for models larger than memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random assignments.")] = 0,
    runs: Runs = RUNS,
    name: Annotated[str | None, typer.Option(help="Of the folder; else profile and model.")] = None,
    as_json: Json = False,
) -> None:
    """Score every option of every unit; compare scorers with measured losses."""
    from allocator.profile import compare, profile
    from allocator.session import begin, default_name, reopen
    from objectives.sensitivity import SCORERS

    data: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "space": space_data(space, ties, pin, exclude),
        "data": reading_data(text, sequence_length, num_statistics, data_seed, search=num_search),
        "measure": {
            "objective": objective,
            **device_data(dtype, device, device_map, threads),
        },
        "search": {"seed": seed},
    }
    config = make_config(data)
    if scorer is None:
        names = list(SCORERS) if compare_all else [DEFAULT_SCORER]
    else:
        names = [word.strip() for word in scorer.split(",")]
    for known in names:
        SCORERS[known]  # an unknown name is refused before anything is loaded
    folder = run_folder(runs, name or default_name(model, "profile", Path(space).stem, budget))
    if stream and compare_all:
        raise ValueError("--compare measures the whole model, --stream holds a block: drop one")
    if stream and device_map is not None:
        raise ValueError("--device-map spreads the whole model, --stream holds a block: drop one")
    if stream and folder.begun:
        raise ValueError(f"{folder.path} holds a run: choose another folder with --name")
    if compare_all and config.budget == _WHOLE:
        raise ValueError(
            "--compare needs a --budget below the dense model's bytes, such as 3.25bpw: "
            "units are measured alone at the uniform option that fits it"
        )
    if stream:
        tables, shown, peak = _stream(config, names, folder, quiet=as_json)
        if not as_json:
            for table in tables.values():
                _print_table(table, shown)
            console.print(f"peak memory {peak / 2**30:.2f} GiB; tables: {folder.losses}")
            return
        print_json(_summary(folder, tables, shown, None) | {"peak_bytes": peak})
        return
    with reporting(quiet=as_json) as reporter:
        if folder.begun:
            reporter.note(f"{folder.path} holds this profile already: what it lacks is added")
            opened = reopen(folder, reporter, change=lambda old: config_like(config, old))
        else:
            opened = begin(config, folder, reporter)
        with opened as (session, journal):
            tables = profile(session, journal, names)
            save_losses(_known(folder, session.space, reporter) | tables, folder.losses)
            found = None
            if compare_all:
                found = compare(
                    session, journal, tables, num_random=random, num_sequences=num_search
                )
    shown = session.space
    if found is not None:
        _write_comparison(found, f"{Path(model).name}, {Path(space).stem} at {budget}", folder)
    if as_json:
        print_json(_summary(folder, tables, shown, found))
    elif found is not None:
        _print_comparison(found, folder)
    else:
        for table in tables.values():
            _print_table(table, shown)
        console.print(f"tables: {folder.losses}", markup=False, soft_wrap=True)


def _stream(
    config: RunConfig, scorers: list[str], folder: RunFolder, *, quiet: bool
) -> tuple[dict[str, LossTable], SearchSpace, int]:
    """Tables of a model that need not fit in memory; written to the folder."""
    from allocator.run_texts import calibration_request
    from allocator.session import price_space
    from objectives.statistics_file import FILE_NAME
    from objectives.streamed_profile import StreamSettings, profile_streamed

    request = calibration_request(config.data, config.data.text)
    space = price_space(config.model, config.space)
    folder.make()
    settings = StreamSettings(
        config.measure.dtype, config.measure.device, statistics=folder.cache / FILE_NAME
    )
    with reporting(quiet=quiet) as reporter:
        advance = reporter.stage("blocks", None)
        found = profile_streamed(
            config.model,
            space,
            scorers,
            text=request,
            settings=settings,
            progress=lambda done, total: advance(done, f"of {total}"),
        )
        for name, reason in found.left_out.items():
            reporter.note(f"the {name} scorer is left out: {reason}")
    save_space(space, folder.space)
    save_losses(dict(found.tables), folder.losses)
    return dict(found.tables), space, found.memory.host_bytes


def config_like(wanted: RunConfig, old: RunConfig) -> RunConfig:
    """What is wanted, with what an earlier session settled: precision and threads."""
    settled = {"dtype": old.measure.dtype, "threads": old.measure.threads}
    return wanted.model_copy(update={"measure": wanted.measure.model_copy(update=settled)})


def _write_comparison(found: Comparison, title: str, folder: RunFolder) -> None:
    from allocator.report.comparison import comparison_csv, comparison_markdown, draw_comparison

    write_whole(folder.path / "comparison.csv", comparison_csv(found))
    write_whole(folder.path / "comparison.md", comparison_markdown(found, title))
    draw_comparison(found, title, folder.path / "comparison.svg")


def _known(folder: RunFolder, space: SearchSpace, reporter: Reporter) -> dict[str, LossTable]:
    """The tables that the folder holds already; none, with a note, where they are damaged."""
    if not folder.losses.exists():
        return {}
    try:
        return load_losses(folder.losses, space)
    except ValueError as error:
        reporter.note(f"{error}; only the tables asked for now are written")
        return {}


def _print_comparison(found: Comparison, folder: RunFolder) -> None:
    from allocator.report.comparison import comparison_rows

    table = Table(
        title="rank correlation with measured losses",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=f"{found.num_units} units alone, {found.num_random} random assignments, "
        f"{found.num_tokens:,} tokens",
    )
    heads = ("scorer", "unit", "units rho", "tau", "random rho", "tau", "tokens", "seconds")
    for column, head in enumerate(heads):
        table.add_column(head, justify="left" if column < 2 else "right", overflow="fold")
    for row in comparison_rows(found):
        table.add_row(*row)
    console.print(table)
    for scorer, reason in found.left_out.items():
        console.print(f"left out: {scorer}: {reason}", markup=False)
    console.print(f"plot: {folder.path / 'comparison.svg'}", markup=False, soft_wrap=True)


def _print_table(losses: LossTable, space: SearchSpace) -> None:
    """Sums by kind; the whole table is on disk."""
    from allocator.profile import summarise

    rows = summarise(losses, space)
    labels = [option.operator.label for option in space.menus[0]]
    width = min(12, max(len(values) for _, values in rows))
    table = Table(
        title=f"{losses.scorer}, {losses.unit}, summed over the units of a kind",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kind")
    for place in range(width):
        head = labels[place] if place < len(labels) else str(place)
        table.add_column(head, justify="right", overflow="fold")
    for kind, values in rows:
        table.add_row(kind, *(f"{value:.4g}" for value in values[:width]))
    console.print(table)


def _summary(
    folder: RunFolder,
    tables: dict[str, LossTable],
    space: SearchSpace,
    found: Comparison | None,
) -> dict[str, Any]:
    """A profile for machines."""
    from allocator.profile import summarise
    from allocator.report.comparison import comparison_csv, comparison_rows

    summary: dict[str, Any] = {
        "folder": str(folder.path),
        "tables": {
            name: {
                "unit": table.unit,
                "kinds": {kind: values.tolist() for kind, values in summarise(table, space)},
            }
            for name, table in tables.items()
        },
    }
    if found is not None:
        names = comparison_csv(found).splitlines()[0].split(",")
        rows = [dict(zip(names, row, strict=True)) for row in comparison_rows(found)]
        summary["comparison"] = rows
        summary["left_out"] = found.left_out
    return summary

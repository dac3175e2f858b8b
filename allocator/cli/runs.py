"""Verbs on runs: search, resume, report. What loads torch is imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from allocator.budget import parse_budgets
from allocator.cli.options import (
    RUNS,
    DataSeed,
    Device,
    DeviceMapOption,
    DType,
    Exclude,
    FinishedRun,
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
    space_data,
)
from allocator.cli.terminal import console, format_bytes, parse_duration, print_json, reporting
from allocator.config import DEFAULT_SCORER, Objective, RunConfig
from allocator.run_folder import existing_run, run_folder
from allocator.searches import preferred_sequences
from allocator.searches.options import parse_options

if TYPE_CHECKING:
    from allocator.runner import Finished

SearchOptions = Annotated[
    list[str], typer.Option(help="KEY=VALUE of the search: 'allocator list searches'.")
]
Latencies = Annotated[
    str | None,
    typer.Option(help="For nsga2, nsga3: rows,columns,operator,seconds."),
]
WarmStart = Annotated[
    str | None, typer.Option(help="Earlier run, or study as STORAGE#STUDY, to start from.")
]
Sequences = Annotated[
    int | None, typer.Option(help="Sequences per evaluation; else what the search prefers.")
]
Also = Annotated[
    list[str], typer.Option(help="TEXT=WEIGHT: a text beside --text (1); TEXT: weighed.")
]

_SEQUENCES_WITHOUT_CAP = 600
_READABLE = 1e5  # a perplexity beyond is written with an exponent


def search(
    model: Model,
    budget: Annotated[str, typer.Option(help="90MB, 2.5GiB, 3.25bpw, 40%; several with commas.")],
    space: Space = "bits",
    ties: Ties = None,
    pin: Pins = [],
    exclude: Exclude = [],
    open_units: Annotated[
        list[str], typer.Option("--open", help="Search the embeddings or the head too.")
    ] = [],
    bar_keep: Annotated[bool, typer.Option(help="Offer no dense option.")] = False,
    context: Annotated[int, typer.Option(help="Tokens of cache in the budget; 0: none.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences of the cache.")] = 1,
    apart: Annotated[bool, typer.Option(help="Choose keys and values of caches apart.")] = False,
    text: Text = "wiki-summaries",
    also: Also = [],
    sequence_length: Length = 256,
    num_statistics: Annotated[int, typer.Option(help="Sequences for statistics.")] = 64,
    num_search: Annotated[int, typer.Option(help="Sequences the search measures on.")] = 64,
    num_guard: Annotated[int, typer.Option(help="Sequences that choose what is returned.")] = 32,
    num_heldout: Annotated[int, typer.Option(help="Sequences that only report.")] = 32,
    data_seed: DataSeed = 0,
    objective: Annotated[
        str, typer.Option(help=f"One of {', '.join(get_args(Objective))}.")
    ] = "kl",
    top_k: Annotated[int, typer.Option(help="Outcomes the teacher keeps; 0: all.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    dtype: DType = "auto",
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    threads: Annotated[int, typer.Option(help="Torch threads a process; 0: share the cores.")] = 0,
    method: Annotated[
        str, typer.Option("--search", help="One or several with commas: 'allocator list searches'.")
    ] = "model_guided",
    search_option: SearchOptions = [],
    latencies: Latencies = None,
    scorer: Annotated[
        str, typer.Option(help="Loss table that the search starts from.")
    ] = DEFAULT_SCORER,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    warm_start: WarmStart = None,
    window: Annotated[int, typer.Option(help="Proposals under way at once.")] = 4,
    sequences: Sequences = None,
    slopes: Annotated[bool, typer.Option(help="Let the search differentiate the loss.")] = True,
    trials: Annotated[
        int | None, typer.Option(help="Most evaluations (as read 600 sequences if no cap).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Most tokens of statistics, dense model and search together.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Longest search, such as 5m.")] = None,
    executor: Annotated[str, typer.Option(help="in-process or ray.")] = "in-process",
    workers: Annotated[int, typer.Option(help="Ray workers; at most half the window.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs Ray reserves per worker.")] = 0.0,
    runs: Runs = RUNS,
    name: Annotated[str | None, typer.Option(help="Of the run; else model and budget.")] = None,
    as_json: Json = False,
) -> None:
    """Search the best allocation of a model within a byte budget."""
    budgets = parse_budgets(budget)
    others, weights = _split_texts(also)
    if trials is None and tokens is None and time is None:
        trials = _usual_trials(min(sequences or preferred_sequences(method), num_search))
    data: dict[str, Any] = {
        "model": model,
        "budget": budgets[0],
        "space": {
            **space_data(space, ties, pin, exclude),
            "open_units": open_units,
            "bar_keep": bar_keep,
            "context": context,
            "batch": batch,
            "apart": apart,
        },
        "data": {
            "text": text,
            "also": others,
            "weights": weights,
            "sequence_length": sequence_length,
            "statistics": num_statistics,
            "search": num_search,
            "guard": num_guard,
            "heldout": num_heldout,
            "seed": data_seed,
        },
        "measure": {
            "objective": objective,
            "top_k": top_k,
            "batch_size": batch_size,
            **device_data(dtype, device, device_map, threads),
        },
        "search": {
            "name": method,
            "scorer": scorer,
            "seed": seed,
            "window": window,
            "batch": sequences,
            "slopes": slopes,
            "warm_start": warm_start,
            "options": parse_options(search_option),
            "latencies": latencies,
        },
        "caps": {
            "trials": trials,
            "tokens": tokens,
            "seconds": None if time is None else parse_duration(time),
        },
        "execution": {
            "executor": executor,
            "workers": workers,
            "address": address,
            "gpus_per_worker": gpus_per_worker,
        },
    }
    config = make_config(data)
    found = _run_all(config, budgets, runs=runs, name=name, quiet=as_json)
    if as_json:
        print_json([summary(run) for run in found])


def resume(
    run: Annotated[str, typer.Argument(help="Run folder, or its name in the runs folder.")],
    trials: Annotated[int | None, typer.Option(help="New cap of evaluations.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New cap of tokens.")] = None,
    time: Annotated[str | None, typer.Option(help="New time limit of the search.")] = None,
    executor: Annotated[str | None, typer.Option(help="in-process or ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers.")] = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Continue a run after a crash, or with larger caps; nothing is measured twice."""
    from allocator.runner import resume_run

    caps: dict[str, Any] = {"trials": trials, "tokens": tokens}
    caps["seconds"] = None if time is None else parse_duration(time)
    execution = {"executor": executor, "workers": workers}
    extend = any(value is not None for value in caps.values())

    def change(config: RunConfig) -> RunConfig:
        data = config.model_dump()
        if extend and time is None:
            data["caps"]["seconds"] = None  # the old limit would end this session too
        data["caps"] |= {key: value for key, value in caps.items() if value is not None}
        data["execution"] |= {key: value for key, value in execution.items() if value is not None}
        return make_config(data)

    with reporting(quiet=as_json) as reporter:
        finished = resume_run(existing_run(run, runs), reporter, change=change, extend=extend)
    if as_json:
        print_json(summary(finished))
    else:
        print_finished(finished)


def report(
    run: FinishedRun,
    runs: Runs = RUNS,
) -> None:
    """Write a finished run's results and HTML report again from its journal, without the model."""
    from allocator.runner import resume_run

    with reporting(quiet=True) as reporter:
        finished = resume_run(existing_run(run, runs), reporter, offline=True)
    console.print(str(finished.folder.report), markup=False)


def print_finished(run: Finished) -> None:
    """The table at the end of a run."""
    plan = run.plan
    table = Table(
        title=f"{plan.model.name} at {plan.budget_text}: {plan.returned} returned",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=f"{plan.loss_unit_text} ± standard error; "
        "difference: returned minus this, held-out",
    )
    for column in ("plan", "bpw", "search", "guard", "held-out", "ppl", "difference"):
        table.add_column(column, no_wrap=True)
    for name, assignment in run.outcome.candidates.items():
        difference = plan.heldout_differences_nats.get(f"returned - {name}")
        heldout = plan.heldout_nats.get(name)
        perplexity = heldout.perplexity if heldout else None
        table.add_row(
            f"[bold]{name}[/bold]" if name == plan.returned else name,
            f"{run.space.weight_bits(assignment):.3f}",
            *(
                f"{entry.nats:.3f}" if entry else "-"
                for entry in (plan.search_nats.get(name), plan.guard_nats.get(name))
            ),
            f"{heldout.nats:.3f}±{heldout.standard_error_nats:.3f}" if heldout else "-",
            _perplexity(perplexity),
            f"{difference.nats:+.3f}±{difference.standard_error_nats:.3f}" if difference else "-",
        )
    console.print(table)
    console.print(
        f"stored {plan.achieved_bytes:,} of {plan.budget_bytes:,} bytes "
        f"({format_bytes(plan.achieved_bytes)}, slack {plan.slack_bytes:,}); "
        f"additive optimum proved to {plan.gap_nats:.2g}",
        markup=False,
    )
    paths = [("plan", run.folder.plan), ("report", run.folder.report)]
    if run.outcome.found.front:
        paths.append(("front", run.folder.front))
    for label, path in paths:
        console.print(f"{label}: {path}", markup=False, soft_wrap=True)


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < _READABLE else f"{value:.2e}"


def summary(run: Finished) -> dict[str, Any]:
    """A finished run for machines: the plan without its units."""
    plan = run.plan.model_dump(mode="json", exclude={"units", "fixed"})
    return {"folder": str(run.folder.path), "plan": str(run.folder.plan), **plan}


def _run_all(
    config: RunConfig, budgets: tuple[str, ...], *, runs: Path, name: str | None, quiet: bool
) -> list[Finished]:
    """One run per budget, each checked before the first starts.

    Of several budgets those that an earlier session of the same command began are continued.
    """
    from allocator.bench import BenchPool
    from allocator.runner import resume_run, start_run
    from allocator.same_run import continues
    from allocator.session import check_start, default_name, name_word

    names = [default_name(config.model, word) for word in budgets]
    if name is not None:
        ends = [name_word(word) for word in budgets] if len(budgets) > 1 else [""]
        names = [name + end for end in ends]
    jobs = [
        (config.model_copy(update={"budget": word}), run_folder(runs, folder))
        for word, folder in zip(budgets, names, strict=True)
    ]
    several = len(jobs) > 1
    if several:  # a mistake in the last budget must not show after hours of the first
        for one, folder in jobs:
            if not continues(one, folder):
                check_start(one, folder)
    found = []
    pool = BenchPool()
    for one, folder in jobs:
        with reporting(quiet=quiet) as reporter:
            if several and folder.begun:
                reporter.note(f"{folder.path} holds this run already: it is continued")
                found.append(resume_run(folder, reporter))
            else:
                found.append(start_run(one, folder, reporter, pool))
        if not quiet:
            print_finished(found[-1])
    return found


def _usual_trials(sequences: int) -> int:
    """Without any cap: as many evaluations of so many sequences as read 600."""
    return max(1, _SEQUENCES_WITHOUT_CAP // max(1, sequences))


def _split_texts(words: list[str]) -> tuple[list[str], list[float]]:
    """TEXT=WEIGHT, repeated, as texts and the weights of ``--text`` and each; or TEXT, without."""
    found = [_split_weight(word) for word in words]
    weights = [weight for _, weight in found if weight is not None]
    if weights and len(weights) < len(found):
        raise ValueError("--also: give every text a weight (TEXT=WEIGHT) or none (TEXT)")
    return [text for text, _ in found], [1.0, *weights] if weights else []


def _split_weight(word: str) -> tuple[str, float | None]:
    """TEXT=WEIGHT as a pair; an equals sign that no number follows is part of the text."""
    text, separator, weight = word.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return word, None
    if not separator or not text:
        return word, None
    return text, number

"""Verbs on plans: show, evaluate, export, apply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from allocator.cli.options import RUNS, DataSeed, Runs
from allocator.cli.terminal import console, format_bytes, print_json, reporting
from allocator.config import SpaceConfig
from allocator.exporters import EXPORTERS
from allocator.exporters.base import ModelExporter
from allocator.exporters.transformers_cache import TransformersCacheExporter
from allocator.plan import Plan, load_plan, plan_json_schema
from allocator.run_folder import RunFolder, plan_path
from search_spaces.operators import Statistics
from search_spaces.yaml_space import space_json_schema

PlanPlace = Annotated[str, typer.Argument(help="plan.json, or a run's folder or name.")]
ModelName = Annotated[str, typer.Argument(help="The plan's model: hub id, folder or embedded.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def show(
    plan: Annotated[
        str | None, typer.Argument(help="plan.json, a run's folder or name; with --space: a model.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Price this preset or YAML file for a model instead.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="With --space: budgets to price.")] = None,
    ties: Annotated[str | None, typer.Option(help="With --space: whose kernels tie.")] = None,
    open_units: Annotated[
        list[str], typer.Option("--open", help="With --space: search embeddings or head too.")
    ] = [],
    context: Annotated[int, typer.Option(min=0, help="With --space: tokens of cache.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the cache.")] = 1,
    schema: Annotated[bool, typer.Option(help="Print the JSON Schema of plans instead.")] = False,
    space_schema: Annotated[bool, typer.Option(help="Print that of space files.")] = False,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Show what a plan says, or what a space costs for a model, from its configuration alone."""
    if schema or space_schema:
        print_json(plan_json_schema() if schema else space_json_schema())
        return
    if plan is None:
        raise ValueError(
            "expected a plan, a model with --space, or --schema: allocator show runs/NAME"
        )
    if space is not None:
        from allocator.cli.spaces import show_space

        wish = SpaceConfig(
            space=space,
            ties=ties,
            open_units=tuple(open_units),
            context=context,
            batch=batch,
        )
        show_space(plan, wish, budget, as_json=as_json)
        return
    if budget or ties or open_units or context or batch > 1:
        raise ValueError(
            "--budget, --ties, --open, --context and --batch price a space: give --space too"
        )
    path = _plan_file(plan, runs)
    if not path.exists() and (path.parent / "config.json").is_file():
        raise ValueError(f"{plan} is a model, not a plan: give --space to see what one costs")
    loaded = load_plan(path)
    if as_json:
        print_json(loaded.model_dump(mode="json"))
        return
    _print_facts(loaded)
    console.print(_grid(loaded))


def evaluate(
    model: ModelName,
    plan: PlanPlace,
    text: Annotated[str, typer.Option(help="Text to measure on.")] = "wiki-summaries",
    num_sequences: Annotated[int, typer.Option(min=1, help="Sequences to measure.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    data_seed: DataSeed = 0,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0: all cores.")] = 0,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Measure a plan on a text: KL to the dense model, cross-entropy, perplexity."""
    from allocator.measure_plan import measure_plan
    from objectives.calibration import CalibrationRequest

    path = _plan_file(plan, runs)
    loaded = load_plan(path)
    request = CalibrationRequest(
        text,
        sequence_length=sequence_length,
        num_statistics=1,
        num_search=1,
        num_guard=1,
        num_heldout=num_sequences,
        seed=data_seed,
    )
    with reporting(quiet=as_json) as reporter:
        measured = measure_plan(
            model,
            loaded,
            request=request,
            threads=threads,
            reporter=reporter,
            statistics=_statistics(loaded, path),
        )
    if as_json:
        print_json({name: entry.model_dump(mode="json") for name, entry in measured.items()})
        return
    table = Table("model", "KL nats", "cross-entropy", "perplexity", "tokens")
    for name, entry in measured.items():
        table.add_row(
            name,
            f"{entry.nats:.4f} ± {entry.standard_error_nats:.4f}",
            f"{entry.cross_entropy_nats:.4f}",
            f"{entry.perplexity:.3f}",
            f"{entry.num_tokens:,}",
        )
    console.print(table)


def export(
    plan: PlanPlace,
    to: Annotated[str, typer.Option(help="See 'allocator list exporters'.")],
    output: Annotated[Path, typer.Option("-o", help="Folder to write into.")],
    model: Annotated[
        str | None, typer.Option(help="The plan's model, to write compressed weights too.")
    ] = None,
    runs: Runs = RUNS,
    as_json: Json = False,
) -> None:
    """Write a plan in a toolkit's own format, read it back and compare."""
    path = _plan_file(plan, runs)
    loaded = load_plan(path)
    exporter = EXPORTERS[to]()
    if model is None:
        receipt = exporter.write(loaded, output)
    elif isinstance(exporter, ModelExporter):
        from objectives.loading import load_model

        dense = load_model(model, dtype=loaded.dtype, device="cpu")
        receipt = exporter.write_model(loaded, dense, output, _statistics(loaded, path))
    else:
        raise ValueError(f"{to} writes no weights: drop --model")
    mismatches = exporter.verify(loaded, receipt.files[0])
    if mismatches:
        first = mismatches[0]
        raise ValueError(
            f"{to} would not execute the plan: {len(mismatches)} differences, the first for "
            f"{first.unit}: expected {first.expected}, got {first.got}"
        )
    notes = list(receipt.notes)
    if not isinstance(exporter, TransformersCacheExporter):
        notes += _cache_notes(loaded)
    if as_json:
        files = [str(written) for written in receipt.files]
        print_json({"files": files, "num_units": receipt.num_units, "notes": notes})
        return
    for written in receipt.files:
        console.print(str(written), markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"{receipt.num_units} units written, read back and equal to the plan")


def apply(
    model: ModelName,
    plan: PlanPlace,
    output: Annotated[Path, typer.Option("-o", help="New folder for the checkpoint.")],
    packed: Annotated[
        bool, typer.Option(help="One packed file of the plan's exact bytes instead.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the checkpoint; auto: as measured.")] = "auto",
    runs: Runs = RUNS,
) -> None:
    """Write the compressed model: a checkpoint that transformers loads, or one packed file."""
    from allocator.apply import check_loaded, write_checkpoint, write_packed
    from objectives.loading import load_model

    plan_file = _plan_file(plan, runs)
    loaded_plan = load_plan(plan_file)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    loaded = load_model(model, dtype=loaded_plan.dtype, device="cpu")
    for note in _cache_notes(loaded_plan):
        console.print(f"note: {note}", markup=False)
    if packed:
        check_loaded(loaded_plan, loaded)
        path = output / "model.packed.safetensors"
        if path.exists():
            raise ValueError(f"{path} exists already: choose another folder with -o")
        output.mkdir(parents=True, exist_ok=True)
        write_packed(loaded.model, loaded_plan, path, _statistics(loaded_plan, plan_file))
        console.print(f"{path}: {path.stat().st_size:,} bytes", markup=False, soft_wrap=True)
        return
    kept: Any = None if dtype == "auto" else dtype
    statistics = _statistics(loaded_plan, plan_file)
    write_checkpoint(loaded, loaded_plan, output, dtype=kept, statistics=statistics)
    console.print(str(output), markup=False, soft_wrap=True)


def _cache_notes(plan: Plan) -> list[str]:
    """What is said of a plan's caches where only weights are written."""
    if not plan.cache_bytes:
        return []
    other = TransformersCacheExporter.name
    return [f"The plan's caches are not in it: export them with --to {other}."]


def _statistics(loaded: Plan, plan_file: Path) -> Mapping[str, Statistics]:
    """What the plan's operators need of the calibration text: kept beside the plan by its run."""
    if not any(entry.choice.needs for entry in loaded.units):
        return {}
    from objectives.statistics_file import FILE_NAME, StatisticsFile, statistics_identity

    path = plan_file.parent / "cache" / FILE_NAME
    if not path.exists():
        raise ValueError(
            f"the plan's operators need statistics of its calibration text, and {path} is missing: "
            "give the plan in its run's folder; 'allocator resume' of the run makes them again"
        )
    texts = loaded.calibration
    text = "" if texts is None else texts.statistics_identity(loaded.objective)
    identity = statistics_identity(loaded.model.weights_sha256, text)
    return StatisticsFile(path, identity).load()[1]


def _plan_file(text: str, runs: Path) -> Path:
    """A plan by its own path, by its run's folder or, inside ``runs``, by its run's name.

    Raises:
        ValueError: A run without a plan.
    """
    path, named = Path(text), RunFolder(runs / text)
    run = named if named.exists and not path.exists() else RunFolder(path)
    if run.exists:
        return plan_path(run)
    return path / "plan.json" if path.is_dir() else path


def _print_facts(plan: Plan) -> None:
    facts = Table(show_header=False, box=None)
    facts.add_row("model", f"{plan.model.name} ({plan.model.architecture})")
    facts.add_row("space", f"{plan.space}, ties: {plan.ties}")
    facts.add_row("budget", f"{plan.budget_text} = {plan.budget_bytes:,} bytes")
    facts.add_row("stored", f"{plan.achieved_bytes:,} bytes ({format_bytes(plan.achieved_bytes)})")
    facts.add_row("slack", f"{plan.slack_bytes:,} bytes")
    facts.add_row("bits per weight", f"{plan.bits_per_weight:.4f}")
    own = plan.returned == "dp" or plan.gap_nats is None
    status = plan.solver_status if own else f"the solver's own plan is {plan.solver_status}"
    facts.add_row("returned", f"{plan.returned}; {status}")
    for name, entry in plan.heldout_nats.items():
        facts.add_row(
            f"held-out {name}",
            f"{entry.nats:.4f} ± {entry.standard_error_nats:.4f} {plan.loss_unit_text}",
        )
    if not plan.heldout_nats:
        for name, entry in plan.search_nats.items():
            facts.add_row(
                f"search text, {name}",
                f"{entry.nats:.4f} ± {entry.standard_error_nats:.4f} {plan.loss_unit_text}",
            )
    console.print(facts)


def _grid(plan: Plan) -> Table:
    """Option labels by depth and projection; narrow, and folded where they need more room."""
    kinds = list(dict.fromkeys(entry.kind for entry in plan.units))
    rows: dict[int | None, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in plan.units:
        rows[entry.depth][entry.kind].append(entry.choice.label)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("block", *kinds):
        table.add_column(head, overflow="fold")
    for depth, cells in rows.items():
        labels = (" ".join(sorted(set(cells[kind]))) for kind in kinds)
        table.add_row("-" if depth is None else str(depth), *labels)
    return table

"""``allocator transfer``: a formula that a search found, applied to a model without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from allocator.cli.runs import DeviceMapOption, Json, make_config, split_pin
from allocator.cli.terminal import console, format_bytes, print_json, reporting
from allocator.plan import save_plan
from objectives.device_map import parse_device_map


def transfer_formula(
    formula: Annotated[Path, typer.Argument(help="formula.json, or the folder of its run.")],
    model: Annotated[str, typer.Argument(help="Hub id, local folder or embedded model.")],
    budget: Annotated[str, typer.Option(help="90MB, 2.5GiB, 3.25bpw, 40%.")],
    output: Annotated[Path, typer.Option("-o", help="New folder for plan.json.")],
    space: Annotated[str, typer.Option(help="Preset or YAML file.")] = "bits",
    ties: Annotated[str | None, typer.Option(help="Runtime whose fused kernels tie units.")] = None,
    pin: Annotated[list[str], typer.Option(help="GLOB=LABEL, e.g. '*.o_proj=int8-g64'.")] = [],
    exclude: Annotated[list[str], typer.Option(help="Glob of units to leave dense.")] = [],
    text: Annotated[str, typer.Option(help="datasets id, .txt, .jsonl, .parquet or embedded.")] = (
        "wiki-summaries"
    ),
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    num_statistics: Annotated[int, typer.Option(help="Sequences to read.")] = 64,
    data_seed: Annotated[int, typer.Option(help="Orders the documents.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    device_map: DeviceMapOption = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: all cores.")] = 0,
    as_json: Json = False,
) -> None:
    """Apply a formula that a search found to a model: a plan within the bytes, not measured."""
    from allocator.transfer import load_formula, transfer

    found = load_formula(formula)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: give a new folder with -o")
    data: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "space": {
            "space": space,
            "ties": ties,
            "pins": [split_pin(words) for words in pin],
            "exclude": exclude,
        },
        "data": {
            "text": text,
            "sequence_length": sequence_length,
            "statistics": num_statistics,
            "search": 1,
            "guard": 1,
            "heldout": 1,
            "seed": data_seed,
        },
        "measure": {
            "dtype": dtype,
            "device": device,
            "device_map": device_map and parse_device_map(device_map),
            "threads": threads,
        },
    }
    with reporting(quiet=as_json) as reporter:
        plan = transfer(found, make_config(data), output, reporter)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "plan.json"
    save_plan(plan, path)
    if as_json:
        shown = plan.model_dump(mode="json", exclude={"units", "fixed"})
        print_json({"plan": str(path), "formula": str(found), **shown})
        return
    console.print(
        f"{found}: stored {plan.achieved_bytes:,} of {plan.budget_bytes:,} bytes "
        f"({format_bytes(plan.achieved_bytes)}); nothing was measured: 'allocator evaluate' does\n"
        f"plan: {path}",
        markup=False,
        soft_wrap=True,
    )

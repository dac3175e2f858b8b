"""``allocator transfer``: a formula that a search found, applied to a model without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from allocator.cli.options import (
    DataSeed,
    Device,
    DeviceMapOption,
    DType,
    Exclude,
    Json,
    Length,
    Model,
    Pins,
    Space,
    Text,
    Ties,
    device_data,
    make_config,
    reading_data,
    space_data,
)
from allocator.cli.terminal import console, format_bytes, print_json, reporting
from allocator.plan import save_plan

_PLAN = "plan.json"


def transfer_formula(
    formula: Annotated[Path, typer.Argument(help="formula.json, or the folder of its run.")],
    model: Model,
    budget: Annotated[str, typer.Option(help="90MB, 2.5GiB, 3.25bpw, 40%.")],
    output: Annotated[Path, typer.Option("-o", help="New folder for plan.json.")],
    space: Space = "bits",
    ties: Ties = None,
    pin: Pins = [],
    exclude: Exclude = [],
    text: Text = "wiki-summaries",
    sequence_length: Length = 256,
    num_statistics: Annotated[int, typer.Option(help="Sequences to read.")] = 64,
    data_seed: DataSeed = 0,
    dtype: DType = "auto",
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: all cores.")] = 0,
    as_json: Json = False,
) -> None:
    """Apply a formula that a search found to a model: a plan within the bytes, not measured."""
    from allocator.apply import new_folder
    from allocator.transfer import load_formula, transfer

    found = load_formula(formula)
    data: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "space": space_data(space, ties, pin, exclude),
        "data": reading_data(text, sequence_length, num_statistics, data_seed),
        "measure": {
            **device_data(dtype, device, device_map, threads),
        },
    }
    config = make_config(data)
    with reporting(quiet=as_json) as reporter, new_folder(output) as folder:
        plan = transfer(found, config, folder, reporter)
        save_plan(plan, folder / _PLAN)
    path = output / _PLAN
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

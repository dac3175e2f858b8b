"""Options that several verbs share, and the configuration that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from allocator.config import RunConfig
from allocator.executors import EXECUTORS
from allocator.searches import search_names
from objectives.device_map import DEVICE_MAPS, parse_device_map

Model = Annotated[str, typer.Argument(help="Hub id, local folder or embedded model.")]
Space = Annotated[str, typer.Option(help="Preset or YAML file.")]
Ties = Annotated[str | None, typer.Option(help="Runtime whose fused kernels tie units.")]
Pins = Annotated[list[str], typer.Option(help="GLOB=LABEL, e.g. '*.o_proj=int8-g64'.")]
Exclude = Annotated[list[str], typer.Option(help="Glob of units to leave dense.")]
Length = Annotated[int, typer.Option(help="Tokens of a sequence.")]
DataSeed = Annotated[int, typer.Option(help="Orders the documents.")]
DType = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Text = Annotated[str, typer.Option(help="datasets id, .txt, .jsonl, .parquet or embedded.")]
Runs = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help=f"Over several GPUs: {', '.join(DEVICE_MAPS)}, or JSON {{module: device}}."),
]
FinishedRun = Annotated[str, typer.Argument(help="Finished run folder or name.")]
Budgets = Annotated[str, typer.Option(help="One or several budgets, comma separated.")]
PlansFolder = Annotated[Path | None, typer.Option("-o", help="Folder for the plans.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; no progress.")]

RUNS = Path("runs")
# Options that are not called like their place in the configuration.
_OPTIONS = {
    "search.batch": "sequences",
    "data.statistics": "num-statistics",
    "data.search": "num-search",
    "data.guard": "num-guard",
    "data.heldout": "num-heldout",
    "data.seed": "data-seed",
    "data.weights": "also",
    "search.name": "search",
    "caps.seconds": "time",
}


def space_data(space: str, ties: str | None, pin: list[str], exclude: list[str]) -> dict[str, Any]:
    """The part ``space`` of a configuration.

    Raises:
        ValueError: A pin that is not GLOB=LABEL.
    """
    return {
        "space": space,
        "ties": ties,
        "pins": [_split_pin(words) for words in pin],
        "exclude": exclude,
    }


def reading_data(
    text: str, length: int, statistics: int, seed: int, *, search: int = 1
) -> dict[str, Any]:
    """The part ``data`` of a configuration that only reads a text and searches nothing."""
    return {
        "text": text,
        "sequence_length": length,
        "statistics": statistics,
        "search": search,
        "guard": 1,
        "heldout": 1,
        "seed": seed,
    }


def device_data(dtype: str, device: str, device_map: str | None, threads: int) -> dict[str, Any]:
    """What the part ``measure`` of a configuration says of devices.

    Raises:
        ValueError: A device map that is neither a known word nor JSON.
    """
    return {
        "dtype": dtype,
        "device": device,
        "device_map": device_map and parse_device_map(device_map),
        "threads": threads,
    }


def make_config(data: dict[str, Any]) -> RunConfig:
    """The validated configuration, its names checked before anything is loaded."""
    from objectives.sensitivity import SCORERS

    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        option = _OPTIONS.get(place, place.rpartition(".")[2].replace("_", "-"))
        raise ValueError(f"--{option}: {first['msg']}, got {first['input']!r}") from error
    search_names(config.search.name)
    for table, word in (
        (SCORERS, config.search.scorer),
        (EXECUTORS, config.execution.executor),
    ):
        table[word]
    execution = config.execution
    if execution.executor == "in-process" and execution.workers > 1:
        raise ValueError(
            f"the in-process executor is one worker, got --workers {execution.workers}; "
            "add --executor ray"
        )
    if execution.executor == "in-process" and (execution.address or execution.gpus_per_worker):
        option = "address" if execution.address else "gpus-per-worker"
        raise ValueError(f"--{option} is for Ray: add --executor ray")
    if 2 * execution.workers > config.search.window and execution.workers > 1:
        raise ValueError(
            f"{execution.workers} workers need --window {2 * execution.workers} or more, "
            f"got {config.search.window}: the window fixes the history, so it is yours to choose"
        )
    return config


def _split_pin(text: str) -> tuple[str, str]:
    """GLOB=LABEL as a pair."""
    glob, separator, label = text.rpartition("=")
    if not separator or not glob or not label:
        raise ValueError(f"--pin expects GLOB=LABEL such as '*.o_proj=int8-g64', got {text!r}")
    return glob, label

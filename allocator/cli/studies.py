"""The verb export-study: a run for Optuna's plots and its dashboard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from allocator.cli.terminal import console, print_json, reporting
from allocator.run_folder import existing_run


def export_study_verb(
    run: Annotated[str, typer.Argument(help="Run folder or name, finished or not.")],
    storage: Annotated[
        str, typer.Option(help="sqlite:///FILE, postgresql://USER@HOST/DATABASE or journal:FILE.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the study; else the run's.")] = None,
    multi: Annotated[bool, typer.Option(help="Two objectives: loss and bytes.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Copy a run's measurements into an Optuna study; repeating it adds only what is new."""
    from allocator.study import export_study  # loads torch

    with reporting(quiet=as_json) as reporter:
        receipt = export_study(
            existing_run(run, runs), storage, name, multi=multi, reporter=reporter
        )
    if as_json:
        print_json(asdict(receipt))
        return
    failed = f", {receipt.num_failed} of them failed" if receipt.num_failed else ""
    console.print(
        f"study {receipt.study} in {receipt.storage}: {receipt.num_added} trials added, "
        f"{receipt.num_present} were there{failed}",
        markup=False,
        soft_wrap=True,
    )
    if receipt.num_outdated:
        console.print(
            f"note: {receipt.num_outdated} of them keep the loss they had when they were exported; "
            "--name makes a fresh study",
            markup=False,
            soft_wrap=True,
        )

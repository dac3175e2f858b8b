"""Kinds of allocation against each other: held-out KL of each space at the same stored bytes.

Runs ``allocator search`` once per space (all budgets share its statistics and compressed weights)
and prints one table. The joint space offers bits, sparsity and ranks together, so it must not lose
to any of them. Run folders are kept: interrupted, the script goes on where it stopped.

    python tests/benchmarks/spaces.py --runs runs/spaces [--trials 60] [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from allocator.plan import Plan, load_plan

SPACES = ("bits", "sparsity", "rank", "joint")
BUDGETS = ("2.5bpw", "3bpw", "4bpw")


def run(space: str, budgets: tuple[str, ...], options: argparse.Namespace) -> None:
    """Search one space at the budgets that have no plan yet, resuming what was interrupted."""
    todo = []
    for budget in budgets:
        folder = options.runs / f"{space}-{budget}"
        if (folder / "plan.json").exists():
            continue
        if (folder / "journal.jsonl").exists():
            subprocess.run([*options.command, "resume", str(folder)], check=True)
        else:
            todo.append(budget)
    if todo:
        words = ["search", options.model, "--space", space, "--budget", ",".join(todo)]
        sizes = ["--num-guard", options.heldout, "--num-heldout", options.heldout]
        sizes += ["--num-statistics", options.statistics, "--trials", options.trials]
        sizes += ["--threads", options.threads]
        name = space if len(todo) > 1 else f"{space}-{todo[0]}"
        where = ["--runs", str(options.runs), "--name", name, "--seed", str(options.seed)]
        subprocess.run([*options.command, *words, *map(str, sizes), *where], check=True)


def row(space: str, budget: str, plan: Plan) -> str:
    """One line of the table."""
    found = plan.heldout_nats["returned"]
    uniform = plan.heldout_nats.get("uniform")
    beside = f"{uniform.nats:.3f}" if uniform else "none fits"
    return (
        f"| {budget} | {space} | {plan.achieved_bytes:,} | {found.nats:.3f} ± "
        f"{found.standard_error_nats:.3f} | {plan.heldout_nats['dp'].nats:.3f} | {beside} |"
    )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/spaces"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--statistics", type=int, default=32)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    options = parser.parse_args()
    options.command = [sys.executable, "-c", "from allocator.cli import main; main()"]
    for space in options.spaces:
        run(space, BUDGETS, options)
    print("| budget | space | stored bytes | held-out nats | solver's plan | uniform |")
    print("| --- | --- | --- | --- | --- | --- |")
    for budget in BUDGETS:
        for space in options.spaces:
            print(row(space, budget, load_plan(options.runs / f"{space}-{budget}" / "plan.json")))


if __name__ == "__main__":
    main()

"""Published allocation methods and ours on one bank: held-out KL at equal bytes and equal tokens.

python tests/benchmarks/anchors/run.py --folder runs/anchors --seeds 0 1 2 3 4 --tokens 60000
python tests/benchmarks/anchors/run.py --profile small   # what 30 minutes hold
python tests/benchmarks/anchors/run.py --table        # only the table of what is there
python tests/benchmarks/anchors/run.py --earlier results.csv   # goes on where another folder ended
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lab import SPACES, CannotStartError, Lab, lab_parser
from methods import DEAR, ON_REQUEST, OneShot, Searched, one_shots, searches
from records import append_result, other_settings, read_csv, read_folder, read_results
from summary import write_summary

from objectives.loading import resolve_device, resolve_dtype

# Half an hour on the cell in which published methods claim most, seed after seed.
SMALL = {
    "minutes": 30.0,
    "budgets": ["3 bit"],
    "seeds": [0, 1, 2],
    "tokens": 30_000,
    "folder": Path("runs/anchors-small"),
}
# Options that decide what a result is.
DECISIVE = ("model", "text", "length", "statistics", "search", "heldout", "tokens")

Method = OneShot | Searched | None


class Clock:
    """Lets nothing begin that would probably not end in time.

    Args:
        minutes: From now on; 0 for no end.

    Attributes:
        stopped: Something was not begun.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf
        self._longest = 0.0
        self.stopped = False

    def allows(self) -> bool:
        """Whether work as long as the longest so far would end in time."""
        self.stopped = time.monotonic() + self._longest > self._end
        return not self.stopped

    @contextmanager
    def work(self) -> Iterator[None]:
        """Remember how long the work inside takes."""
        started = time.monotonic()
        yield
        self._longest = max(self._longest, time.monotonic() - started)


def methods(options: argparse.Namespace, space: str) -> dict[str, Method]:
    """All methods of a space by name, the cheap ones first."""
    kind = "sparsity" if space == "sparsity" else "bits"
    return {"uniform": None, **one_shots(kind), **searches(kind, options.length)}


def jobs(options: argparse.Namespace, space: str) -> Iterator[tuple[str, str, Method]]:
    """(budget, method name, method) of those that are asked for and that the space has."""
    hidden = {*ON_REQUEST, *(DEAR if options.profile == "small" else ())}
    offered = SPACES[space][1]
    for budget in [b for b in options.budgets or offered if b in offered]:
        for name, method in methods(options, space).items():
            if name in options.methods or not (options.methods or name in hidden):
                yield budget, name, method


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides a result, besides what its own line says."""
    dtype = resolve_dtype(options.dtype, resolve_device(options.device))
    named = {name: getattr(options, name) for name in DECISIVE}
    return {**named, "dtype": str(dtype).removeprefix("torch.")}


def run(
    options: argparse.Namespace, space: str, seed: int, earlier: list[dict], clock: Clock
) -> None:
    """Every job of one seed that has no result yet, neither here nor among the earlier ones.

    Where time is up the rest is left, which the same command goes on with.
    """
    path = options.folder / f"{space}-seed{seed}.jsonl"
    results = [r for r in earlier if (r["space"], r["seed"]) == (space, seed)] + read_results(path)
    done = {(result["budget"], result["method"]) for result in results}
    todo = [job for job in jobs(options, space) if job[:2] not in done]
    if not todo or not clock.allows():
        return
    with clock.work():
        lab = Lab(options, space, seed)
    for budget, name, method in todo:
        if not clock.allows():
            return
        cell = f"{space} {budget} seed {seed} {name}"
        try:
            with clock.work():
                result = measure(lab, budget, name, method)
        except CannotStartError as reason:
            print(f"{cell}: skipped, {reason}", flush=True)
            continue
        append_result(path, result)
        last = result["points"][-1]
        print(f"{cell}: {sum(last['heldout']) / len(last['heldout']):.4f}", flush=True)


def measure(lab: Lab, budget: str, name: str, method: Method) -> dict[str, Any]:
    """One method at one budget: its plans, what they cost and lose.

    Raises:
        CannotStartError: The method has too few tokens.
    """
    started = time.monotonic()
    setting = lab.setting(lab.budgets[budget], "")
    if method is None:
        points = [(0, setting.starts[-1])]
    elif isinstance(method, OneShot):
        points = [lab.one_shot(method, setting)]
    else:
        points = lab.run_search(method, lab.budgets[budget])
    problem = setting.problem
    described = [lab.point(tokens, plan) for tokens, plan in points]
    assert all(point["bytes"] <= problem.budget_bytes for point in described)
    return {
        "space": lab.kind,
        "budget": budget,
        "method": name,
        "feasible": method.feasible if isinstance(method, Searched) else "B",
        "seed": lab.seed,
        "settings": settings(lab.options),
        "seconds": round(time.monotonic() - started, 1),
        "points": described,
    }


def refusal(options: argparse.Namespace) -> str:
    """Why nothing can be run, in one sentence; empty if it can."""
    budgets = {budget for space in options.spaces for budget in SPACES[space][1]}
    known = {name: None for space in options.spaces for name in methods(options, space)}
    spaces = " or ".join(options.spaces)
    for given, offered, what in (
        (options.budgets, sorted(budgets), "budgets"),
        (options.methods, list(known), "methods"),
    ):
        unknown = [repr(word) for word in given if word not in offered]
        if unknown:
            names = ", ".join(map(repr, offered))
            return f"no {what} of {spaces}: {', '.join(unknown)}; known: {names}"
    try:
        other = other_settings(options.folder, settings(options))
    except ValueError as error:
        return str(error)
    if other:
        return f"{options.folder} holds results of other options ({other}): take another --folder"
    return ""


def together(earlier: list[dict], results: list[dict]) -> list[dict]:
    """All results, each once: those measured here stand for earlier ones of the same."""
    keys = ("space", "budget", "method", "seed")
    return list({tuple(r[key] for key in keys): r for r in [*earlier, *results]}.values())


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    parser = lab_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/anchors"))
    parser.add_argument("--profile", choices=["full", "small"], default="full")
    parser.add_argument("--spaces", nargs="+", default=["bits"], choices=list(SPACES))
    parser.add_argument("--budgets", nargs="+", default=[], help="such as '3 bit'; default all")
    parser.add_argument("--methods", nargs="+", default=[], help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=60_000, help="of every method")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="begin nothing that would end later; the same command goes on; 0: no limit",
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument(
        "--earlier",
        type=Path,
        help="a results.csv made with the same options: its results stand in the table and are not "
        "measured again",
    )
    if parser.parse_known_args(words)[0].profile == "small":
        parser.set_defaults(**SMALL)
    options = parser.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        earlier = read_csv(options.earlier) if options.earlier else []
    except ValueError as error:
        parser.error(str(error))
    clock = Clock(options.minutes)
    if not options.table:
        if reason := refusal(options):
            parser.error(reason)
        for space in options.spaces:
            for seed in options.seeds:
                run(options, space, seed, earlier, clock)
                gc.collect()  # a bank is gigabytes, and part of cycles
    try:
        results = read_folder(options.folder)
        if clock.stopped:
            print(f"{options.minutes:g} minutes are up: the same command goes on", flush=True)
    except ValueError as error:
        parser.error(str(error))
    write_summary(options.folder, together(earlier, results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # banks are removed
    main()

"""How long the joint problem over millions of rows takes, in which memory, and against what.

Prints a Markdown table. Not run by default:

    python tests/benchmarks/rows.py [--runs 5] [--layers 33 471]

A layer has the 42,496 rows of Llama-7B's seven matrices, so 33 layers are 1.4 million rows and 471
are 20 million, with 8 options each and 70 % of the weights to drop. Every line is a process of its
own: wall and processor seconds are medians over runs (the latter say more on a shared machine);
memory is the process's peak, and beside it what was resident before the solver began (the problem
and the interpreter). Baselines solve the first rows of the same problem, since they cannot take
all: ``lagrangian`` is the solver for units, `allocator/solvers/lagrangian.py`, on arrays;
``greedy`` is the textbook's, a heap of every row's next hull step. Ratios are of processor seconds
per row, taken in this one run.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from allocator.row_problem import RowProblem
from allocator.solvers import Lagrangian
from allocator.solvers.hull import MenuTable
from allocator.solvers.rows import solve_rows

SHAPES = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
KEPT = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0])
SPARSITY = 0.7


def make_problem(num_layers):
    """Rows whose losses fall with the share kept, each at its own scale and rate, with noise."""
    rng = np.random.default_rng(0)
    bytes_, losses = [], []
    for _ in range(num_layers):
        depth = np.exp(rng.normal(0, 1))
        for rows, columns in SHAPES:
            scale = depth * np.exp(rng.normal(0, 1, (rows, 1)))
            curve = (1 - KEPT) ** rng.uniform(1.5, 4, (rows, 1))
            noise = np.exp(rng.normal(0, 0.02, (rows, len(KEPT))))
            bytes_.append(2 * np.ceil(KEPT * columns).astype(np.int64))
            losses.append((scale * curve * noise).astype(np.float32))
    problem = RowProblem(tuple(bytes_), tuple(losses), 0)
    return RowProblem(problem.bytes, problem.losses, round((1 - SPARSITY) * problem.most_bytes))


def first_rows(problem, num_rows):
    """(num_rows, 8) bytes and losses, and the budget's share."""
    pairs = zip(problem.bytes, problem.losses, strict=True)
    bytes_ = np.concatenate([np.broadcast_to(cost, loss.shape) for cost, loss in pairs])[:num_rows]
    losses = np.concatenate(problem.losses)[:num_rows].astype(np.float64)
    return np.ascontiguousarray(bytes_), losses, round((1 - SPARSITY) * int(bytes_[:, -1].sum()))


def greedy(bytes_, losses, budget):
    """Buy the best upgrade per byte of any row until the next does not fit; (loss, bytes)."""

    def steepest(row, here):
        cost, loss = menus[row], values[row]
        steps = [
            ((loss[here] - loss[there]) / (cost[there] - cost[here]), there)
            for there in range(here + 1, len(cost))
        ]
        return max(steps, default=(0.0, -1))

    menus, values = bytes_.tolist(), losses.tolist()
    heap = [
        (-slope, row, 0, there) for row in range(len(menus)) for slope, there in [steepest(row, 0)]
    ]
    heapq.heapify(heap)
    total, loss = sum(menu[0] for menu in menus), sum(value[0] for value in values)
    while heap:
        slope, row, here, there = heapq.heappop(heap)
        total += menus[row][there] - menus[row][here]
        if slope >= 0 or total > budget:
            return loss, total - menus[row][there] + menus[row][here]
        loss += values[row][there] - values[row][here]
        following, to = steepest(row, there)
        if to >= 0:
            heapq.heappush(heap, (-following, row, there, to))
    return loss, total


def solve(solver, num_layers, runs):
    """One line's figures, in the process that measures them."""
    problem = make_problem(num_layers)
    rows = problem.num_rows
    if solver == "rows":

        def call():
            found = solve_rows(problem)
            assert found.bytes <= problem.budget_bytes
            return found.loss, found.gap, problem.budget_bytes - found.bytes

    else:
        rows = min(rows, 200_000)
        bytes_, losses, budget = first_rows(problem, rows)

        def call():
            if solver == "greedy":
                loss, total = greedy(bytes_, losses, budget)
                return loss, float("nan"), budget - total
            table = MenuTable.of(bytes_)
            found = Lagrangian().solve_table(table, table.arrange(losses), budget)
            return found.loss, found.gap, budget - found.bytes

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = [], []
    for _ in range(runs):
        started = time.perf_counter(), time.process_time()
        loss, gap, left = call()
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {
        "solver": solver,
        "rows": rows,
        "wall_s": statistics.median(wall),
        "least_s": min(wall),
        "processor_s": statistics.median(processor),
        "before_mib": before / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gap": gap / loss,
        "left_bytes": left,
    }


def measure(solver, num_layers, runs):
    """Run :func:`solve` in a fresh process."""
    command = [sys.executable, __file__, "--runs", str(runs), "--layers", str(num_layers)]
    done = subprocess.run([*command, "--only", solver], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[33, 471])
    parser.add_argument("--only", choices=("rows", "lagrangian", "greedy"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(solve(options.only, options.layers[0], options.runs)))
        return
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{len(os.sched_getaffinity(0))} cores, load {load}\n")
    print(
        "| solver | rows x options | wall, s (least) | processor, s | per million rows, s | ratio "
        "| peak, MiB | before, MiB | gap / loss | bytes left |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    jobs = [("rows", layers) for layers in options.layers]
    jobs += [(solver, min(options.layers)) for solver in ("lagrangian", "greedy")]
    own = None
    for solver, layers in jobs:
        found = measure(solver, layers, options.runs)
        each = 1e6 * found["processor_s"] / found["rows"]
        own = own or each
        print(
            f"| {solver} | {found['rows']:,} x {len(KEPT)} | {found['wall_s']:.2f} "
            f"({found['least_s']:.2f}) | {found['processor_s']:.2f} | {each:.2f} "
            f"| {each / own:.1f} | {found['peak_mib']:.0f} | {found['before_mib']:.0f} "
            f"| {found['gap']:.1e} | {found['left_bytes']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

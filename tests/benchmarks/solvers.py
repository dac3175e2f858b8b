"""How fast the exact solver is, and how much faster than HiGHS on the same problem, same optimum.

Prints a Markdown table. Not run by default:

    python tests/benchmarks/solvers.py [--runs 9] [--time-limit-s 120]

``dynamic`` is one budget and the hull for all budgets in one call, from the raw arrays. ``oracle``
is one more loss table of menus seen before, as searches need it. Times are medians over runs, the
minimum in brackets; each ratio is of medians taken in this one process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np

from allocator.problem import Problem, Status
from allocator.solvers import DynamicProgram, MixedInteger, Oracle

LLAMA_SHAPES = (
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
)


def realistic(rng, num_units, num_options):
    """Few shapes; losses fall about fourfold per bit, each unit at its own scale, with noise."""
    bits = np.array([2, 3, 4, 5, 6, 8, 16]) if num_options == 7 else np.linspace(2, 8, num_options)
    bytes_, losses = [], []
    for unit in range(num_units):
        rows, columns = LLAMA_SHAPES[unit % len(LLAMA_SHAPES)]
        bytes_.append((rows * columns * bits / 8).astype(np.int64) + rows * columns // 64 * 4)
        scale = np.exp(rng.normal(-4, 1.2)) * rows * columns / 3e5
        noise = np.exp(rng.normal(0, 0.15, num_options))
        losses.append(scale * 4.0 ** (-(bits - 2) * rng.uniform(0.8, 1.1)) * noise)
    return bytes_, losses


def random_menus(rng, num_units, num_options):
    """Bytes up to 1e9 and losses without structure: most options are dominated."""
    return (
        [np.sort(rng.integers(1, 10**9, num_options)) for _ in range(num_units)],
        [rng.random(num_options) for _ in range(num_units)],
    )


def random_falling(rng, num_units, num_options):
    """Bytes up to 1e9 and random falling losses: no option is dominated."""
    bytes_, losses = random_menus(rng, num_units, num_options)
    return bytes_, [np.sort(loss)[::-1].copy() for loss in losses]


def correlated(rng, num_units, num_options):
    """Losses linear in random bytes up to a part in a thousand: hard for any bound."""
    bytes_, _ = random_menus(rng, num_units, num_options)
    return bytes_, [1 - sizes / 1e9 + rng.normal(0, 1e-3, num_options) for sizes in bytes_]


def milliseconds(call, runs):
    """The result of the last run, and the median and least wall time."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - started))
    return result, statistics.median(times), min(times)


def measure(make, num_units, num_options, options):
    """One row of the table."""
    bytes_, losses = make(np.random.default_rng(0), num_units, num_options)
    problem = Problem(tuple(bytes_), tuple(losses), 0)
    budget = problem.least_bytes + (problem.most_bytes - problem.least_bytes) // 5
    problem = Problem(problem.bytes, problem.losses, budget)
    oracle, program = Oracle(bytes_), DynamicProgram()
    matrix = np.stack(losses)
    (solutions, frontier), dynamic_ms, dynamic_least = milliseconds(
        lambda: program.sweep(problem, [budget]), options.runs
    )
    _, oracle_ms, oracle_least = milliseconds(lambda: oracle.solve(matrix, budget), options.runs)
    highs, highs_ms, highs_least = milliseconds(
        lambda: MixedInteger(time_limit_s=options.time_limit_s).solve(problem),
        min(3, options.runs),
    )
    exact = solutions[0]
    assert exact.status is Status.OPTIMAL
    if highs.status is Status.OPTIMAL:
        same = abs(exact.loss - highs.loss) <= 1e-11 * abs(exact.loss)
        verdict = "same" if same else f"differs: {exact.loss!r}, {highs.loss!r}"
    else:
        verdict = f"HiGHS stopped with gap {highs.gap:.1e}"
    return (
        f"| {num_units} x {num_options} | {make.__name__} | {dynamic_ms:.1f} ({dynamic_least:.1f}) "
        f"| {oracle_ms:.1f} ({oracle_least:.1f}) | {highs_ms:.0f} ({highs_least:.0f}) "
        f"| {highs_ms / dynamic_ms:.0f} | {verdict} | {len(frontier.bytes)} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--time-limit-s", type=float, default=120.0)
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}\n")
    print(
        "| units x options | problem | dynamic, ms | oracle, ms | HiGHS, ms | HiGHS / dynamic "
        "| optimum | hull points |\n|---|---|---|---|---|---|---|---|"
    )
    for num_units, num_options in ((210, 7), (560, 16)):
        for make in (realistic, random_menus, random_falling, correlated):
            print(measure(make, num_units, num_options, options), flush=True)


if __name__ == "__main__":
    main()

"""Compare the searches on synthetic problems: ``python -m tests.benchmarks.searches_synthetic``.

Prints the true loss of what each search returns, relative to the DP plan it starts from (below 1 is
better), mean and 95 % interval over problems x seeds. No model; seconds to a few minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from allocator.searches import SEARCHES
from tests.allocator.searches.zoo import Animal, drive, make_animal


@dataclass(frozen=True)
class Row:
    ratio: float
    num_evaluations: int
    num_sequences: int


def run(name: str, animal: Animal, seed: int, *, num_sequences: int, window: int) -> Row:
    """Drive a search until it has spent its sequences."""
    search = SEARCHES[name](animal.seeded(seed))
    spent = 0

    def measure(assignment, fidelity):
        nonlocal spent
        spent += fidelity.count
        return animal.measure(assignment, fidelity)

    history = []
    while spent < num_sequences:
        before = spent
        history += drive(search, measure, window, window)
        if spent == before:
            break
    return Row(animal.true_loss(search.best) / animal.true_loss(animal.dp), len(history), spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=150, help="budget, in minibatches")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=4)
    options = parser.parse_args()
    kinds = {"windows": 32, "whole split": 8}
    print(f"{options.batches} minibatches, window {options.window}; loss relative to the DP plan")
    print("split        search            mean   +-95%   worst  evals  s/run")
    for split, num_sequences in kinds.items():
        animals = [
            make_animal(100 + problem, 8, num_sequences=num_sequences)
            for problem in range(options.problems)
        ]
        for name in SEARCHES:
            begin = time.perf_counter()
            rows = [
                run(name, animal, seed, num_sequences=8 * options.batches, window=options.window)
                for animal in animals
                for seed in range(options.seeds)
            ]
            seconds = (time.perf_counter() - begin) / len(rows)
            ratios = np.array([row.ratio for row in rows])
            half = 1.96 * ratios.std(ddof=1) / np.sqrt(len(ratios))
            evaluations = np.mean([row.num_evaluations for row in rows])
            print(
                f"{split:12} {name:14} {ratios.mean():7.3f} {half:7.3f} {ratios.max():7.3f} "
                f"{evaluations:6.0f} {seconds:6.2f}"
            )


if __name__ == "__main__":
    main()

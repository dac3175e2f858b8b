"""Compare the searches on synthetic problems: ``python -m tests.benchmarks.searches_synthetic``.

Prints the true loss of what each search returns, relative to the DP plan it starts from (below 1 is
better), mean and 95 % interval over problems x seeds; for searches with a front its hypervolume
too, in nats. No model; seconds to a few minutes, ``gp`` aside, whose proposals take 0.3 s each.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from allocator.searches import SEARCHES
from allocator.searches.base import Noting
from tests.allocator.searches.zoo import Animal, drive, make_animal


@dataclass(frozen=True)
class Row:
    ratio: float
    num_evaluations: int
    num_sequences: int
    hypervolume_nats: float


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
    ratio = animal.true_loss(search.best) / animal.true_loss(animal.dp)
    notes = search.notes() if isinstance(search, Noting) else {}
    return Row(ratio, len(history), spent, notes.get("hypervolume_nats", float("nan")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=150, help="budget, in minibatches")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    options = parser.parse_args()
    kinds = {"windows": 32, "whole split": 8}
    print(f"{options.batches} minibatches, window {options.window}; loss relative to the DP plan")
    print("split        search              mean   +-95%   worst  evals  s/run  hypervolume")
    for split, num_sequences in kinds.items():
        animals = [
            make_animal(100 + problem, 8, num_sequences=num_sequences)
            for problem in range(options.problems)
        ]
        for name in options.searches:
            begin = time.perf_counter()
            rows = [
                run(name, animal, seed, num_sequences=8 * options.batches, window=options.window)
                for animal in animals
                for seed in range(options.seeds)
            ]
            seconds = (time.perf_counter() - begin) / len(rows)
            ratios = np.array([row.ratio for row in rows])
            half = 1.96 * ratios.std(ddof=1) / np.sqrt(len(ratios))
            volume = np.mean([row.hypervolume_nats for row in rows])
            evaluations = np.mean([row.num_evaluations for row in rows])
            print(
                f"{split:12} {name:16} {ratios.mean():7.3f} {half:7.3f} {ratios.max():7.3f} "
                f"{evaluations:6.0f} {seconds:6.2f} {volume:12.3f}".replace("nan", "  -")
            )


if __name__ == "__main__":
    main()

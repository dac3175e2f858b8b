"""How far tables are from losses measured one at a time, and where: between operators or within.

python tests/benchmarks/anchors/table_errors.py --space joint --model tests/assets/tiny_llama \\
    --text tests/assets/persuasion.txt --length 128
python tests/benchmarks/anchors/table_errors.py --space joint --cells 100
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from lab import SPACES, Lab, lab_parser

from objectives.evaluation import Fidelity
from objectives.sensitivity import SCORERS
from objectives.sensitivity.base import Cell
from search_spaces.operators import Keep

LEAST_NATS = 1e-5  # less is noise
NAMES = (
    "relative_error",
    "fisher",
    "output_gradient",
    "blend",
    "correlated_blend",
    "correlated_fisher",
)


def sampled(lab: Lab, count: int) -> list[Cell]:
    """Cells that lose something, so many at random; 0 for all."""
    cells = [
        (unit, place)
        for unit, menu in enumerate(lab.space.menus)
        for place, option in enumerate(menu)
        if not isinstance(option.operator, Keep)
    ]
    if not count:
        return cells
    chosen = np.random.default_rng(lab.seed).permutation(len(cells))[:count]
    return [cells[i] for i in sorted(chosen)]


def alone(lab: Lab, cells: Sequence[Cell], sequences: int) -> list[float]:
    """What each cell loses alone on so many search sequences, nats per token."""
    dense = tuple(len(menu) - 1 for menu in lab.space.menus)
    fidelity = Fidelity("search", 0, sequences)
    return [
        lab.bench.evaluator((*dense[:unit], option, *dense[unit + 1 :]), fidelity).loss_nats
        for unit, option in cells
    ]


def errors_by_operator(
    lab: Lab, scorer: str, cells: Sequence[Cell], truths: Sequence[float]
) -> dict[str, list[float]]:
    """Logarithms of measured over estimated loss, by operator."""
    found = defaultdict(list)
    guesses = SCORERS[scorer]().losses(lab.context(), cells)
    for (unit, option), truth, guess in zip(cells, truths, guesses, strict=True):
        if truth > LEAST_NATS and guess > 0:
            label = lab.space.menus[unit][option].operator.label
            found[label].append(float(np.log(truth / guess)))
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Print one line for each scorer."""
    parser = lab_parser(__doc__)
    parser.add_argument("--space", default="joint", choices=list(SPACES))
    parser.add_argument("--cells", type=int, default=0, help="measured, at random; 0: all")
    parser.add_argument("--sequences", type=int, default=8, help="on which each is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| scorer | seed | standard deviation of the log ratio | of operators' means | within |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for seed in options.seeds:
        lab = Lab(options, options.space, seed)
        cells = sampled(lab, options.cells)
        truths = alone(lab, cells, options.sequences)
        for scorer in NAMES:
            found = errors_by_operator(lab, scorer, cells, truths)
            every = np.concatenate(list(found.values()))
            means = np.concatenate([np.full(len(row), np.mean(row)) for row in found.values()])
            parts = (every, means, every - means)
            spreads = " | ".join(f"{part.std():.2f}" for part in parts)
            print(f"| {scorer} | {seed} | {spreads} |", flush=True)


if __name__ == "__main__":
    main()

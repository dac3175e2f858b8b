"""How far tables are from losses measured one at a time, and where: between operators or within.

python tests/benchmarks/anchors/table_errors.py --space joint --model tests/assets/tiny_llama \\
    --text tests/assets/persuasion.txt --length 128
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from lab import SPACES, Lab, lab_parser
from methods import table

SCORERS = ("relative_error", "fisher", "output_gradient", "blend", "correlated_blend")
LEAST_NATS = 1e-6  # less is noise


def errors_by_operator(lab: Lab, scorer: str) -> dict[str, list[float]]:
    """Logarithms of measured over estimated loss of all options, by operator."""
    measured, estimated = (lab.read(name, table)[0] for name in ("one_at_a_time", scorer))
    found = defaultdict(list)
    for menu, truths, guesses in zip(lab.space.menus, measured, estimated, strict=True):
        for option, truth, guess in zip(menu, truths, guesses, strict=True):
            if truth > LEAST_NATS and guess > 0:
                found[option.operator.label].append(float(np.log(truth / guess)))
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Print one line for each scorer."""
    parser = lab_parser(__doc__)
    parser.add_argument("--space", default="joint", choices=list(SPACES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| scorer | seed | standard deviation of the log ratio | of operators' means | within |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for seed in options.seeds:
        lab = Lab(options, options.space, seed)
        for scorer in SCORERS:
            found = errors_by_operator(lab, scorer)
            every = np.concatenate(list(found.values()))
            means = np.concatenate([np.full(len(row), np.mean(row)) for row in found.values()])
            parts = (every, means, every - means)
            spreads = " | ".join(f"{part.std():.2f}" for part in parts)
            print(f"| {scorer} | {seed} | {spreads} |", flush=True)


if __name__ == "__main__":
    main()

"""How well estimates foresee what one swap changes, around the plan where a search begins.

python tests/benchmarks/anchors/swaps.py [--budget '3 bit'] [--seed 0] [--units 40]

Around the solver's plan on the ``blend`` table, single units go one option down and one up; the
measured change of the loss is compared with the table's own difference, with the slopes alone, and
with the local table that ``model_guided`` decodes (slopes on other text than the measurements).
Prints rank correlations, and what all of it cost in tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from lab import SPACES, Lab, lab_parser
from scipy.stats import spearmanr

from allocator.searches.local_table import LocalTable
from objectives.evaluation import Fidelity


def main() -> None:
    parser = lab_parser(__doc__)
    parser.add_argument("--space", choices=list(SPACES), default="bits")
    parser.add_argument("--budget", default="3 bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--measured", type=int, default=8, help="sequences of a swap")
    parser.set_defaults(threads=1, heldout=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lab = Lab(options, options.space, options.seed)
    setting = lab.setting(lab.budgets[options.budget], "blend")
    centre, evaluate = setting.starts[0], lab.bench.evaluator
    text = Fidelity("search", 0, options.measured)
    base = np.array(evaluate(centre, text).sequence_nats)
    rng = np.random.default_rng(options.seed)
    swaps = [
        (int(unit), option)
        for unit in rng.permutation(len(centre))[: options.units]
        for option in (centre[unit] - 1, centre[unit] + 1)
        if 0 <= option < len(setting.problem.losses[unit])
    ]
    changes = np.array(
        [
            np.array(evaluate((*centre[:u], o, *centre[u + 1 :]), text).sequence_nats) - base
            for u, o in swaps
        ]
    )
    errors = changes.std(axis=1, ddof=1) / options.measured**0.5
    print(
        f"{len(swaps)} swaps on {text.count} sequences each, mean standard error "
        f"{errors.mean():.4f} nats\n"
    )
    table = setting.problem.losses
    estimates = {"blend table": [row - row[i] for row, i in zip(table, centre, strict=True)]}
    for count in (4, 16):
        slopes = evaluate(centre, Fidelity("search", 32, count, slopes=True))
        alone, local = LocalTable(setting.problem, trust=0.0), LocalTable(setting.problem)
        alone.tell(slopes)
        local.tell(slopes)
        estimates[f"slopes, {count} sequences"] = alone.changes(damping=0.0)
        estimates[f"local table, {count} sequences"] = local.changes()
    print("| estimate | all swaps | down | up |\n| --- | ---: | ---: | ---: |")
    down = np.array([option < centre[unit] for unit, option in swaps])
    measured = changes.mean(axis=1)
    for name, rows in estimates.items():
        values = np.array([rows[unit][option] for unit, option in swaps])
        found = [
            spearmanr(values[chosen], measured[chosen]).statistic
            for chosen in (down | True, down, ~down)
        ]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in found) + " |")


if __name__ == "__main__":
    main()

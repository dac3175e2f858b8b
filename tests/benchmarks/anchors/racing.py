"""What racing saves: sequences of candidates in the descent of ``model_guided``, and its outcome.

python tests/benchmarks/anchors/racing.py [--budget '3 bit'] [--seeds 0 1] [--sequences 16]

Each seed's search is run twice at equal tokens: with every candidate read on all sequences of its
step, and with races. Of the first one's candidates the losses are recorded, and judged again as a
race would: how many sequences it would have read, and how often it would have decided otherwise.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from lab import SPACES, Lab, lab_parser
from methods import Searched

from allocator.searches import descent
from allocator.searches.model_guided import ModelGuided
from allocator.searches.racing import Verdict, judge

NEVER = 0.0
"""Level at which no race is called before its text ends."""


def search(lab, budget, options):
    """Held-out nats of a search, and the last losses of every candidate: (ours, theirs)."""
    races = []

    def recorded(ours, theirs, level):
        if races and ours[: len(races[-1][0])] == races[-1][0]:
            races.pop()  # the same race, one rung further
        races.append((ours, theirs))
        return judge(ours, theirs, level)

    method = Searched(
        lambda setting, batches: ModelGuided(setting, options),
        prior="blend",
        sequences=ModelGuided.preferred_sequences,
    )
    with patch.object(descent, "judge", recorded):
        best = lab.run_search(method, budget)[-1][1]
    return lab.heldout(best).loss_nats, races


def replay(ours, theirs, rung, level):
    """Sequences that a race reads, and whether it decides as all of the text does."""
    better = np.mean(ours) < np.mean(theirs)
    for read in range(rung, len(ours), rung):
        verdict = judge(ours[:read], theirs[:read], level)
        if verdict is not Verdict.OPEN:
            return read, (verdict is Verdict.BETTER) == better
    return len(ours), True


def main() -> None:
    parser = lab_parser(__doc__)
    parser.add_argument("--space", choices=list(SPACES), default="bits")
    parser.add_argument("--budget", default="3 bit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--sequences", type=int, default=16, help="of a step")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    raced = descent.DescentOptions(
        first_sequences=options.sequences, most_sequences=options.sequences
    )
    whole = descent.DescentOptions(
        first_sequences=options.sequences, most_sequences=options.sequences, level=NEVER
    )
    print(
        "| seed | candidates | sequences, whole | raced | decided otherwise | held-out nats, whole "
        "| raced | candidates, raced |\n|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for seed in options.seeds:
        lab = Lab(options, options.space, seed)
        budget = lab.budgets[options.budget]
        without, races = search(lab, budget, whole)
        found = [replay(*race, raced.rung_sequences, raced.level) for race in races]
        within, again = search(lab, budget, raced)
        print(
            f"| {seed} | {len(races)} | {sum(len(ours) for ours, _ in races)} "
            f"| {sum(read for read, _ in found)} | {sum(not same for _, same in found)} "
            f"| {without:.4f} | {within:.4f} | {len(again)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

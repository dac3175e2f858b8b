"""What compressing costs: all options of a matrix in a row, against each with everything made anew.

Prints a Markdown table of medians and least times in milliseconds of the processor (wall time where
there is a GPU).
Both sides are measured in turn in this process and must give equal weights. The baseline factors
the Hessian for every option, as an operator that is asked alone does; the last row selects a row's
highest scores with ``torch.kthvalue``. Not run by default:

    python tests/benchmarks/compressing.py [--rounds 5] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from timing import clock
from torch import Tensor

from search_spaces.operators import GPTQ, Operator, SparseGPT, Statistics
from search_spaces.operators.hessian import FACTORS
from search_spaces.operators.prune import keep_highest

SHAPES = ((576, 576), (1536, 576), (576, 1536))
MENUS: dict[str, tuple[Operator, ...]] = {
    "GPTQ, 2 to 6 bits": tuple(GPTQ(bits, act_order=True) for bits in (2, 3, 4, 5, 6)),
    "SparseGPT, 30 to 80 %": tuple(SparseGPT(share / 10) for share in range(3, 9)),
}
Made = list[Tensor]


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Made], Callable[[], Made]]]:
    """(name, ours, baseline)."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(device)
        inputs = torch.randn(4 * columns, columns, generator=generator)
        inputs = inputs @ torch.randn(columns, columns, generator=generator) / columns**0.5
        stats = Statistics(hessian=(inputs.T @ inputs / len(inputs)).to(device))
        for name, menu in MENUS.items():

            def ours(menu=menu, weight=weight, stats=stats) -> Made:
                return [operator.apply(weight, stats) for operator in menu]

            def alone(menu=menu, weight=weight, stats=stats) -> Made:
                made = []
                for operator in menu:
                    FACTORS.forget()
                    made.append(operator.apply(weight, stats))
                return made

            yield f"{rows} x {columns}, {name}", ours, alone
    scores = torch.rand(1536, 576, generator=generator).to(device)
    num_kept = scores.shape[1] // 2

    def select() -> Made:
        return [keep_highest(scores, num_kept)]

    def kthvalue() -> Made:
        return [scores >= scores.kthvalue(scores.shape[1] - num_kept + 1, 1, keepdim=True).values]

    yield "1536 x 576, the higher half of each row", select, kthvalue


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print("| all options of a matrix | ms | least | baseline, ms | least | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, ours, baseline in cases(device):
        pairs = zip(ours(), baseline(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{name}: other weights"
        times: tuple[list[float], list[float]] = [], []
        for _ in range(options.rounds):
            for side, call in zip(times, (ours, baseline), strict=True):
                FACTORS.forget()
                started = clock()
                call()
                side.append(1e3 * (clock() - started))
        (mine, least), (other, other_least) = ((statistics.median(s), min(s)) for s in times)
        print(
            f"| {name} | {mine:.0f} | {least:.0f} | {other:.0f} | {other_least:.0f} "
            f"| {other / mine:.2f} |"
        )


if __name__ == "__main__":
    main()

"""What measuring costs: prefix reuse against full forwards, the head, the teacher cache, batching.

Every line is a ratio of two medians taken in this run, alternating, of processor seconds on a CPU
and wall seconds on a GPU. Losses of both sides of the first part are compared and must be equal.

    python tests/benchmarks/measuring.py [--model smollm2-135m] [--parts prefix speed teacher batch]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import numpy as np
import torch
from timing import clock

from allocator.bench import Bench
from allocator.budget import resolve_budget
from allocator.executors import InProcess
from allocator.loop import Limits, run_search
from allocator.pipeline import additive_problem
from allocator.searches import SEARCHES
from allocator.searches.base import SearchSetting
from allocator.solvers.dynamic import DynamicProgram
from objectives.calibration import CalibrationRequest, build_calibration
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.prefix import find_blocks
from objectives.sensitivity import LossTable
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space

LENGTH, BATCH = 256, 4
NUM_BATCHED, ROUNDS = 8, 5
WINDOW = Fidelity("search", 0, BATCH)


def seconds(call) -> float:
    """Of one call."""
    started = clock()
    call()
    return clock() - started


def alternating(first, second, rounds: int = 5) -> tuple[float, float]:
    """Medians of both, taken in turn, so that a noisy neighbour meets both."""
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


class Lab:
    """The model on the bench, and evaluators with and without reuse."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.count = options.count
        self.loaded = load_model(options.model, dtype=options.dtype, device=options.device)
        request = CalibrationRequest(
            options.text,
            sequence_length=LENGTH,
            num_statistics=1,
            num_search=16,
            num_guard=1,
            num_heldout=1,
        )
        self.text = build_calibration(request, self.loaded.tokenizer)
        self.space = build_space(self.loaded.model, SpaceRequest(space="bits"))
        self.bench = Bench.build(self.loaded.model, LanguageTask(self.text), self.space)
        self.reusing = self.bench.evaluator
        self.plain = Evaluator(
            self.loaded.model,
            self.bench.task,
            self.bench.bank,
            TokenMeter(len(find_blocks(self.loaded.model, self.space))),
            prefix_bytes=0,
        )
        self.reusing.prepare("search")
        self.plain.prepare("search")
        self.num_blocks = len(find_blocks(self.loaded.model, self.space))

    def stream(self, name: str, count: int) -> list:
        """Of a real search's first proposals at 3 bits those without slopes, and their windows."""
        budget = resolve_budget("3.25bpw", self.space)
        rows = tuple(
            np.array([2.0 ** -(2 * option.bytes * 8 / unit.num_weights) for option in menu])
            for unit, menu in zip(self.space.units, self.space.menus, strict=True)
        )
        problem = additive_problem(self.space, LossTable("prior", "nats", rows), budget)
        uniform = self.space.uniform(budget.searched_bytes)
        setting = SearchSetting(
            problem=problem,
            starts=(DynamicProgram().solve(problem).choice, uniform),
            depths=tuple(-1 if unit.depth is None else unit.depth for unit in self.space.units),
            kinds=tuple(unit.kind for unit in self.space.units),
            num_sequences=16,
            batch_sequences=BATCH,
            seed=0,
            slopes=True,
        )
        executor = InProcess(lambda: self.reusing)
        limits = Limits(window=16, tokens_per_sequence=LENGTH, trials=count)
        history = run_search(
            SEARCHES[name](setting),
            executor,
            limits=limits,
            cache={},
            record=lambda evaluation: None,
            progress=lambda state: None,
        )
        return [(e.assignment, e.fidelity) for e in history.evaluations if e.slopes is None]

    def replay(self, evaluator, stream, *, ordered: bool) -> tuple[float, list]:
        """Measure a stream, sixteen at a time in an executor's order, or as it comes; timed."""
        started, found = clock(), {}
        for begin in range(0, len(stream), 16):
            part = stream[begin : begin + 16]
            for assignment, fidelity in sorted(part, key=lambda p: p[::-1]) if ordered else part:
                found[assignment, fidelity] = evaluator(assignment, fidelity)
        return clock() - started, [found[job] for job in stream]


def prefix(lab: Lab) -> None:
    """Reuse against full forwards, equal numbers required."""
    uniform = lab.space.uniform(resolve_budget("3.25bpw", lab.space).searched_bytes)
    rng = np.random.default_rng(0)
    singles = []
    for depth in range(lab.num_blocks):  # one swap in each block: uniform over depth
        units = [i for i, unit in enumerate(lab.space.units) if unit.depth == depth]
        unit = int(rng.choice(units))
        singles.append(((*uniform[:unit], uniform[unit] + 1, *uniform[unit + 1 :]), WINDOW))
    rng.shuffle(singles)
    streams = {"single swaps, uniform over depth": [(tuple(a), f) for a, f in singles]}
    streams |= {name: lab.stream(name, lab.count) for name in ("evolution", "model_guided")}
    print("| candidates | order | blocks run | speed-up |\n| --- | --- | ---: | ---: |")
    for name, stream in streams.items():
        for ordered in (False, True):
            lab.reusing._prefix._boundaries.clear()
            lab.reusing(uniform, WINDOW)  # the incumbent is known, as in a search
            fast, ours = lab.replay(lab.reusing, stream, ordered=ordered)
            slow, theirs = lab.replay(lab.plain, stream, ordered=ordered)
            assert ours == theirs, "reuse changed a number"
            run = sum(e.num_block_tokens for e in ours) / sum(e.num_block_tokens for e in theirs)
            order = "trie" if ordered else "as asked"
            print(f"| {name} | {order} | {run:.1%} | {slow / fast:.2f} |", flush=True)


def speed(lab: Lab) -> None:
    """Tokens a second of a whole evaluation against the model's own plain forward."""
    tokens = lab.text.splits["search"][:BATCH].to(next(lab.loaded.model.parameters()).device)
    uniform = lab.space.uniform(resolve_budget("3.25bpw", lab.space).searched_bytes)

    def forward() -> None:
        with torch.inference_mode():
            lab.loaded.model(input_ids=tokens, use_cache=False)

    ours, own = alternating(lambda: lab.plain(uniform, WINDOW), forward, rounds=9)
    count = BATCH * LENGTH
    print(
        f"evaluation {count / ours:,.0f} tokens/s, plain forward {count / own:,.0f}: "
        f"{own / ours:.2f} of it (blocks, head, KL and cross-entropy)"
    )


def teacher(lab: Lab) -> None:
    """What lumping the tail of the vocabulary loses of the KL, and what is kept."""
    full = LanguageTask(lab.text, top_k=0)
    lab.bench.bank.restore()
    full.prepare(lab.loaded.model, "search")
    print("| k | bytes per token | 2 bits | 3 bits | 4 bits |\n" + "| ---: " * 5 + "|")
    words = ("2.25bpw", "3.25bpw", "4.25bpw")
    plans = [lab.space.uniform(resolve_budget(w, lab.space).searched_bytes) for w in words]
    reference = []
    for plan in plans:
        lab.bench.bank.swap(plan)
        losses = full.sequence_losses(lab.loaded.model, "search", range(BATCH))
        reference.append(np.mean(losses.nats))
    for k in (64, 256, 1024, 2048):
        task = LanguageTask(lab.text, top_k=k)
        lab.bench.bank.restore()
        task.prepare(lab.loaded.model, "search")
        cells = []
        for plan, whole in zip(plans, reference, strict=True):
            lab.bench.bank.swap(plan)
            kl = np.mean(task.sequence_losses(lab.loaded.model, "search", range(BATCH)).nats)
            cells.append(f"{(whole - kl) / whole:.2%}")
        print(f"| {k} | {8 * k:,} | " + " | ".join(cells) + " |")
    print("full KL: " + ", ".join(f"{value:.4g}" for value in reference) + " nats")


def batch(lab: Lab) -> None:
    """What several candidates in one pass could gain at most: the same work in larger batches.

    Candidates that differ in one unit share all weights after it, so that their states could run
    together from there on. Here everything does, the differing unit's block included, from the
    first block on: what a candidate batch gains is less.
    """
    model, task = lab.loaded.model, lab.bench.task
    tokens = lab.text.splits["search"][:NUM_BATCHED].to(next(model.parameters()).device)
    lab.bench.bank.restore()

    def blocks(rows: int) -> None:
        with torch.inference_mode():
            for part in torch.split(tokens, rows):
                model.base_model(input_ids=part, use_cache=False)

    def whole(rows: int) -> None:
        task._batch_size = rows
        task.sequence_losses(model, "search", range(NUM_BATCHED))

    print("| | sequences of a candidate | candidates in one pass | speed-up at most |")
    print("| --- | ---: | ---: | ---: |")
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= NUM_BATCHED]
    for name, run in (("blocks", blocks), ("whole evaluation", whole)):
        run(BATCH)
        rounds = [[seconds(partial(run, rows)) for rows in sizes] for _ in range(ROUNDS)]
        times = dict(zip(sizes, map(statistics.median, zip(*rounds, strict=True)), strict=True))
        for own in (1, 2, 4):
            for rows in (size for size in sizes if size > own):
                ratio = times[own] / times[rows]
                print(f"| {name} | {own} | {rows // own} | {ratio:.2f} |", flush=True)


PARTS = {"prefix": prefix, "speed": speed, "teacher": teacher, "batch": batch}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="wiki-summaries")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=48, help="candidates of a search's stream")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lab = Lab(options)
    for part in options.parts:
        print(f"\n## {part}\n")
        PARTS[part](lab)


if __name__ == "__main__":
    main()

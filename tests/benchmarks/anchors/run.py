"""Published allocation methods and ours on one bank: held-out KL at equal bytes and equal tokens.

python tests/benchmarks/anchors/run.py --folder runs/anchors --seeds 0 1 2 3 4 --tokens 60000
python tests/benchmarks/anchors/run.py --profile small   # 30 minutes on two cores
python tests/benchmarks/anchors/run.py --table        # only the table of what is there
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from methods import DEAR, ON_REQUEST, OneShot, Searched, one_shots, searches, table
from summary import write_summary

from allocator.bench import Bench
from allocator.budget import resolve_budget
from allocator.executors import InProcess
from allocator.loop import Limits, run_search
from allocator.pipeline import additive_problem
from allocator.searches.base import SearchSetting
from allocator.searches.repair import fill_budget
from allocator.solvers.dynamic import DynamicProgram
from objectives.calibration import CalibrationRequest, build_calibration
from objectives.evaluation import Fidelity
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.sensitivity import LossTable, ScoringContext
from search_spaces.build import SpaceRequest, build_space

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
BITS = {"2.25 bit": "2.5bpw", "2.5 bit": "2.75bpw", "3 bit": "3.25bpw", "4 bit": "4.25bpw"}
# space -> (preset, budgets: a scale for each group of 64 weights, or a bitmap, comes on top)
SPACES = {
    "bits": ("bits", BITS),
    "bits-g32": (
        "bits-g32",
        {"2.25 bit": "2.75bpw", "2.5 bit": "3bpw", "3 bit": "3.5bpw", "4 bit": "4.5bpw"},
    ),
    "gptq": ("bits-gptq", BITS),
    "sparsity": ("sparsity-gpt", {"50 %": "9bpw", "60 %": "7.4bpw", "70 %": "5.8bpw"}),
    "joint": ("joint", {"2.5 bit": "2.75bpw", "3 bit": "3.25bpw"}),
}
# What ends in half an hour on two cores: the cell in which published methods claim most.
SMALL = {"budgets": ["3 bit"], "seeds": [0, 1, 2], "tokens": 30_000}


class Lab:
    """One seed: its text, bank and tables; everything the methods share."""

    def __init__(self, options: argparse.Namespace, space: str, seed: int) -> None:
        self.options, self.kind, self.seed = options, space, seed
        preset, self.budgets = SPACES[space]
        loaded = load_model(options.model, dtype=options.dtype, device=options.device)
        request = CalibrationRequest(
            options.text,
            sequence_length=options.length,
            num_statistics=options.statistics,
            num_search=options.search,
            num_guard=1,
            num_heldout=options.heldout,
            seed=seed,
        )
        task = LanguageTask(build_calibration(request, loaded.tokenizer))
        self.space = build_space(loaded.model, SpaceRequest(space=preset))
        self.bench = Bench.build(loaded.model, task, self.space)
        self.bench.observe()
        for split in ("search", "heldout"):
            self.bench.evaluator.prepare(split)
        self._tables: dict[str, tuple] = {}
        self._costs: dict[str, int] = {}
        self._statistics = None
        self._known: dict = {}

    def context(self) -> ScoringContext:
        """What scorers look at."""
        if self._statistics is None:
            self._statistics = self.bench.observe({"fisher", "second_moment"})
        bench = self.bench
        return ScoringContext(
            space=self.space,
            bank=bench.bank,
            statistics=self._statistics,
            model=bench.model,
            task=bench.task,
            meter=bench.meter,
            evaluator=bench.evaluator,
            seed=self.seed,
        )

    def table(self, scorer: str) -> tuple:
        """A scorer's table, and what it cost in tokens, statistics of its own included."""
        if scorer not in self._tables:
            context = self.context()
            before = sum(self.bench.meter.counts.values())
            self._tables[scorer] = table(context, scorer)
            own = sum(self.bench.meter.counts.values()) - before
            passes = {"blend": 3, "fisher": 3, "reconstruction": 1}.get(scorer, 0)
            self._costs[scorer] = own + passes * self.options.statistics * self.options.length
        return self._tables[scorer]

    def cost(self, scorer: str) -> int:
        """Tokens that a table cost."""
        return self._costs.get(scorer, 0)

    def setting(self, budget: str, prior: str) -> SearchSetting:
        """Where a search starts: from the prior's optimum and uniform, or from uniform alone.

        Where no uniform option fills the budget, searches that start from it alone would never use
        the rest: random upgrades fill it for them.
        """
        resolved = resolve_budget(budget, self.space)
        uniform = self.space.uniform(resolved.searched_bytes)
        losses = self.table(prior or "relative_error")
        problem = additive_problem(self.space, LossTable("prior", "nats", losses), resolved)
        rng = np.random.default_rng(self.seed)
        first = (
            DynamicProgram().solve(problem).choice if prior else fill_budget(problem, uniform, rng)
        )
        return SearchSetting(
            problem=problem,
            starts=tuple(dict.fromkeys([first, uniform])),
            depths=tuple(-1 if unit.depth is None else unit.depth for unit in self.space.units),
            kinds=tuple(unit.kind for unit in self.space.units),
            num_sequences=self.options.search,
            batch_sequences=4,
            seed=self.seed,
            slopes=True,
        )

    def heldout(self, assignment) -> tuple[float, ...]:
        """Held-out loss of each sequence, nats per token."""
        if assignment not in self._known:
            fidelity = Fidelity("heldout", 0, self.options.heldout)
            self._known[assignment] = self.bench.evaluator(assignment, fidelity).sequence_nats
        return self._known[assignment]

    def run_search(self, method: Searched, budget: str) -> list[tuple[int, tuple]]:
        """(tokens spent, best then) at each fraction of the tokens."""
        setting = replace(self.setting(budget, method.prior), batch_sequences=method.sequences)
        spent = self.cost(method.prior) if method.prior else 0
        tokens = method.multiple * self.options.tokens
        left = tokens - spent
        batch = setting.batch_sequences * self.options.length
        search = method.make(setting, left // batch)
        # before its statistics are read a method has no plan
        marks = [mark for f in FRACTIONS[:-1] if (mark := f * tokens) >= spent]
        points: list[tuple[int, tuple]] = []

        def progress(state) -> None:
            while marks and spent + state.num_tokens >= marks[0]:
                points.append((round(marks.pop(0)), search.best))

        limits = Limits(window=4, tokens_per_sequence=self.options.length, tokens=left)
        executor = InProcess(lambda: self.bench.evaluator)
        run_search(
            search, executor, limits=limits, cache={}, record=lambda e: None, progress=progress
        )
        return [*points, (tokens, search.best)]


def jobs(options: argparse.Namespace, space: str):
    """(budget, method name, method), the cheap ones first."""
    kind = "sparsity" if space == "sparsity" else "bits"
    found = {"uniform": None, **one_shots(kind), **searches(kind, options.length)}
    hidden = {*ON_REQUEST, *(DEAR if options.profile == "small" else ())}
    for budget in options.budgets or SPACES[space][1]:
        for name, method in found.items():
            if name in options.methods or not (options.methods or name in hidden):
                yield budget, name, method


def run(options: argparse.Namespace, space: str, seed: int) -> None:
    """Every job of one seed that has no result yet."""
    path = options.folder / f"{space}-seed{seed}.jsonl"
    done = set()
    if path.exists():
        done = {(r["budget"], r["method"]) for r in map(json.loads, path.open())}
    todo = [job for job in jobs(options, space) if job[:2] not in done]
    if not todo:
        return
    lab = Lab(options, space, seed)
    for budget, name, method in todo:
        started = time.monotonic()
        setting = lab.setting(lab.budgets[budget], "")
        feasible = "B"
        if method is None:
            points = [(0, setting.starts[-1])]
        elif isinstance(method, OneShot):
            lab.table(method.scorer) if method.rule != "published" else None
            points = [(lab.cost(method.scorer), method.plan(lab.context(), setting))]
        else:
            feasible = method.feasible
            points = lab.run_search(method, lab.budgets[budget])
        result = {
            "space": space,
            "budget": budget,
            "method": name,
            "feasible": feasible,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 1),
            "points": [
                {
                    "tokens": tokens,
                    "bytes": setting.problem.total_bytes(assignment),
                    "heldout": lab.heldout(assignment),
                }
                for tokens, assignment in points
                if assignment is not None
            ],
        }
        assert all(p["bytes"] <= setting.problem.budget_bytes for p in result["points"])
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        last = result["points"][-1]
        mean = sum(last["heldout"]) / len(last["heldout"])
        print(f"{space} {budget} seed {seed} {name}: {mean:.4f}", flush=True)


def lab_parser(doc: str) -> argparse.ArgumentParser:
    """The options of every :class:`Lab`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-rescaled")
    parser.add_argument("--text", default="wiki-summaries")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--statistics", type=int, default=16, help="sequences")
    parser.add_argument("--search", type=int, default=64, help="sequences")
    parser.add_argument("--heldout", type=int, default=16, help="sequences")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    return parser


def main() -> None:
    """Run what is missing and write the table."""
    parser = lab_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/anchors"))
    parser.add_argument("--profile", choices=["full", "small"], default="full")
    parser.add_argument("--spaces", nargs="+", default=["bits"], choices=list(SPACES))
    parser.add_argument("--budgets", nargs="+", default=[], help="such as '3 bit'; default all")
    parser.add_argument("--methods", nargs="+", default=[], help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=60_000, help="of every method")
    parser.add_argument("--table", action="store_true", help="run nothing")
    if parser.parse_known_args()[0].profile == "small":
        parser.set_defaults(**SMALL)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.table:
        for space in options.spaces:
            for seed in options.seeds:
                run(options, space, seed)
    write_summary(options.folder)


if __name__ == "__main__":
    main()

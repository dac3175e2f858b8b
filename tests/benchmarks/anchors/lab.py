"""What all methods of one seed share: the text, the bank, the tables, and what was measured."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from charges import charged
from methods import OneShot, Searched, table

from allocator.bench import Bench
from allocator.budget import resolve_budget
from allocator.config import DEFAULT_SCORER
from allocator.executors import InProcess
from allocator.loop import Limits, run_search
from allocator.pipeline import additive_problem
from allocator.searches.base import Search, SearchSetting
from allocator.searches.repair import fill_budget
from allocator.solvers.dynamic import DynamicProgram
from objectives.calibration import CalibrationRequest, build_calibration
from objectives.evaluation import Evaluation, Fidelity
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.sensitivity import SCORERS, LossTable, ScoringContext
from objectives.statistics_file import FILE_NAME, StatisticsFile
from search_spaces.build import SpaceRequest, build_space
from search_spaces.space import Assignment

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


class CannotStartError(ValueError):
    """A method has no first step with these tokens, or in this space."""


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
        # in a folder the bank keeps in files what is dear to make and beyond its memory
        folder = Path(tempfile.mkdtemp(prefix="anchors-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        kept = StatisticsFile(folder / FILE_NAME, identity=f"{space} seed {seed}")
        self.bench = Bench.build(loaded.model, task, self.space, kept=kept)
        self.bench.observe()
        for split in ("search", "heldout"):
            self.bench.evaluator.prepare(split)
        self._read: dict[tuple[str, str], tuple] = {}
        self._statistics = None
        self._known: dict[Assignment, Evaluation] = {}

    def context(self) -> ScoringContext:
        """What scorers look at."""
        if self._statistics is None:
            needs = SCORERS[DEFAULT_SCORER]().needs_for(self.space)
            self._statistics = self.bench.observe(needs | {"fisher", "second_moment"})
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

    def read(self, scorer: str, read=table) -> tuple:
        """What ``read`` makes of a scorer, and what that alone would have cost in tokens."""
        key = scorer, read.__name__
        if key not in self._read:
            self._read[key] = charged(self.context(), scorer, read)
        return self._read[key]

    def setting(self, budget: str, prior: str, others: Collection[str] = ()) -> SearchSetting:
        """Where a search starts: from the tables' optima and uniform, or from uniform alone.

        Where no uniform option fills the budget, searches that start from it alone would never use
        the rest: random upgrades fill it for them.
        """
        resolved = resolve_budget(budget, self.space)
        uniform = self.space.uniform(resolved.searched_bytes)
        losses, _ = self.read(prior or "relative_error")
        problem = additive_problem(self.space, LossTable("prior", "nats", losses), resolved)
        rng = np.random.default_rng(self.seed)
        first = (
            DynamicProgram().solve(problem).choice if prior else fill_budget(problem, uniform, rng)
        )
        tables = tuple(self.read(name)[0] for name in others)
        plans = [DynamicProgram().solve(replace(problem, losses=t)).choice for t in tables]
        return SearchSetting(
            problem=problem,
            starts=tuple(dict.fromkeys([first, uniform, *plans])),
            labels=self.space.labels,
            tables=tables,
            depths=tuple(-1 if unit.depth is None else unit.depth for unit in self.space.units),
            kinds=tuple(unit.kind for unit in self.space.units),
            num_sequences=self.options.search,
            batch_sequences=4,
            seed=self.seed,
            slopes=True,
        )

    def heldout(self, assignment: Assignment) -> Evaluation:
        """What a plan loses on held-out text."""
        if assignment not in self._known:
            fidelity = Fidelity("heldout", 0, self.options.heldout)
            self._known[assignment] = self.bench.evaluator(assignment, fidelity)
        return self._known[assignment]

    def point(self, tokens: int, assignment: Assignment) -> dict[str, Any]:
        """A plan and what it cost and loses, for the results.

        ``heldout`` and ``cross_entropy`` are of each held-out sequence, in nats per token;
        ``plan`` is the place of each unit's option in its menu.
        """
        found = self.heldout(assignment)
        return {
            "tokens": tokens,
            "bytes": self.space.bytes(assignment),
            "heldout": found.sequence_nats,
            "cross_entropy": found.sequence_cross_entropy_nats,
            "plan": assignment,
        }

    def one_shot(self, method: OneShot, setting: SearchSetting) -> tuple[int, Assignment]:
        """(tokens read, plan)."""
        scores, tokens = self.read(method.scorer, method.reads)
        return tokens, method.plan(scores, setting, self.space)

    def run_search(self, method: Searched, budget: str) -> list[tuple[int, Assignment]]:
        """(tokens spent, best then) at each fraction of the tokens.

        A search that has measured nothing yet stands at its first start.

        Raises:
            CannotStartError: It cannot begin with so few tokens, or not in this space.
        """
        setting = self.setting(budget, method.prior, method.others)
        setting = replace(setting, batch_sequences=method.sequences)
        spent = self.read(method.prior)[1] if method.prior else 0
        tokens = method.multiple * self.options.tokens
        search = self._start(method, setting, tokens - spent)
        # before its statistics are read a method has no plan
        marks = [mark for f in FRACTIONS if (mark := f * tokens) >= spent]
        points: list[tuple[int, Assignment]] = []

        def note() -> None:
            points.append((round(marks.pop(0)), search.best or setting.starts[0]))

        def progress(state) -> None:
            while len(marks) > 1 and spent + state.num_tokens >= marks[0]:
                note()

        limits = Limits(window=4, tokens_per_sequence=self.options.length, tokens=tokens - spent)
        executor = InProcess(lambda: self.bench.evaluator)
        run_search(
            search, executor, limits=limits, cache={}, record=lambda e: None, progress=progress
        )
        while marks:
            note()
        return points

    def _start(self, method: Searched, setting: SearchSetting, tokens: int) -> Search:
        """The search, with so many tokens left for it."""
        batch = setting.batch_sequences * self.options.length
        if tokens < batch:
            raise CannotStartError(
                f"{max(tokens, 0):,} tokens, after its statistics, do not hold one measurement of "
                f"{batch:,}: allow more tokens"
            )
        try:
            return method.make(setting, tokens // batch)
        except ValueError as error:
            raise CannotStartError(str(error)) from error


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

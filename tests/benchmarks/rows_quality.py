"""What rows of unequal length are worth: held-out KL on a real model at equal stored bytes.

Prints a Markdown table. Not run by default; about half an hour on two cores as it stands:

    python tests/benchmarks/rows_quality.py [--model smollm2-135m] [--sparsities 0.5 0.6 0.7 0.8]

At each sparsity every plan stores at most the bytes of pruning all rows of all matrices alike with
Wanda's score (``uniform``). ``water`` and ``trim`` divide each matrix's weights among its own rows.
``joint`` gives all rows of all matrices one multiplier; every row keeps at least 5 % of its
weights, or with ``half`` at least half of what uniform rows keep. Losses are KL to the dense model
in nats per token; beside them the difference to ``uniform wanda``, paired by sequence. Both come
with standard errors.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from allocator.row_allocation import RowCurves, allocate_rows
from objectives.calibration import CalibrationRequest, build_calibration
from objectives.evaluation import mean, standard_error
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.statistics import collect_statistics
from objectives.task import TokenMeter
from search_spaces.models import discover
from search_spaces.operators import Keep, Prune, RowPrune
from search_spaces.operators.members import logical, physical
from search_spaces.operators.row_prune import kept_counts, row_losses, weight_losses
from search_spaces.space import SearchSpace, build_menu

NUM_SHARES = 24


class Rows:
    """A model whose matrices are pruned and restored."""

    def __init__(self, options):
        loaded = load_model(options.model)
        self.model = loaded.model
        request = CalibrationRequest(
            options.text,
            sequence_length=options.length,
            num_statistics=options.statistics,
            num_search=1,
            num_guard=1,
            num_heldout=options.heldout,
        )
        self.task = LanguageTask(build_calibration(request, loaded.tokenizer))
        found = discover(self.model)
        menus = tuple(build_menu(unit, [Keep()]) for unit in found.units)
        space = SearchSpace("rows", found.units, menus, found.fixed)
        self.members = [member for unit in space.units for member in unit.members]
        self.stats = collect_statistics(
            self.model,
            self.task,
            space,
            needs={"second_moment", "hessian", "fisher"},
            meter=TokenMeter(),
        )
        self.task.prepare(self.model, "heldout")
        self.parameters = [self.model.get_parameter(member.name) for member in self.members]
        self.dense = [parameter.data for parameter in self.parameters]

    def weights(self):
        """For each matrix its member, float32 weight and statistics."""
        for member, dense in zip(self.members, self.dense, strict=True):
            yield member, logical(dense, member)[0].float(), self.stats[member.name]

    def bytes(self, operators):
        pairs = zip(operators, self.members, strict=True)
        return sum(operator.bytes(member.matrix_shape) for operator, member in pairs)

    def measure(self, operators):
        """Held-out nats of each sequence under one operator per matrix."""
        made = zip(operators, self.weights(), self.parameters, strict=True)
        for operator, (member, weight, stats), parameter in made:
            pruned = operator.apply(weight, stats).to(parameter.dtype)
            parameter.data = physical(pruned[None], member)
        losses = self.task.sequence_losses(
            self.model, "heldout", range(self.task.num_sequences("heldout"))
        )
        for parameter, dense in zip(self.parameters, self.dense, strict=True):
            parameter.data = dense
        return np.array(losses.nats)

    def joint(self, score, floor, budget_bytes):
        """One multiplier for all rows of all matrices."""
        shares = np.linspace(floor, 1.0, NUM_SHARES).tolist()
        curves = []
        for member, weight, stats in self.weights():
            losses = weight_losses(score, weight, stats)
            curve = row_losses(losses, kept_counts(weight.shape[1], shares)).numpy()
            curves.append(RowCurves(member.name, member.matrix_shape, curve))
        rule = RowPrune(0.0, score=score)
        return list(allocate_rows(curves, shares, budget_bytes=budget_bytes, rule=rule).operators)


def plans(rows, sparsity):
    """(name, makes one operator per matrix); the first is what all must match."""
    uniform = [Prune(sparsity, "wanda")] * len(rows.members)
    # As many weights of each matrix as rounding left uniform rows, which is not quite the share.
    kept = [uniform[0].num_kept(member.matrix_shape) for member in rows.members]
    budget = rows.bytes(uniform)

    def divided(split, score):
        rule = RowPrune(sparsity, split, score)
        return lambda: [replace(rule, keep_exactly=number) for number in kept]

    yield "uniform wanda", lambda: uniform
    yield "uniform fisher", lambda: [Prune(sparsity, "fisher")] * len(rows.members)
    for score in ("wanda", "fisher", "factored_fisher"):
        yield f"water {score}", divided("water", score)
    yield "trim wanda", divided("trim", "wanda")
    for score in ("wanda", "fisher", "factored_fisher"):
        yield f"joint {score}", partial(rows.joint, score, 0.05, budget)
    for score in ("fisher", "factored_fisher"):
        yield f"joint {score} half", partial(rows.joint, score, (1 - sparsity) / 2, budget)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="wiki-summaries")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--statistics", type=int, default=64, help="sequences")
    parser.add_argument("--heldout", type=int, default=32, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--plans", nargs="*", default=[""], help="only those that hold a word")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = Rows(options)
    tokens = options.heldout * options.length
    print(f"{options.model}: {tokens} held-out tokens, {options.statistics} statistics sequences\n")
    print("| sparsity | plan | stored bytes | held-out nats | - uniform wanda | s |")
    print("|---|---|---|---|---|---|")
    for sparsity in options.sparsities:
        reference = None
        for name, make in plans(rows, sparsity):
            if reference is not None and not any(word in name for word in options.plans):
                continue
            started = time.perf_counter()
            operators = make()
            nats = rows.measure(operators)
            seconds = time.perf_counter() - started
            reference = nats if reference is None else reference
            paired = (nats - reference).tolist()
            print(
                f"| {sparsity:g} | {name} | {rows.bytes(operators):,} "
                f"| {mean(nats.tolist()):.4f} ± {standard_error(nats.tolist()):.4f} "
                f"| {mean(paired):+.4f} ± {standard_error(paired):.4f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

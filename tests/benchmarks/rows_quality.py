"""What rows of unequal length are worth: held-out KL on a real model at equal stored bytes.

Prints a Markdown table. Not run by default; about half an hour on two cores as it stands:

    python tests/benchmarks/rows_quality.py [--model smollm2-135m] [--sparsities 0.5 0.6 0.7 0.8]

At each sparsity every plan stores at most the bytes of pruning all rows of all matrices alike with
Wanda's score (``uniform``). ``water`` and ``trim`` divide each matrix's weights among its own rows.
``joint`` gives all rows of all matrices one multiplier: on Fisher estimates in nats, on Wanda's
squared scores, or on these relative to what the matrix puts out in all. Losses are KL to the dense
model in nats per token; beside them the difference to ``uniform``, paired by sequence. Both come
with standard errors.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

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

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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

    def curves(self, score, *, relative):
        """The joint problem's losses."""
        found = []
        for member, weight, stats in self.weights():
            losses = weight_losses(score, weight, stats)
            curve = row_losses(losses, kept_counts(weight.shape[1], SHARES)).numpy()
            total = float(losses.sum()) if relative else 1.0
            found.append(RowCurves(member.name, member.matrix_shape, curve / np.float32(total)))
        return found


def plans(rows, sparsity, curves):
    """(name, one operator per matrix), one after the other; the first is what all must match."""

    def alike(operator):
        return [operator] * len(rows.members)

    uniform = alike(Prune(sparsity, "wanda"))
    # As many weights of each matrix as rounding left uniform rows, which is not quite the share.
    kept = [uniform[0].num_kept(member.matrix_shape) for member in rows.members]

    def divided(rule):
        return [replace(rule, keep_exactly=number) for number in kept]

    yield "uniform wanda", uniform
    yield "uniform fisher", alike(Prune(sparsity, "fisher"))
    yield "water wanda", divided(RowPrune(sparsity))
    yield "water fisher", divided(RowPrune(sparsity, score="fisher"))
    yield "trim wanda", divided(RowPrune(sparsity, "trim"))
    for name, (score, found) in curves.items():
        joint = allocate_rows(
            found, SHARES, budget_bytes=rows.bytes(uniform), rule=RowPrune(sparsity, score=score)
        )
        yield name, list(joint.operators)


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
    curves = {
        "joint fisher": ("fisher", rows.curves("fisher", relative=False)),
        "joint wanda": ("wanda", rows.curves("wanda", relative=False)),
        "joint wanda relative": ("wanda", rows.curves("wanda", relative=True)),
    }
    tokens = options.heldout * options.length
    print(f"{options.model}: {tokens} held-out tokens, {options.statistics} statistics sequences\n")
    print("| sparsity | plan | stored bytes | held-out nats | - uniform wanda | s |")
    print("|---|---|---|---|---|---|")
    for sparsity in options.sparsities:
        reference = None
        for name, operators in plans(rows, sparsity, curves):
            if reference is not None and not any(word in name for word in options.plans):
                continue
            started = time.perf_counter()
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

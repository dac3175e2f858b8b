"""Influence of training samples from activations against materialised gradients, in one run.

Prints a Markdown table. Both ways make the same passes over the same sequences and end in the same
influences of every matrix: ``factors`` keeps inputs and output gradients of the layers and never a
gradient of a weight, ``materialised`` keeps every sample's gradient of every weight and multiplies
them. Runs alternate; seconds are medians, the ratio that of the runs' pairs. Memory is what is
held at the end of the passes. Not run by default:

    python tests/benchmarks/influence.py [--runs 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from objectives.calibration import Calibration
from objectives.influence import collect_factors, datainf, matrix_influences
from objectives.language_task import LanguageTask
from objectives.statistics import gradient_hooks
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space

# SmolLM2-135M's matrices, two blocks of its thirty.
SMOL = {
    "vocab_size": 512,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


def cases():
    """Name, model, task and how many sequences train; the others validate."""
    folders = [Path(__file__).parents[1] / name for name in ("objectives", "search_spaces")]
    sys.path[:0] = map(str, folders)
    from language import trained
    from tiny_models import tiny

    model, calibration = trained()
    yield "tiny Llama, trained", model, LanguageTask(calibration), 16
    smol = tiny("llama", device="cpu", **SMOL).eval()
    for count, length in ((16, 16), (16, 128), (16, 512)):
        generator = torch.Generator().manual_seed(0)
        counts = {"statistics": count, "search": 1, "guard": 1, "heldout": 1}
        splits = {
            name: torch.randint(0, SMOL["vocab_size"], (number, length), generator=generator)
            for name, number in counts.items()
        }
        task = LanguageTask(Calibration.from_tensors(splits))
        yield "SmolLM2's width, 2 blocks, random", smol, task, count * 3 // 4


def by_factors(model, task, members, num_train):
    """(influences by member, bytes held)."""
    total = range(task.num_sequences("statistics"))
    found = collect_factors(model, task, members, total, meter=TokenMeter())
    held = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for samples in found.values()
        for sample in samples
        for tensor in (sample.inputs, sample.output_gradients)
    }
    influences = {
        member.name: matrix_influences(
            found[member.name][:num_train], found[member.name][num_train:], member.num_weights
        )
        for member in members
    }
    return influences, sum(held.values())


def by_gradients(model, task, members, num_train):
    """(influences by member, bytes held)."""
    found = {member.name: [] for member in members}
    with gradient_hooks(model, found, lambda name, gradient: found[name].append(gradient)):
        for index in range(task.num_sequences("statistics")):
            task.likelihood_loss(model, "statistics", index).backward()
    held = sum(gradient.nbytes for samples in found.values() for gradient in samples)
    influences = {}
    for member in members:
        gradients = torch.stack(found.pop(member.name)).flatten(1)
        train, validation = gradients[:num_train], gradients[num_train:].mean(0)
        products, towards = (train @ train.T).double(), (train @ validation).double()
        influences[member.name] = datainf(products, towards, member.num_weights)
    return influences, held


def line(name, model, task, num_train, *, runs):
    """One row of the table."""
    members = [m for unit in build_space(model, SpaceRequest()).units for m in unit.members]
    seconds = {by_factors: [], by_gradients: []}
    made = {}
    for _ in range(runs):
        for way, times in seconds.items():
            begin = time.perf_counter()
            made[way] = way(model, task, members, num_train)
            times.append(time.perf_counter() - begin)
    (ours, our_bytes), (theirs, their_bytes) = made[by_factors], made[by_gradients]
    apart = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
    pairs = zip(seconds[by_factors], seconds[by_gradients], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    medians = [statistics.median(times) for times in seconds.values()]
    count = task.num_sequences("statistics")
    return (
        f"| {name} | {count} x {task.tokens_per_sequence} | {medians[0]:.2f} | {medians[1]:.2f} "
        f"| {ratio:.2f} | {our_bytes / 1e6:.0f} | {their_bytes / 1e6:.0f} | {apart:.1e} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {threads} threads, "
        f"medians of {options.runs} runs\n"
    )
    print(
        "| model | sequences | factors s | materialised s | ratio | factors MB "
        "| materialised MB | largest difference |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, model, task, num_train in cases():
        print(line(name, model, task, num_train, runs=options.runs), flush=True)


if __name__ == "__main__":
    main()

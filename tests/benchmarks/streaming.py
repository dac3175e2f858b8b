"""Whether a model larger than memory can be profiled: peak memory and seconds per kind of work.

Prints a Markdown table. Not run by default:

    python tests/benchmarks/streaming.py [--blocks 32] [--width 4096] [--folder /somewhere/large]

Writes a checkpoint of Llama-7B's shape (or a narrower or shallower one) with random weights, one
shard a block, and profiles it by streaming on the CPU: the Fisher, and the tables of two scorers
over a menu of two. The profile is a process of its own, so that its peak (resident memory, mapped
files included) is not that of writing the checkpoint; what it holds before it opens the model is
beside it. The checkpoint is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from objectives.calibration import Calibration
from objectives.streamed_profile import PeakMemory, StreamSettings, profile_streamed
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models import skeleton
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.space import SearchSpace, build_menu

MENU = (RoundToNearest(3, 128), Keep())
SCORERS = ("blend", "relative_error")
VOCABULARY = 32000


def write_checkpoint(folder, *, width, blocks, vocabulary):
    """A Llama with random bfloat16 weights, one shard a block; bytes of all shards."""
    inner = round(width * 11008 / 4096)
    LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    attention = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    feed = {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    norms = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    block = attention | feed | {"mlp.down_proj.weight": (width, inner)} | norms
    shards = [{f"model.layers.{i}.{n}": shape for n, shape in block.items()} for i in range(blocks)]
    ends = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    shards.append(ends | {"lm_head.weight": (vocabulary, width)})
    generator, where, size = torch.Generator().manual_seed(0), {}, 0
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, name)
        size += (folder / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def profile(folder, *, sequences, length, hidden_bytes):
    """What one streamed profile took; to be run in a process of its own."""
    generator = torch.Generator().manual_seed(1)
    counts = {"statistics": sequences, "search": 1, "guard": 1, "heldout": 1}
    text = Calibration.from_tensors(
        {
            name: torch.randint(0, 1000, (count, length), generator=generator)
            for name, count in counts.items()
        }
    )
    found = build_space(skeleton(folder), SpaceRequest())
    menus = tuple(build_menu(unit, MENU) for unit in found.units)
    space = SearchSpace(found.name, found.units, menus, found.fixed, found.ties)
    before = PeakMemory.measure(torch.device("cpu"))
    settings = StreamSettings(dtype="float32", device="cpu", hidden_bytes=hidden_bytes)
    done = profile_streamed(str(folder), space, SCORERS, text=text, settings=settings)
    return {
        "before_bytes": before.host_bytes,
        "peak_bytes": done.memory.host_bytes,
        "seconds": done.seconds,
        "tokens": done.tokens,
        "loss": {name: float(sum(row[0] for row in t.losses)) for name, t in done.tables.items()},
    }


def show(measured, file_bytes, options):
    """The table."""
    shape = f"{options.blocks} blocks of width {options.width}, {file_bytes / 2**30:.2f} GiB"
    print(f"\n{shape}; {options.sequences} sequences of {options.length} tokens\n")
    print("| | |\n| --- | ---: |")
    print(f"| peak host memory | {measured['peak_bytes'] / 2**30:.2f} GiB |")
    print(f"| of it before the model is opened | {measured['before_bytes'] / 2**30:.2f} GiB |")
    for what, seconds in measured["seconds"].items():
        print(f"| {what} | {seconds:.0f} s |")


def apart(what, folder, options):
    """Do one thing in a process of its own, since a process's peak is inherited by its children.

    Freed matrices go back to the system, as those of true width do whatever the allocator has
    learnt; narrow ones (below 32 MiB) would fragment its heap.
    """
    words = [f"--{n.replace('_', '-')}={v}" for n, v in vars(options).items() if type(v) is int]
    command = [sys.executable, __file__, what, folder, *words]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hidden-bytes", type=int, default=2**30)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--json", action="store_true", help="print plain data instead of a table")
    for what in ("--write", "--profile"):
        parser.add_argument(what, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        shape = {"width": options.width, "blocks": options.blocks}
        print(json.dumps(write_checkpoint(options.write, vocabulary=options.vocabulary, **shape)))
        return
    if options.profile:
        counts = {"sequences": options.sequences, "length": options.length}
        print(json.dumps(profile(options.profile, hidden_bytes=options.hidden_bytes, **counts)))
        return
    with tempfile.TemporaryDirectory(prefix="streamed-", dir=options.folder) as folder:
        size = apart("--write", folder, options)
        measured = apart("--profile", folder, options)
    if options.json:
        print(json.dumps(measured | {"file_bytes": size}))
    else:
        show(measured, size, options)


if __name__ == "__main__":
    main()

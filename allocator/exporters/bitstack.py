"""A universal stack: one artefact that serves every budget, the plan's among them.

The problem: a plan is made for one budget, and memory differs from machine to machine. The levels
of a residual stack are nested, so all of them are written once (BitStack, ICLR 2025), and
``stack.json`` lists the order in which blocks, one more level of one unit each, are loaded, with
the exact bytes after each. Whatever prefix of that list fits is a model; the plan is one of them.
The first level of every stack, units stored by other operators and whatever was not searched are
always loaded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from allocator.exporters.base import Mismatch, Receipt, folder_of, read_text, write_text
from allocator.exporters.bitstack_order import (
    Block,
    Levels,
    Stack,
    at_levels,
    order_blocks,
    plan_levels,
    running_bytes,
)
from allocator.plan import Plan
from search_spaces.operators import Statistics

if TYPE_CHECKING:
    from torch import nn

    from objectives.loading import LoadedModel

FILE_NAME = "stack.json"
WEIGHTS_NAME = "stack.safetensors"
NUM_LEVELS = 16


@dataclass(frozen=True)
class Loaded:
    """What :func:`read_stack` put into a model.

    Attributes:
        num_blocks: Length of the prefix.
        stored_bytes: Exact bytes of the packed model with these blocks.
        levels: Of every stacked unit.
    """

    num_blocks: int
    stored_bytes: int
    levels: Levels


class BitStackExporter:
    """Order of blocks and, given the model, all levels of every stacked unit."""

    name: ClassVar[str] = "bitstack"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``stack.json``.

        Raises:
            ValueError: No unit of the plan is a residual stack, or the folder cannot be written.
        """
        note = f"{FILE_NAME} says the order alone: give the model to write the levels too."
        return _write_order(plan, destination, order_blocks(plan, NUM_LEVELS, None), note)

    def write_model(
        self,
        plan: Plan,
        loaded: LoadedModel,
        destination: Path,
        statistics: Mapping[str, Statistics],
    ) -> Receipt:
        """Write ``stack.json`` and ``stack.safetensors``; the model is unchanged.

        Raises:
            ValueError: As :func:`write_stack`.
        """
        return write_stack(plan, loaded.model, destination, statistics=statistics)

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare the prefix that is the plan, the bytes of all, and the weights if there are any.

        Raises:
            ValueError: The file is missing or is no order of blocks.
        """
        stack = read_order(artefact)
        reached = at_levels(stack.plan, stack.levels(stack.plan_num_blocks))
        mismatches = _compare(plan, reached)
        order = [(block.unit, block.level) for block in stack.blocks]
        exact = running_bytes(stack.plan, order)
        for num_blocks, expected in enumerate(exact):
            if (got := stack.stored_bytes(num_blocks)) != expected:
                place = f"{num_blocks} blocks"
                mismatches.append(Mismatch(place, f"{expected} bytes", f"{got} bytes"))
        weights = folder_of(artefact) / WEIGHTS_NAME
        return mismatches + (_check_weights(stack, weights) if weights.exists() else [])


def write_stack(
    plan: Plan,
    model: nn.Module,
    destination: Path,
    *,
    statistics: Mapping[str, Statistics],
    num_levels: int = NUM_LEVELS,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> Receipt:
    """Write all levels of every stacked unit, and the order in which they are loaded.

    Args:
        plan: Stops on the way: what it chose is loaded before anything else.
        model: The plan's model, dense; it is not changed.
        destination: A folder.
        statistics: By member name, for operators that need them.
        num_levels: Levels to store of every unit; at least the plan's deepest.
        losses: By unit name its loss with one level, two levels and so on; blocks are then loaded
            by the loss they save per byte. Without, level by level in the order of the model.

    Raises:
        ValueError: The plan is for another model or stacks no unit, losses or statistics are
            missing, or the folder cannot be written.
    """
    from allocator.apply import check_model, write_packed

    check_model(plan, model)
    order = order_blocks(plan, num_levels, losses)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {destination}: {error.strerror}") from error
    path = destination / WEIGHTS_NAME
    deep = at_levels(plan, plan_levels(plan) | dict(order))
    write_packed(model, deep, path, statistics)
    note = f"read_stack loads as many blocks of {WEIGHTS_NAME} as fit into memory."
    receipt = _write_order(plan, destination, order, note)
    return replace(receipt, files=(*receipt.files, path))


def read_stack(
    artefact: Path,
    model: nn.Module,
    *,
    budget_bytes: int | None = None,
    num_blocks: int | None = None,
) -> Loaded:
    """Load a prefix of a stack into a model, in place; levels beyond it are not read.

    Args:
        artefact: The folder that :func:`write_stack` wrote, or its ``stack.json``.
        model: Of the plan's architecture; its weights are overwritten.
        budget_bytes: Load the longest prefix of at most so many stored bytes.
        num_blocks: Load so many blocks. Give one of the two.

    Raises:
        ValueError: Neither or both are given, nothing fits, the files cannot be read, or the model
            has not the plan's parameters.
    """
    from allocator.apply import check_model, fill_model

    stack = read_order(artefact)
    if (budget_bytes is None) == (num_blocks is None):
        raise ValueError("read_stack takes either budget_bytes or num_blocks")
    if budget_bytes is not None:
        if budget_bytes < stack.least_bytes:
            raise ValueError(
                f"{budget_bytes} bytes hold no prefix of the stack: it starts at "
                f"{stack.least_bytes}"
            )
        num_blocks = bisect_right([block.stored_bytes for block in stack.blocks], budget_bytes)
    assert num_blocks is not None
    if not 0 <= num_blocks <= len(stack.blocks):
        raise ValueError(f"num_blocks must be 0 to {len(stack.blocks)}, got {num_blocks}")
    levels = stack.levels(num_blocks)
    prefix = at_levels(stack.plan, levels)
    if prefix.achieved_bytes != stack.stored_bytes(num_blocks):
        raise ValueError(
            f"{artefact} lists {stack.stored_bytes(num_blocks)} bytes for {num_blocks} blocks, "
            f"there are {prefix.achieved_bytes}"
        )
    check_model(prefix, model)
    path = folder_of(artefact) / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {
                stored.name: file.get_slice(stored.name)[tuple(slice(n) for n in stored.shape)]
                for stored in prefix.stored_tensors()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the stack {path}: {error}") from error
    fill_model(model, prefix, tensors, path)
    return Loaded(num_blocks, prefix.achieved_bytes, levels)


def read_order(artefact: Path) -> Stack:
    """The ``stack.json`` of an artefact, given itself or its folder.

    Raises:
        ValueError: It is missing, or is no order of blocks.
    """
    try:
        return Stack.model_validate_json(read_text(artefact, FILE_NAME))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{artefact} is not a stack: {problem}") from error


def _write_order(
    plan: Plan, destination: Path, order: Sequence[tuple[str, int]], note: str
) -> Receipt:
    least, *running = running_bytes(plan, order)
    blocks = [
        Block(unit=unit, level=level, stored_bytes=size)
        for (unit, level), size in zip(order, running, strict=True)
    ]
    chosen = plan_levels(plan)
    stack = Stack(
        num_levels=max((level for _, level in order), default=1),
        least_bytes=least,
        plan_num_blocks=sum(level - 1 for level in chosen.values()),
        blocks=tuple(blocks),
        plan=plan,
    )
    path = write_text(destination, FILE_NAME, stack.model_dump_json(indent=1) + "\n")
    most = running[-1] if running else least
    range_note = f"Any prefix of {len(blocks)} blocks is a model: {least:,} to {most:,} bytes."
    return Receipt((path,), len(plan.units), (range_note, note))


def _compare(plan: Plan, reached: Plan) -> list[Mismatch]:
    """Where two plans store anything differently."""
    ours = {entry.name: entry for entry in plan.units}
    theirs = {entry.name: entry for entry in reached.units}
    found = []
    for name in (*ours, *(name for name in theirs if name not in ours)):
        expected, got = ours.get(name), theirs.get(name)
        if expected is None or got is None:
            absent = "not in the plan" if expected is None else "not in the stack"
            present = expected or got
            assert present is not None
            label = present.choice.label
            found.append(Mismatch(name, *((label, absent) if expected else (absent, label))))
        elif expected.members != got.members or expected.choice != got.choice:
            found.append(Mismatch(name, expected.choice.label, got.choice.label))
    for tensor in set(plan.fixed) ^ set(reached.fixed):
        sides = ("stored", "absent") if tensor in plan.fixed else ("absent", "stored")
        found.append(Mismatch(tensor.name, *sides))
    return found


def _check_weights(stack: Stack, path: Path) -> list[Mismatch]:
    """Compare the header of the weights with what all levels store."""
    deep = at_levels(stack.plan, dict.fromkeys(plan_levels(stack.plan), stack.num_levels))
    expected = {t.name: f"{t.dtype} {list(t.shape)}" for t in deep.stored_tensors()}
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            got = {n: f"{s.get_dtype()} {list(s.get_shape())}" for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the stack {path}: {error}") from error
    return [
        Mismatch(name, expected.get(name, "absent"), got.get(name, "absent"))
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]

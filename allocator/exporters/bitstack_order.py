"""In which order the blocks of a universal stack are loaded, and the exact bytes after each.

The problem: a stack serves every budget if any prefix of its blocks is a model, and the plan that
it was made from if one prefix is the plan. So the order first completes the plan and then goes on;
inside both parts it is BitStack's (ICLR 2025, section 3.3), level by level, or, where the loss at
every level is known, always the block that saves most per byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from allocator.plan import CONTAINER_METADATA, Plan, PlanUnit
from search_spaces.operators import ResidualStack, operator_to_json
from search_spaces.storage import StoredTensor, safetensors_bytes

Levels = dict[str, int]  # of every stacked unit, by its name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(_Strict):
    """One more level of one unit, and the exact bytes of the packed model once it is loaded."""

    unit: str
    level: int
    stored_bytes: int


class Stack(_Strict):
    """What ``stack.json`` says.

    Attributes:
        num_levels: Levels that are stored of every stacked unit.
        least_bytes: Exact bytes of the packed model before any block.
        plan_num_blocks: Blocks after which the model is the plan's.
        blocks: All of them, in the order in which they are loaded.
        plan: The plan itself.
    """

    schema_version: Literal[1] = 1
    num_levels: int
    least_bytes: int
    plan_num_blocks: int
    blocks: tuple[Block, ...]
    plan: Plan

    @model_validator(mode="after")
    def _complete(self) -> Stack:
        """Every level of every stacked unit is loaded once, after the one below it."""
        levels = dict.fromkeys(plan_levels(self.plan), 1)
        for block in self.blocks:
            if block.level != levels.get(block.unit, -1) + 1:
                raise ValueError(f"level {block.level} of {block.unit!r} is out of order")
            levels[block.unit] = block.level
        for unit, level in levels.items():
            if level != self.num_levels:
                raise ValueError(f"{unit!r} has {level} of {self.num_levels} levels")
        if not 0 <= self.plan_num_blocks <= len(self.blocks):
            raise ValueError(f"there are no {self.plan_num_blocks} blocks")
        return self

    def levels(self, num_blocks: int) -> Levels:
        """Level of every stacked unit once so many blocks are loaded."""
        first = dict.fromkeys(plan_levels(self.plan), 1)
        return first | {block.unit: block.level for block in self.blocks[:num_blocks]}

    def stored_bytes(self, num_blocks: int) -> int:
        """Exact bytes of the packed model, and of its caches, with so many blocks."""
        return self.blocks[num_blocks - 1].stored_bytes if num_blocks else self.least_bytes


def plan_levels(plan: Plan) -> Levels:
    """Levels that a plan gives to its stacked units."""
    choices = {entry.name: entry.choice for entry in plan.units}
    return {name: o.levels for name, o in choices.items() if isinstance(o, ResidualStack)}


def order_blocks(
    plan: Plan, num_levels: int, losses: Mapping[str, Sequence[float]] | None
) -> list[tuple[str, int]]:
    """Every block as (unit, level): those of the plan, then the others.

    Args:
        plan: Must stack a unit.
        num_levels: Levels of every stacked unit in the end; at least the plan's deepest.
        losses: By unit name its loss with one level, two levels and so on.

    Raises:
        ValueError: No unit of the plan is a residual stack, or a loss is missing.
    """
    chosen = plan_levels(plan)
    if not chosen:
        raise ValueError("bitstack has nothing to stack: no unit of the plan is a residual_stack")
    deepest = max(num_levels, *chosen.values())
    first, last = dict.fromkeys(chosen, 1), dict.fromkeys(chosen, deepest)
    if losses is None:
        return [*_level_major(first, chosen), *_level_major(chosen, last)]
    sizes = _block_bytes(plan)
    savings = {}
    for name in chosen:
        row = losses.get(name, ())
        if len(row) < deepest:
            raise ValueError(
                f"bitstack needs the loss of {name!r} at 1 to {deepest} levels, got {len(row)}"
            )
        savings[name] = [(less - more) / sizes[name] for less, more in pairwise(row)]
    return [*_greedy(first, chosen, savings), *_greedy(chosen, last, savings)]


def _block_bytes(plan: Plan) -> dict[str, int]:
    """Payload of one level of every stacked unit."""
    one, two = (at_levels(plan, dict.fromkeys(plan_levels(plan), n)).units for n in (1, 2))
    return {less.name: more.bytes - less.bytes for less, more in zip(one, two, strict=True)}


def _level_major(start: Levels, stop: Levels) -> list[tuple[str, int]]:
    """All blocks between two points, the lower levels first."""
    missing = ((unit, level) for unit in start for level in range(start[unit] + 1, stop[unit] + 1))
    return sorted(missing, key=lambda block: block[1])


def _greedy(
    start: Levels, stop: Levels, savings: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, int]]:
    """All blocks between two points, always the one next that saves most per byte."""
    places = {unit: place for place, unit in enumerate(start)}
    heap = [
        (-savings[unit][start[unit] - 1], places[unit], unit, start[unit] + 1)
        for unit in start
        if start[unit] < stop[unit]
    ]
    heapq.heapify(heap)
    while heap:
        _, place, unit, level = heapq.heappop(heap)
        yield unit, level
        if level < stop[unit]:
            heapq.heappush(heap, (-savings[unit][level - 1], place, unit, level + 1))


def running_bytes(plan: Plan, order: Sequence[tuple[str, int]]) -> Iterator[int]:
    """Exact bytes of the packed model before any block and after each."""
    fixed = tuple(StoredTensor(t.name, t.dtype, t.shape) for t in plan.fixed)
    stacked = {entry.name: (entry.unit, entry.choice) for entry in plan.units}
    first = at_levels(plan, dict.fromkeys(plan_levels(plan), 1))
    layouts = {
        entry.name: entry.unit.layout(entry.choice)
        for entry in first.units
        if not entry.unit.is_cache
    }
    yield first.achieved_bytes
    for name, level in order:
        unit, operator = stacked[name]
        assert isinstance(operator, ResidualStack)
        layouts[name] = unit.layout(replace(operator, levels=level))
        stored = [*fixed, *(tensor for layout in layouts.values() for tensor in layout)]
        yield safetensors_bytes(stored, CONTAINER_METADATA) + plan.cache_bytes


def at_levels(plan: Plan, levels: Levels) -> Plan:
    """What a plan stores with its stacks at other levels; its losses still speak of its own."""
    moved = plan.model_copy(update={"units": tuple(_moved(e, levels) for e in plan.units)})
    exact = safetensors_bytes(moved.stored_tensors(), CONTAINER_METADATA) + moved.cache_bytes
    return moved.model_copy(update={"achieved_bytes": exact})


def _moved(entry: PlanUnit, levels: Levels) -> PlanUnit:
    operator = entry.choice
    if not isinstance(operator, ResidualStack):
        return entry
    moved = replace(operator, levels=levels[entry.name])
    return entry.model_copy(
        update={"operator": operator_to_json(moved), "bytes": entry.unit.bytes(moved)}
    )

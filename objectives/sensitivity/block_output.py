"""Output error of the decoder block: what one compressed matrix does to all that follows it.

Block-wise methods (BRECQ, OmniQuant) judge a compression by the block's output rather than the
matrix's own: errors pass through the attention or the gate that reads them and meet the residual
stream. Here each unit is compressed alone, the block is run again on the inputs that it has in the
dense model, and the squared error of its output is divided by the squared output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.sensitivity.gradients import holding, refuse_caches
from search_spaces.space import Unit


class BlockOutput(Scorer):
    """Relative squared error of the block's output with one unit compressed, the rest dense.

    One pass over the statistics sequences in which each block, right after it has run, is run once
    more for each cell of its units: only one block's inputs are kept at a time. Options that the
    bank has no room for are made anew for every sequence.
    """

    name: ClassVar[str] = "block_output"
    unit: ClassVar[str] = "relative_block_mse"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """The pass first, then cell after cell.

        Raises:
            ValueError: A cell is a cache's, or its unit lies in no block that the model runs.
        """
        refuse_caches(self.name, context.space, cells)
        blocks: dict[str, list[Cell]] = {}
        for cell in cells:
            blocks.setdefault(_block_of(context.space.units[cell[0]]), []).append(cell)
        errors = dict.fromkeys(cells, 0.0)
        energies: dict[str, float] = {}
        context.bank.restore()
        tokens = context.task.tokens_per_sequence
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for path, own in blocks.items():
                hook = _measuring(context, partial(_add, energies, path), own, errors)
                module = context.model.get_submodule(path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for index in context.sequences if blocks else ():
                context.task.likelihood_loss(context.model, "statistics", index)
                context.meter.add("statistics", tokens)
                again = tokens * len(cells)
                context.meter.add("statistics", round(again / context.space.depths), again)
        if missing := blocks.keys() - energies.keys():
            raise ValueError(f"scorer block_output: the model never runs {min(missing)}")
        for cell in cells:
            energy = energies[_block_of(context.space.units[cell[0]])]
            # NaN stays NaN
            yield errors[cell] / energy if energy != 0 else 0.0


def _add(sums: dict[str, float], key: str, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value


def _measuring(
    context: ScoringContext,
    add_energy: Callable[[float], None],
    cells: Sequence[Cell],
    errors: dict[Cell, float],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """A forward hook that runs a block again for each of its cells."""

    def measure(
        block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        dense = _states(output)
        add_energy(float(dense.square().sum(dtype=torch.float64)))
        for unit, option in cells:
            with holding(context.bank, {unit: option}):
                # not through the hooks, of which this is one
                made = _states(block.forward(*args, **kwargs))
            errors[unit, option] += float((made - dense).square().sum(dtype=torch.float64))

    return measure


def _states(output: Any) -> Tensor:
    """The hidden states in float32: a block's output, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(first, Tensor), type(first)
    return first.float()


def _block_of(unit: Unit) -> str:
    """Path of the block that holds all members of a unit.

    Raises:
        ValueError: There is none.
    """
    paths = set()
    for member in unit.members:
        parts = member.module.split(".")
        if unit.depth is not None and str(unit.depth) in parts:
            paths.add(".".join(parts[: parts.index(str(unit.depth)) + 1]))
        else:
            paths.add("")
    if len(paths) != 1 or "" in paths:
        raise ValueError(
            f"scorer block_output: {unit.name} lies in no single decoder block; "
            "exclude it or use the reconstruction scorer"
        )
    return paths.pop()

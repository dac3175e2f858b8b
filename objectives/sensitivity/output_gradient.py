"""Squared output gradient times squared output error: ModelOpt's AutoQuantize.

AutoQuantize sums ``(dL/dy)^2 (y' - y)^2`` over the tokens and outputs ``y`` of a matrix, once for
every format. By a second-order expansion in ``y`` with the Hessian replaced by the diagonal of the
empirical Fisher information this is, up to a factor, the KL that the error causes: with ``L`` the
mean over the ``T`` tokens of a sequence, the KL per token is ``T/2 sum (dL/dy)^2 (y' - y)^2``,
which is what this scorer gives. Unlike Fisher's estimate over weights it keeps how the errors of a
row add up in each output; it leaves out that gradients and errors of different outputs and tokens
correlate. A cache has no weights: its nats are measured, one cache at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.statistics import differentiable, only_trainable
from search_spaces.operators.members import logical
from search_spaces.space import Member


class OutputGradient(Scorer):
    """``T/2 sum (dL/dy)^2 (x (W' - W)^T)^2`` over outputs and tokens, nats per token.

    One pass over the statistics sequences in which no gradient of a weight is formed; besides what
    the backward pass keeps anyway, the inputs of the matrices. Options that the bank has no room
    for are made anew for every sequence.
    """

    name: ClassVar[str] = "output_gradient"
    unit: ClassVar[str] = "nats"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """The pass first, then cell after cell.

        Raises:
            ValueError: The inputs of a parameter cannot be observed.
        """
        asked: dict[int, list[int]] = {}
        for unit, option in cells:
            if not context.space.units[unit].is_cache:
                asked.setdefault(unit, []).append(option)
        sums = _observe(context, asked)
        scale = 0.5 * context.task.tokens_per_sequence / len(context.sequences)
        for cell in cells:
            cached = context.cache_loss(*cell)
            yield scale * sums[cell] if cached is None else cached.nats


def _observe(context: ScoringContext, asked: Mapping[int, Sequence[int]]) -> dict[Cell, float]:
    """Sums over sequences, tokens and outputs of the squared gradient times the squared error."""
    sums: dict[Cell, float] = {(u, o): 0.0 for u, options in asked.items() for o in options}
    members = [
        (u, place, m) for u in asked for place, m in enumerate(context.space.units[u].members)
    ]
    seen: set[str] = set()

    def fold(unit: int, place: int, member: Member, inputs: Tensor, gradient: Tensor) -> None:
        slopes = gradient.flatten(0, -2).float()
        # as the module before left them, which may be on another device
        flat = inputs.to(slopes.device).flatten(0, -2).float()
        dense = context.bank.dense(unit)[place].float()
        for option in asked[unit]:
            error = context.bank.compressed(unit, option)[place].float() - dense
            change = flat @ logical(error, member)[0].T
            sums[unit, option] += float((slopes * change).square().sum(dtype=torch.float64))

    context.bank.restore()
    tokens = context.task.tokens_per_sequence
    with ExitStack() as stack:
        stack.enter_context(only_trainable(context.model, ()))
        for unit, place, member in members:
            module = _observable(context.model, member)
            hook = _watching(partial(fold, unit, place, member), seen, member.name)
            stack.callback(module.register_forward_hook(hook).remove)
        for index in context.sequences if members else ():
            loss = context.task.likelihood_loss(context.model, "statistics", index)
            context.meter.add("statistics", tokens)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                context.meter.add("statistics_backward", 2 * tokens)
    for _, _, member in members:
        if member.name not in seen:
            raise ValueError(_hidden(member))
    return sums


def _watching(
    fold: Callable[[Tensor, Tensor], None], seen: set[str], name: str
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that has ``fold`` told the inputs and the gradient of the outputs."""

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        del module
        seen.add(name)
        output = differentiable(output)
        output.register_hook(partial(fold, inputs[0].detach()))  # type: ignore[no-untyped-call]
        return output

    return watch


def _observable(model: nn.Module, member: Member) -> nn.Module:
    """The module whose inputs and outputs are those of the matrix.

    Raises:
        ValueError: There is none.
    """
    module = model.get_submodule(member.module)
    if len(member.shape) == 3 or isinstance(module, nn.Embedding):
        raise ValueError(_hidden(member))
    return module


def _hidden(member: Member) -> str:
    return (
        f"scorer output_gradient: the inputs of {member.name} cannot be observed; "
        "exclude it or use the fisher scorer"
    )

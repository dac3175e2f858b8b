"""Mean Hessian trace times squared weight error: HAWQ-V2.

Expanding the loss to second order at a minimum and replacing the Hessian of each matrix by its mean
eigenvalue gives ``1/2 tr(H)/n ||W' - W||^2`` (HAWQ-V2, equation 2.11, there without the half). The
trace is estimated by Hutchinson's method: for random signs ``v``, the expectation of ``v' H v`` is
``tr(H)``, and ``H v`` is the derivative of ``<gradient, v>``. A language model is no exact minimum
of the loss on the statistics text and the estimate is noisy, so that small traces may come out
below zero. A cache has no weights: its nats are measured, one cache at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from objectives.sensitivity.base import Cell, Scorer, ScoringContext
from objectives.statistics import only_trainable
from search_spaces.operators.members import logical
from search_spaces.space import Member, SearchSpace

NUM_PROBES = 2
"""Random sign vectors per sequence, fresh for each; more sequences are worth more than more."""

GROUP_WEIGHTS = 2**28
"""Most weights that are differentiated twice at once: gradient, signs and product are in memory."""


class HessianTrace(Scorer):
    """``1/2 tr(H)/n ||W' - W||^2``, nats per token; each matrix of a stack has its own trace.

    Units are differentiated in groups of at most ``GROUP_WEIGHTS`` weights, each in passes of its
    own. The groups are those of the space, whichever cells are asked for. Attention runs on the
    kernel that can be differentiated twice, whose memory grows with the square of the length.
    """

    name: ClassVar[str] = "hessian_trace"
    unit: ClassVar[str] = "nats"
    needs: ClassVar[frozenset[str]] = frozenset()

    def losses(self, context: ScoringContext, cells: Sequence[Cell]) -> Iterator[float]:
        """All passes first, then cell after cell.

        Raises:
            ValueError: The model cannot be differentiated twice.
        """
        attention = getattr(getattr(context.model, "config", None), "_attn_implementation", None)
        if str(attention).startswith("flash"):  # it would pass for a constant, without an error
            raise ValueError(
                f"scorer hessian_trace: {attention} has no second derivative; load the model with "
                "sdpa or eager attention or use the fisher scorer"
            )
        asked = {unit for unit, _ in cells}
        traces: dict[str, Tensor] = {}
        for number, group in enumerate(_groups(context.space)):
            if asked & set(group):
                traces |= mean_traces(context, number, group)
        for unit, option in cells:
            cached = context.cache_loss(unit, option)
            yield _second_order(context, unit, option, traces) if cached is None else cached.nats


def _second_order(
    context: ScoringContext, unit: int, option: int, traces: dict[str, Tensor]
) -> float:
    """Half of the mean trace times the squared error, summed over matrices."""
    total = 0.0
    for member, _, error, _ in context.errors(unit, option):
        squares = error.square().sum((-1, -2), dtype=torch.float64)
        total += 0.5 * float((traces[member.name].to(squares.device) * squares).sum())
    return total


def _groups(space: SearchSpace) -> list[list[int]]:
    """Consecutive weight units that fit in memory together; one that is too large stands alone."""
    groups: list[list[int]] = []
    weights = 0
    for index, unit in enumerate(space.units):
        if unit.is_cache:
            continue
        if not groups or weights + unit.num_weights > GROUP_WEIGHTS:
            groups.append([])
            weights = 0
        groups[-1].append(index)
        weights += unit.num_weights
    return groups


def mean_traces(context: ScoringContext, number: int, group: Sequence[int]) -> dict[str, Tensor]:
    """Mean over sequences and probes of the Hessian's trace over the number of weights.

    Args:
        context: Whose dense model is differentiated.
        number: Of the group; with the seed and the sequence it decides the probes.
        group: Indices of weight units.

    Returns:
        By member name: (matrices,) float64, the mean eigenvalue of each matrix's Hessian.

    Raises:
        ValueError: The model cannot be differentiated twice.
    """
    members = [m for unit in group for m in context.space.units[unit].members]
    parameters = [context.model.get_parameter(member.name) for member in members]
    sums = [
        torch.zeros(m.num_matrices, dtype=torch.float64, device=p.device)
        for m, p in zip(members, parameters, strict=True)
    ]
    context.bank.restore()
    tokens = context.task.tokens_per_sequence
    with only_trainable(context.model, parameters), sdpa_kernel(SDPBackend.MATH):
        for index in context.sequences:
            loss = context.task.likelihood_loss(context.model, "statistics", index)
            context.meter.add("statistics", tokens)
            # A backward pass, and for each probe the backward pass of both passes.
            context.meter.add("statistics_backward", (2 + 4 * NUM_PROBES) * tokens)
            seeds = np.random.SeedSequence([context.seed, number, index])
            generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
            try:
                _fold_products(loss, members, parameters, generator, sums)
            except RuntimeError as error:
                if "derivative" not in str(error) and "differentiate" not in str(error):
                    raise
                raise ValueError(
                    f"scorer hessian_trace: the model cannot be differentiated twice ({error}); "
                    "load it with another attention implementation or use the fisher scorer"
                ) from error
    count = len(context.sequences) * NUM_PROBES
    return {
        member.name: total / (count * member.num_weights / member.num_matrices)
        for member, total in zip(members, sums, strict=True)
    }


def _fold_products(
    loss: Tensor,
    members: Sequence[Member],
    parameters: Sequence[nn.Parameter],
    generator: torch.Generator,
    sums: Sequence[Tensor],
) -> None:
    """Add ``v' H v`` of each matrix of each member for all probes of one sequence."""
    found: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    # A loss that is linear in a matrix, or does not depend on it, has no curvature there.
    curved = {
        i: slope for i, slope in enumerate(found) if slope is not None and slope.requires_grad
    }
    for probe in range(NUM_PROBES if curved else 0):
        signs = [_signs(parameter, generator) for parameter in parameters]
        products = torch.autograd.grad(
            list(curved.values()),
            [parameters[i] for i in curved],
            [signs[i] for i in curved],
            retain_graph=probe + 1 < NUM_PROBES,
            allow_unused=True,
        )
        for i, product in zip(curved, products, strict=True):
            if product is not None:
                terms = logical(product.float() * signs[i].float(), members[i])
                sums[i].add_(terms.sum((-1, -2), dtype=torch.float64))


def _signs(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of a parameter's shape, dtype and device; the same on every device."""
    bits = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8)
    return bits.mul_(2).sub_(1).to(parameter.device, parameter.dtype)

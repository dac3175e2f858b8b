"""Learned ratios: a sparsity for each matrix, by gradient on the error of its block's output.

The problem: the matrices of a block do not bear the same sparsity. As BESA (ICLR 2024) does, each
matrix holds a softmax over candidate sparsities whose mean is its sparsity; the weights of a row
are dropped in the order of Wanda's score, and the gradient passes the hard mask through the
probability that a weight's place is kept. The loss is the block's squared output error plus
``beta ((s_block - S) / S)^2``, with one epoch on the dense model's block inputs. Every block aims
at the same S, so weight moves inside blocks only. Blocks do not depend on each other, so one pass
of the dense model trains all of them, sequence by sequence, with the memory of one block.

What we do otherwise: the squared error is relative to the squared output, since its scale differs
from block to block and the budget's term has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from objectives.mappers import Ratios
from objectives.prefix import find_blocks
from objectives.row_masks import row_ranks
from objectives.sensitivity.base import ScoringContext
from objectives.sensitivity.importance import Importances, ImportanceScorer, units_by_block
from objectives.statistics import only_trainable
from search_spaces.operators.members import logical, physical
from search_spaces.space import Member, SearchSpace

_NUM_CANDIDATES = 101  # 0 to 1 in steps of 0.01
_START_WIDTH = 0.1  # of the first distribution, around the target


@dataclass(frozen=True)
class LearnedRatios(ImportanceScorer):
    """Importance is the share of its weights that a unit keeps; units outside blocks keep 1 - S.

    Attributes:
        removed: S, the share that every block aims to drop.
        learning_rate: Of Adam, on the softmax's logits; one step per block and sequence.
        penalty: Beta, of the block's distance from S.
    """

    removed: float = 0.5
    learning_rate: float = 0.5
    penalty: float = 1.0

    name: ClassVar[str] = "learned_ratios"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __post_init__(self) -> None:
        if not 0 < self.removed < 1:
            raise ValueError(
                f"scorer learned_ratios: removed must be between 0 and 1, got {self.removed}"
            )

    def measure(self, context: ScoringContext) -> Importances:
        """Shares kept.

        Raises:
            ValueError: The model's blocks cannot be found, or the inputs of a parameter cannot be
                observed.
        """
        context.bank.restore()
        modules = find_blocks(context.model, context.space)
        if not modules:
            raise ValueError(
                "scorer learned_ratios: expected the searched matrices in one stack of blocks, "
                "found none or several; take learned_thresholds, which needs no blocks"
            )
        found = np.full(len(context.space.units), 1 - self.removed)
        blocks = []
        for units in units_by_block(context.space):
            depth = context.space.units[units[0]].depth
            assert depth is not None
            blocks.append(_Block(self, context, units, modules[depth]))
        self._train(context, blocks)
        for block in blocks:
            for unit, keep in block.kept().items():
                found[unit] = keep
        return found

    def map_ratios(self, importances: Importances, space: SearchSpace, removed: float) -> Ratios:
        """What was learned; blocks missed their target by a little."""
        del space, removed
        return np.asarray(1 - importances)

    def _train(self, context: ScoringContext, blocks: Sequence[_Block]) -> None:
        """One epoch: each block takes a step when the dense model comes by."""
        order = np.random.default_rng(context.seed).permutation(np.array(context.sequences))
        with ExitStack() as stack:
            stack.enter_context(only_trainable(context.model, ()))
            stack.enter_context(torch.no_grad())
            for block in blocks:
                handle = block.module.register_forward_hook(block.hook(), with_kwargs=True)
                stack.callback(handle.remove)
            for index in order.tolist():
                context.task.likelihood_loss(context.model, "statistics", index)
                # The blocks' own runs are a second forward pass, and the only backward one.
                context.meter.add("statistics", 2 * context.task.tokens_per_sequence)
                context.meter.add("statistics_backward", 2 * context.task.tokens_per_sequence)


class _Matrix:
    """One parameter and its distribution over candidate sparsities."""

    def __init__(self, unit: int, member: Member, dense: Tensor, ranks: Tensor) -> None:
        self.unit = unit
        self.member = member
        self.dense = dense
        self._ranks = ranks
        self._columns = dense.shape[-1]
        self._candidates = torch.linspace(0, 1, _NUM_CANDIDATES, device=dense.device)
        self.logits = torch.zeros_like(self._candidates)

    def start(self, sparsity: float) -> None:
        """A distribution around the target."""
        distance = (self._candidates - sparsity) / _START_WIDTH
        self.logits = (-distance.square() / 2).requires_grad_()

    @property
    def sparsity(self) -> Tensor:
        """Scalar mean of the distribution."""
        return self.logits.softmax(0) @ self._candidates

    def masked(self) -> Tensor:
        """The weights that stay at that sparsity, as the model holds them.

        The mask is hard; its gradient is that of the probability that a candidate drops less than
        the share of the row up to the weight.
        """
        shares = torch.arange(1, self._columns + 1, device=self.logits.device) / self._columns
        below = torch.searchsorted(self._candidates, shares - 1e-6)
        soft = self.logits.softmax(0).cumsum(0)[below - 1]
        hard = (shares > self.sparsity.detach()).to(soft)
        mask = (hard + soft - soft.detach())[self._ranks.long() - 1]
        return physical((self.dense * mask).to(self.dense.dtype), self.member)


class _Block:
    """The matrices of one block, trained on what the dense model feeds it."""

    def __init__(
        self, wish: LearnedRatios, context: ScoringContext, units: Sequence[int], module: nn.Module
    ) -> None:
        self.module = module
        self._wish = wish
        self._busy = False
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._matrices: dict[str, _Matrix] = {}
        for unit in units:
            members = context.space.units[unit].members
            for member, dense in zip(members, context.bank.dense(unit), strict=True):
                weight, stats = logical(dense, member), context.statistics[member.name]
                ranks = row_ranks(weight, member, stats, wish.name)
                matrix = _Matrix(unit, member, weight, ranks)
                matrix.start(wish.removed)
                self._matrices[names[id(context.model.get_parameter(member.name))]] = matrix
        logits = [matrix.logits for matrix in self._matrices.values()]
        self._optimizer = torch.optim.Adam(logits, lr=wish.learning_rate)

    def hook(self) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        """Step on the inputs and the output of a dense run; its own runs are let through."""

        def step(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            if self._busy:
                return
            self._busy = True
            try:
                with torch.enable_grad():
                    parameters = {name: matrix.masked() for name, matrix in self._matrices.items()}
                    made = functional_call(module, parameters, inputs, named)
                    self._step(_states(made).float(), _states(output).float())
            finally:
                self._busy = False

        return step

    def kept(self) -> dict[int, float]:
        """Share kept of each unit."""
        weights: dict[int, int] = {}
        kept: dict[int, float] = {}
        for matrix in self._matrices.values():
            size, share = matrix.member.num_weights, 1 - float(matrix.sparsity.detach())
            weights[matrix.unit] = weights.get(matrix.unit, 0) + size
            kept[matrix.unit] = kept.get(matrix.unit, 0.0) + size * share
        return {unit: kept[unit] / weights[unit] for unit in kept}

    def _step(self, made: Tensor, dense: Tensor) -> None:
        target = self._wish.removed
        error = (made - dense).square().mean() / dense.square().mean().clamp(min=1e-30)
        sizes = [matrix.member.num_weights for matrix in self._matrices.values()]
        lost = torch.stack([matrix.sparsity for matrix in self._matrices.values()])
        mean = (lost @ lost.new_tensor(sizes)) / sum(sizes)
        loss = error + self._wish.penalty * ((mean - target) / target).square()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def _states(output: Any) -> Tensor:
    """Blocks return their hidden states, alone or first."""
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, Tensor)
    return states

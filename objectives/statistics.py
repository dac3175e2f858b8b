"""One streaming pass over the statistics split: what every matrix saw, and how the loss felt it.

Second moments come from hooks on the modules that own the matrices; the empirical Fisher from one
backward pass per sequence (squaring a batch-summed gradient would be wrong). Gradients are folded
into the accumulators as soon as they appear, so that memory is one float32 accumulator per weight.

Weighted inputs judge operators that were fitted to the inputs of the statistics split, on which
they look better than they are. So these are read on other text, the search split's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from objectives.task import Task, TokenMeter
from search_spaces.operators import Statistics
from search_spaces.operators.members import logical
from search_spaces.space import Member, SearchSpace

logger = logging.getLogger(__name__)

KINDS = frozenset({"second_moment", "hessian", "fisher", "weighted_inputs"})
SAMPLED_TOKENS = 1024
"""Whose inputs are kept of each member, from all sequences together."""
_SHARE = 4  # statistics sequences for one of the text on which inputs are weighted

Progress = Callable[[int, int], None]


def collect_statistics(
    model: nn.Module,
    task: Task,
    space: SearchSpace,
    *,
    needs: Collection[str],
    meter: TokenMeter,
    progress: Progress = lambda done, total: None,
) -> dict[str, Statistics]:
    """Run the dense model over the statistics split, and some of the search split for some kinds.

    Args:
        model: The dense model.
        task: Gives the sequences and the loss whose gradient is squared.
        space: Whose members are observed.
        needs: Any of ``second_moment``, ``hessian``, ``fisher``, ``weighted_inputs``.
        meter: Counts forward tokens; a backward counts as two forwards.
        progress: Told (sequences done, sequences in all) after each.

    Returns:
        By member name. A parameter whose inputs no hook can see (an embedding, a fused stack of
        experts behind its router) has no second moment, which is logged, and no inputs.

    Raises:
        ValueError: An unknown kind of statistics.
    """
    unknown = set(needs) - KINDS
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; known: {sorted(KINDS)}")
    if not needs:
        return {}
    members = [m for unit in space.units for m in unit.members if not m.cache]
    text = text_of(task, needs)
    observed = Observation(model, members, needs, text)
    total, done = sum(map(len, text.values())), 0
    for split, indices in text.items():
        with observed.listening(split):
            for index in indices:
                loss = task.likelihood_loss(model, split, index)
                meter.add("statistics", task.tokens_per_sequence)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                    meter.add("statistics_backward", 2 * task.tokens_per_sequence)
                done += 1
                progress(done, total)
    return observed.statistics(task.tokens_per_sequence)


Text = Mapping[str, range]
"""Sequences of each split that are read, in this order."""


def text_of(task: Task, needs: Collection[str]) -> Text:
    """What is read for some kinds of statistics.

    Inputs are weighted on the last sequences of the search split, a quarter as many as the
    statistics', or as many as there are.
    """
    total, others = task.num_sequences("statistics"), task.num_sequences("search")
    text = {}
    if set(needs) - {"weighted_inputs"}:
        text["statistics"] = range(total)
    if "weighted_inputs" in needs:
        text["search"] = range(max(0, others - max(1, total // _SHARE)), others)
    return text


class Observation:
    """What some members of a model see, and how the loss feels them, while it runs.

    Args:
        model: Holds the members; may be without weights elsewhere.
        members: What is observed.
        needs: Any of ``second_moment``, ``hessian``, ``fisher``, ``weighted_inputs``.
        text: What will be run; of each sequence an equal share of the weighted inputs is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Member],
        needs: Collection[str],
        text: Text,
    ) -> None:
        self._members = members
        self._needs = needs
        self._text = text
        inputs = members if {"second_moment", "hessian"} & set(needs) else []
        self._moments = _InputMoments(model, inputs, full="hessian" in needs)
        most = -(-SAMPLED_TOKENS // max(1, len(text.get("search", ()))))
        self._weighted = _WeightedInputs(model, members, most=most)
        self._fisher = _SquaredGradients(model, members)

    @contextmanager
    def listening(self, split: str) -> Iterator[None]:
        """Observe sequences of a split; one backward at a time is one gradient that is squared.

        Where a loss has no graph inside, nothing needs its gradient.
        """
        with ExitStack() as stack:
            if split == "search":
                stack.enter_context(self._weighted.listening())
            else:
                stack.enter_context(self._moments.listening())
                fisher = "fisher" in self._needs
                stack.enter_context(self._fisher.listening() if fisher else torch.no_grad())
            yield

    def statistics(self, tokens_per_sequence: int) -> dict[str, Statistics]:
        """By member name, to be asked for once.

        Args:
            tokens_per_sequence: By which gradients of mean losses become those of a token.
        """
        needs = self._needs
        scale = tokens_per_sequence / max(1, len(self._text.get("statistics", ())))
        return {
            member.name: Statistics(
                second_moment=(
                    self._moments.second_moment(member) if "second_moment" in needs else None
                ),
                hessian=self._moments.hessian(member) if "hessian" in needs else None,
                fisher=self._fisher.sum(member).mul_(scale) if "fisher" in needs else None,
                weighted_inputs=self._weighted.of(member) if "weighted_inputs" in needs else None,
            )
            for member in self._members
        }


@contextmanager
def only_trainable(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach these parameters of a model and no others.

    The flags and gradients that the caller left on the model are set aside, since a gradient would
    be added to, and put back afterwards.
    """
    chosen = {id(parameter) for parameter in parameters}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def gradient_hooks(
    model: nn.Module, names: Collection[str], consume: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hand each named parameter's gradient to ``consume`` once it is complete, then free it."""

    def folding(name: str) -> Callable[[Tensor], None]:
        def fold(leaf: Tensor) -> None:
            assert leaf.grad is not None
            consume(name, leaf.grad)
            leaf.grad = None

        return fold

    parameters = {name: model.get_parameter(name) for name in names}
    with only_trainable(model, parameters.values()):
        handles = [
            parameter.register_post_accumulate_grad_hook(folding(name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def differentiable(output: Tensor) -> Tensor:
    """What a module gave, where a graph begins if none came along.

    A copy then, since models may not write to a leaf but do write to outputs.
    """
    return output if output.requires_grad else output.detach().requires_grad_().clone()


def _visible(model: nn.Module, members: Sequence[Member]) -> Iterator[tuple[Member, nn.Module]]:
    """Members with modules whose hooks see what they are multiplied by.

    A hook cannot see what an embedding looks up, nor what a router sends to a stack of experts.
    """
    for member in members:
        module = model.get_submodule(member.module)
        if len(member.shape) == 2 and not isinstance(module, nn.Embedding):
            yield member, module


class _SquaredGradients:
    """Sums of squared gradients by member, (matrices, rows, columns) or (rows, columns)."""

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self._model = model
        self._members = {member.name: member for member in members}
        self._sums: dict[str, Tensor] = {}

    def listening(self) -> AbstractContextManager[None]:
        return gradient_hooks(self._model, self._members, self._fold)

    def sum(self, member: Member) -> Tensor:
        """Of the member's shape; zeros where the loss never depended on it."""
        if member.name not in self._sums:
            logger.warning("the loss does not depend on %s: its Fisher is zero", member.name)
            device = self._model.get_parameter(member.name).device
            return torch.zeros(member.shape, device=device)
        return self._sums[member.name]

    def _fold(self, name: str, gradient: Tensor) -> None:
        squared = logical(gradient, self._members[name]).float().square()
        squared = squared if len(self._members[name].shape) == 3 else squared.squeeze(0)
        if name in self._sums:
            self._sums[name] += squared
        else:
            self._sums[name] = squared


class _InputMoments:
    """Mean over tokens of the squared inputs (or their outer products) of each member's module."""

    def __init__(self, model: nn.Module, members: Sequence[Member], *, full: bool) -> None:
        self._model = model
        self._members = members
        self._full = full
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._latest: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(setattr, self, "_latest", None)
            for member, module in _visible(self._model, self._members):
                hook = module.register_forward_pre_hook(partial(self._observe, member))
                stack.callback(hook.remove)
            yield

    def second_moment(self, member: Member) -> Tensor | None:
        """(columns,) or ``None`` where the inputs cannot be seen."""
        if member.name not in self._sums:
            logger.warning("no input statistics for %s: its module hides them", member.name)
            return None
        moments = self._sums[member.name] / self._tokens[member.name]
        return moments.diagonal().clone() if self._full else moments

    def hessian(self, member: Member) -> Tensor | None:
        """(columns, columns) or ``None`` where the inputs cannot be seen."""
        if member.name not in self._sums:
            logger.warning("no input statistics for %s: its module hides them", member.name)
            return None
        return self._sums[member.name] / self._tokens[member.name]

    def _observe(self, member: Member, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        moment, tokens = self._moment(inputs[0]), inputs[0].shape[:-1].numel()
        if member.name in self._sums:
            self._sums[member.name] += moment
        else:
            self._sums[member.name] = moment.clone()
        self._tokens[member.name] = self._tokens.get(member.name, 0) + tokens

    def _moment(self, inputs: Tensor) -> Tensor:
        """Summed over tokens; q, k and v are handed one tensor, whose moment is taken once."""
        if self._latest is None or self._latest[0] is not inputs:
            flat = inputs.detach().flatten(0, -2).float()
            self._latest = inputs, flat.T @ flat if self._full else flat.square().sum(0)
        return self._latest[1]


class _WeightedInputs:
    """Inputs of some tokens of each member's module, times the length of the outputs' gradient."""

    def __init__(self, model: nn.Module, members: Sequence[Member], *, most: int) -> None:
        self._model = model
        self._members = members
        self._most = most
        self._num_calls: Counter[str] = Counter()
        self._kept: dict[str, list[Tensor]] = {member.name: [] for member in members}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Gradients reach outputs, not weights."""
        with ExitStack() as stack:
            stack.enter_context(only_trainable(self._model, ()))
            for member, module in _visible(self._model, self._members):
                hook = module.register_forward_hook(partial(self._watch, member.name))
                stack.callback(hook.remove)
            yield

    def of(self, member: Member) -> Tensor | None:
        """(num_tokens, columns) or ``None`` where the inputs cannot be seen."""
        kept = self._kept[member.name]
        return torch.cat(kept) if kept else None

    def _watch(
        self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """Of a member's n-th call the same tokens, whatever part of the model runs."""
        del module
        flat = inputs[0].detach().flatten(0, -2)
        generator = torch.Generator().manual_seed(self._num_calls[name])
        self._num_calls[name] += 1
        chosen = torch.randperm(len(flat), generator=generator)[: self._most].to(flat.device)
        output = differentiable(output)
        output.register_hook(partial(self._keep, name, flat[chosen], chosen))  # type: ignore[no-untyped-call]
        return output

    def _keep(self, name: str, inputs: Tensor, chosen: Tensor, gradient: Tensor) -> None:
        felt = gradient.flatten(0, -2)[chosen.to(gradient.device)].float()
        lengths = felt.norm(dim=-1, keepdim=True).to(inputs.device)
        self._kept[name].append((inputs.float() * lengths).to("cpu", torch.bfloat16))

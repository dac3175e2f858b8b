"""Influence of training samples on a validation loss, matrix by matrix, from inner products only.

The problem: how a training sample moves the validation loss through one matrix asks for the inverse
of a Hessian as large as the matrix, and for one gradient per sample. DataInf (Kwon et al., ICLR
2024) swaps the inverse of an average of rank-one terms for the average of their inverses, which
leaves inner products of gradients. The gradient of a linear layer is ``sum_t d_t x_t'`` over tokens
with inputs x and output gradients d, so those products follow from activations:
``<g_a, g_b> = sum_{t,u} (x_at . x_bu)(d_at . d_bu)``. No gradient of a sample is ever held: with
few tokens this sum is taken as it stands; with more tokens than the matrix is wide it is cheaper to
add up slices of rows of all gradients, which are dropped at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from objectives.statistics import only_trainable
from objectives.task import Task, TokenMeter
from search_spaces.space import Member

VARIANTS = ("positive", "all", "top")

_DAMPING = 0.1
_TOP_SHARE = 0.25
_MOST_SLICED = 1 << 22  # numbers of gradient slices held at once


@dataclass(frozen=True)
class GradientFactors:
    """The gradient of one matrix by one sample, in factors: ``output_gradients' @ inputs``.

    Attributes:
        inputs: (tokens, columns) of the layer.
        output_gradients: (tokens, rows) of the loss by the layer's outputs.
    """

    inputs: Tensor
    output_gradients: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory held; less where layers share their inputs."""
        return self.inputs.nbytes + self.output_gradients.nbytes


def collect_factors(
    model: nn.Module,
    task: Task,
    members: Sequence[Member],
    indices: Sequence[int],
    *,
    meter: TokenMeter,
) -> dict[str, list[GradientFactors]]:
    """One forward and backward pass per sequence; no gradient of a weight is computed.

    Args:
        model: Runs as it stands.
        task: Its likelihood loss on the statistics split is what is differentiated.
        members: Matrices of linear layers.
        indices: Sequences of the split.
        meter: Counts forward tokens; a backward counts as two forwards.

    Returns:
        By member name, for each sequence; without tokens where the loss does not depend on it.

    Raises:
        ValueError: The inputs of a member cannot be observed.
    """
    found: dict[str, list[GradientFactors]] = {member.name: [] for member in members}
    listeners = [_Listener(model, member) for member in members]
    with only_trainable(model, ()), _listening(listeners):
        for index in indices:
            loss = task.likelihood_loss(model, "statistics", index)
            meter.add("statistics", task.tokens_per_sequence)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                meter.add("statistics_backward", 2 * task.tokens_per_sequence)
            for member, listener in zip(members, listeners, strict=True):
                found[member.name].append(listener.take())
    return found


class _Listener:
    """Inputs and output gradients of one layer, call by call."""

    def __init__(self, model: nn.Module, member: Member) -> None:
        self.module = model.get_submodule(member.module)
        if len(member.shape) != 2 or isinstance(self.module, nn.Embedding):
            raise ValueError(
                f"influence: the inputs of {member.name} cannot be observed; exclude it"
            )
        self._empty = (0, member.shape[1]), (0, member.shape[0])
        self._parameter = model.get_parameter(member.name)
        self._calls: list[tuple[Tensor, Tensor]] = []

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Ask for the gradient of the output; a backward pass goes no deeper than the first."""
        del module
        # Outputs that depend on nothing trainable become leaves, which later layers may not
        # overwrite: they get the copy.
        made = output if output.requires_grad else output.requires_grad_().clone()
        folding = self._folding(inputs[0].detach().flatten(0, -2))
        made.register_hook(folding)  # type: ignore[no-untyped-call]
        return made

    def take(self) -> GradientFactors:
        """What was seen since the last time."""
        calls, self._calls = self._calls, []
        if len(calls) == 1:
            return GradientFactors(*calls[0])
        if not calls:
            return GradientFactors(*(self._parameter.new_empty(shape) for shape in self._empty))
        return GradientFactors(*(torch.cat(parts) for parts in zip(*calls, strict=True)))

    def _folding(self, inputs: Tensor) -> Callable[[Tensor], None]:
        def fold(gradient: Tensor) -> None:
            self._calls.append((inputs, gradient.detach().flatten(0, -2)))

        return fold


@contextmanager
def _listening(listeners: Sequence[_Listener]) -> Iterator[None]:
    handles = [one.module.register_forward_hook(one.hook) for one in listeners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inner_products(
    samples: Sequence[GradientFactors], others: Sequence[GradientFactors] = ()
) -> Tensor:
    """Inner products of gradients of one matrix, by whichever exact way takes fewer operations.

    Args:
        samples: Gradients to multiply with each other.
        others: Gradients of the same matrix to multiply with the samples.

    Returns:
        (samples, samples + others) float64 on the CPU.
    """
    right = [*samples, *others]
    rows, columns = samples[0].output_gradients.shape[1], samples[0].inputs.shape[1]
    tokens, own = (sum(len(one.inputs) for one in side) for side in (right, samples))
    by_tokens = own * (tokens - own / 2) * (rows + columns)
    by_slices = (tokens + len(samples) * len(right)) * rows * columns
    way = _products_by_tokens if by_tokens < by_slices else _products_by_slices
    return way(right, len(samples)).cpu()


def _products_by_tokens(right: Sequence[GradientFactors], num_samples: int) -> Tensor:
    """Every pair of tokens: each sample with itself and all after it; the rest is symmetric."""
    inputs = _exact(torch.cat([one.inputs for one in right]))
    gradients = _exact(torch.cat([one.output_gradients for one in right]))
    lengths = torch.tensor([len(one.inputs) for one in right])
    owners = torch.repeat_interleave(torch.arange(len(right)), lengths).to(inputs.device)
    found = torch.zeros(num_samples, len(right), dtype=torch.float64, device=inputs.device)
    begin = 0
    for row, length in zip(found, lengths.tolist(), strict=False):
        pairs = inputs[begin : begin + length] @ inputs[begin:].T
        pairs *= gradients[begin : begin + length] @ gradients[begin:].T
        row.index_add_(0, owners[begin:], pairs.sum(0, dtype=torch.float64))
        begin += length
    own = found[:, :num_samples]
    own += own.triu(1).T
    return found


def _products_by_slices(right: Sequence[GradientFactors], num_samples: int) -> Tensor:
    """Some rows of all gradients at a time."""
    rows, columns = right[0].output_gradients.shape[1], right[0].inputs.shape[1]
    height = max(1, _MOST_SLICED // (len(right) * columns))
    device = right[0].inputs.device
    found = torch.zeros(num_samples, len(right), dtype=torch.float64, device=device)
    for begin in range(0, rows, height):
        slices = torch.stack(
            [
                (_exact(one.output_gradients[:, begin : begin + height]).T @ _exact(one.inputs))
                for one in right
            ]
        ).flatten(1)
        found += (slices[:num_samples] @ slices.T).double()
    return found


def _exact(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def datainf(products: Tensor, validation: Tensor, num_weights: int) -> Tensor:
    """How much the validation loss rises when each training sample weighs more.

    DataInf's closed form (Kwon et al., ICLR 2024), with its damping of 0.1 times the mean squared
    element of the gradients, written with inner products alone.

    Args:
        products: (samples, samples) float64 inner products of training gradients.
        validation: (samples,) float64 those with the validation gradient.
        num_weights: Of the matrix.

    Returns:
        (samples,) float64, negative where the sample helps; zeros where no gradient arrives.
    """
    squares = products.diagonal()
    damping = _DAMPING * squares.mean() / num_weights
    if damping == 0:
        return torch.zeros_like(validation)
    weights = validation / (damping + squares)
    return -(validation - products @ weights / len(weights)) / damping


def matrix_influences(
    train: Sequence[GradientFactors], validation: Sequence[GradientFactors], num_weights: int
) -> Tensor:
    """(samples,) influences through one matrix on the mean loss of the validation samples."""
    towards = GradientFactors(
        torch.cat([sample.inputs for sample in validation]),
        torch.cat([sample.output_gradients for sample in validation]) / len(validation),
    )
    products = inner_products(train, [towards])
    return datainf(products[:, :-1], products[:, -1], num_weights)


def block_score(influences: Tensor, variant: str) -> float:
    """LayerIF's score of a block: how much its training samples help, summed.

    Args:
        influences: (samples,) of the block, its matrices summed; negative where one helps.
        variant: ``positive`` for the samples that help, ``all``, or ``top`` for the quarter that
            helps most.
    """
    assert variant in VARIANTS, variant
    helpful = -influences
    if variant == "positive":
        helpful = helpful.clamp(min=0)
    elif variant == "top":
        helpful = helpful.topk(math.ceil(_TOP_SHARE * len(helpful))).values
    return float(helpful.sum())


def experts(scores: ArrayLike, total: int, beta: float = 2.5) -> NDArray[np.int64]:
    """LayerIF's numbers of adapter experts: one each, the others in proportion to ``score^beta``.

    Args:
        scores: (blocks,) of :func:`block_score`; signs are ignored.
        total: Experts of all blocks.
        beta: Larger ones favour the blocks of high score.

    Returns:
        (blocks,) at least 1 each, with the exact total by largest remainder.

    Raises:
        ValueError: Fewer experts than blocks, or scores that are not finite.
    """
    array = np.abs(np.asarray(scores, dtype=float))
    if total < len(array):
        raise ValueError(f"expected an expert for each of {len(array)} blocks, got {total} in all")
    if not np.isfinite(array).all():
        raise ValueError("experts: expected finite scores, got inf or NaN")
    shares = (array / (array.max() or 1.0)) ** beta
    shares = shares / shares.sum() if shares.any() else np.full(len(array), 1 / len(array))
    wanted = shares * (total - len(array))
    counts = np.floor(wanted).astype(np.int64)
    order = np.argsort(counts - wanted, kind="stable")
    counts[order[: total - len(array) - int(counts.sum())]] += 1
    return np.asarray(counts + 1)

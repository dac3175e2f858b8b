"""Measure with quantized caches: switched on for a model, and scored one at a time.

The problem: a cache has no weights to swap and none to estimate a loss from. :class:`CacheSwitch`
runs a model with a cache whose layers are quantized (:mod:`objectives.quantized_layer`), and
:class:`CacheLosses` measures what each option of each layer costs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from objectives.evaluation import mean
from objectives.task import Task, TokenMeter
from search_spaces.operators import AnyOperator, KVQuantize
from search_spaces.space import Member, SearchSpace, Unit

if TYPE_CHECKING:
    from objectives.bank import Bank
    from objectives.quantized_layer import Watch

NUM_SEQUENCES = 4


class CacheSwitch:
    """Runs a model with quantized caches, as long as some are chosen.

    While none is, the model is as if the switch were not there.

    Args:
        model: A model of ``transformers``; only asked for its layers when a cache is chosen.

    Attributes:
        watch: Told what the chosen caches store and read back, if set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.watch: Watch | None = None
        self._model = model
        self._chosen: dict[tuple[int, str], tuple[Member, KVQuantize]] = {}  # by layer and part
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def choose(self, unit: Unit, operator: AnyOperator) -> None:
        """Give a cache unit its operator; ``keep`` leaves its cache as it is."""
        for member in unit.members:
            layer = self._model.get_submodule(member.module).layer_idx
            assert isinstance(layer, int), member.module
            if isinstance(operator, KVQuantize):
                self._chosen[layer, member.parameter] = (member, operator)
            else:
                self._chosen.pop((layer, member.parameter), None)
        if not self._chosen:
            self.clear()
        elif self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._give_cache, with_kwargs=True)

    def clear(self) -> None:
        """Leave all caches as they are."""
        self._chosen = {}
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _give_cache(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from objectives.quantized_layer import quantized_cache  # loads transformers

        if kwargs.get("past_key_values") is not None:
            raise ValueError("a model whose quantized caches are swapped in takes no other cache")
        layers: dict[int, dict[str, KVQuantize]] = {}
        for (layer, part), (_, operator) in self._chosen.items():
            layers.setdefault(layer, {})[part] = operator
        cache = quantized_cache(model.config, layers, watch=self._see)
        return args, {**kwargs, "use_cache": True, "past_key_values": cache}

    def _see(self, layer: int, part: str, states: Tensor, read: Tensor) -> None:
        """What was priced must be what is stored."""
        if (layer, part) in self._chosen:
            member, _ = self._chosen[layer, part]
            if states.shape[2] != member.shape[2]:
                raise ValueError(
                    f"{member.name}: the plan prices {member.shape[2]} channels, "
                    f"the model caches {states.shape[2]}"
                )
            if self.watch is not None:
                self.watch(layer, part, states, read)


@dataclass(frozen=True)
class CacheLoss:
    """What quantizing one cache alone does.

    Attributes:
        nats: Measured loss per token with this cache quantized and everything else dense.
        relative_error: Squared error of the states that attention reads over their energy, summed
            over keys and values.
    """

    nats: float
    relative_error: float


class CacheLosses:
    """Measures caches one at a time on the first sequences of the statistics text, each once.

    Args:
        model: The model of the bank.
        task: Gives the loss.
        space: Units and menus.
        bank: Puts the weights back and holds the model's caches.
        meter: Where tokens are counted, as ``statistics_caches``.
    """

    def __init__(
        self, model: nn.Module, task: Task, space: SearchSpace, *, bank: Bank, meter: TokenMeter
    ) -> None:
        self._model = model
        self._task = task
        self._space = space
        self._bank = bank
        self._meter = meter
        self._known: dict[tuple[int, int], CacheLoss] = {}

    def __call__(self, unit: int, option: int) -> CacheLoss:
        """The loss of one option of one cache, everything else dense."""
        key = (unit, option)
        if key not in self._known:
            operator = self._space.menus[unit][option].operator
            lossless = not isinstance(operator, KVQuantize)
            self._known[key] = CacheLoss(0.0, 0.0) if lossless else self._measure(unit, operator)
        return self._known[key]

    def _measure(self, unit: int, operator: AnyOperator) -> CacheLoss:
        sums: dict[str, Tensor] = {}

        def watch(layer: int, part: str, states: Tensor, read: Tensor) -> None:
            del layer
            error = (read - states).float().square().sum(dtype=torch.float64)
            energy = states.float().square().sum(dtype=torch.float64)
            sums[part] = sums.get(part, 0) + torch.stack([error, energy])

        self._bank.restore()
        tokens = self._task.prepare(self._model, "statistics")
        count = min(NUM_SEQUENCES, self._task.num_sequences("statistics"))
        caches = self._bank.caches
        caches.watch = watch
        caches.choose(self._space.units[unit], operator)
        try:
            losses = self._task.sequence_losses(self._model, "statistics", range(count))
        finally:
            caches.watch = None
            caches.clear()
        tokens += count * self._task.tokens_per_sequence
        self._meter.add("statistics_caches", tokens)
        relative = sum(float(error / energy) for error, energy in sums.values() if energy != 0)
        # Rounding may put a lossless option below the dense model.
        return CacheLoss(max(mean(losses.nats), 0.0), relative)

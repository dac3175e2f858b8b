"""Compressed parameters by (unit, option), made once and swapped into a live model by reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from objectives.kv_cache import CacheSwitch
from objectives.tensor_store import CHEAP, MemoryPlan, TensorStore, plan_memory
from search_spaces.operators import AnyOperator, Statistics
from search_spaces.operators.members import compress_unit
from search_spaces.space import Assignment, SearchSpace

DEFAULT_BANK_BYTES = 4 * 2**30


class Bank:
    """Keeps compressed parameters where its memory plan says, the last used ones at hand.

    The model's own tensors are never written to: a swap points a parameter at another tensor, and
    ``restore`` points it back. Caches have no parameters; their options are switched on and off.

    Args:
        model: The dense model; its parameters at this moment are what is compressed.
        space: Units and menus.
        statistics: By member name, for operators that need them.
        most_bytes: Cap of the host memory held by compressed parameters.
        folder: Where those that are dear to make may be kept in mapped files, if anywhere.

    Attributes:
        caches: Runs the model with the caches that are swapped in.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace,
        *,
        statistics: Mapping[str, Statistics] | None = None,
        most_bytes: int = DEFAULT_BANK_BYTES,
        folder: Path | None = None,
    ) -> None:
        self.caches = CacheSwitch(model)
        self._space = space
        self._statistics = statistics or {}
        self._parameters = [
            tuple(model.get_parameter(m.name) for m in unit.members if not m.cache)
            for unit in space.units
        ]
        self._dense = [tuple(p.data for p in unit) for unit in self._parameters]
        self._current: list[int | None] = [None] * len(space.units)
        plan = plan_memory(model, space, most_bytes=most_bytes, folder=folder)
        self._store = TensorStore(plan, folder)

    @property
    def plan(self) -> MemoryPlan:
        """How much is kept where."""
        return self._store.plan

    def close(self) -> None:
        """Forget what is kept, and delete the files."""
        self._store.clear()

    @property
    def space(self) -> SearchSpace:
        """Units and menus."""
        return self._space

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """What operators compress with, by member name."""
        return self._statistics

    def use_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Compress with these from now on; what was compressed before is forgotten."""
        self._statistics = statistics
        self._store.clear()
        self.restore()

    def parameters(self, unit: int) -> tuple[nn.Parameter, ...]:
        """The live parameters of a unit."""
        return self._parameters[unit]

    def dense(self, unit: int) -> tuple[Tensor, ...]:
        """The dense parameters of a unit, in the model's layout."""
        return self._dense[unit]

    def compressed(self, unit: int, option: int) -> tuple[Tensor, ...]:
        """The parameters of a unit under an option, in the model's layout and dtype."""
        kept = self._store.get((unit, option))
        if kept is not None:
            return kept
        operator = self._space.menus[unit][option].operator
        made = self.make(unit, operator)
        self._store.put((unit, option), made, cheap=operator.name in CHEAP)
        return made

    def make(self, unit: int, operator: AnyOperator) -> tuple[Tensor, ...]:
        """Compress the dense parameters of a unit, without keeping the result.

        Raises:
            ValueError: The result is not finite. Fused attention kernels can hide that from the
                loss, so it is refused here.
        """
        found = self._space.units[unit]
        made = compress_unit(self._dense[unit], found, operator, self._statistics)
        for tensor, member in zip(made, found.members, strict=True):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{member.name} under {operator.label} is not finite")
        return made

    def swap(self, assignment: Assignment) -> None:
        """Point every unit's parameters at its option; only units that differ are touched."""
        self._space.check(assignment)
        for unit, option in enumerate(assignment):
            if self._current[unit] == option:
                continue
            self._current[unit] = None
            found = self._space.units[unit]
            if found.is_cache:
                self.caches.choose(found, self._space.menus[unit][option].operator)
            else:
                for parameter, tensor in zip(
                    self._parameters[unit], self.compressed(unit, option), strict=True
                ):
                    parameter.data = tensor
            self._current[unit] = option

    def restore(self) -> None:
        """Point every parameter back at its dense tensor, and leave the caches as they are."""
        self.caches.clear()
        for unit, (parameters, tensors) in enumerate(
            zip(self._parameters, self._dense, strict=True)
        ):
            for parameter, tensor in zip(parameters, tensors, strict=True):
                parameter.data = tensor
            self._current[unit] = None

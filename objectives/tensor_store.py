"""Compressed parameters in three tiers: the device, pinned host memory, mapped files.

The problem: a bank of every option of every unit is several times the model, and a device holds
perhaps half of it. A memory plan says how much goes where; what was used last stays on the device,
what was used before that moves down a tier, and what falls off the last one is made again. Options
that are cheap to make on the device (rounding, pruning) are never moved down: reading them back
would cost more than making them.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from objectives.tensor_file import write_tensors
from search_spaces.space import SearchSpace, Unit

CHEAP = frozenset({"keep", "round_to_nearest", "prune", "prune_n_m"})
"""Operators that take no longer to apply than their result takes to read back."""

_DEVICE_SHARE = 0.6  # of the device memory that is free once the model is there
_HOST_SHARE = 0.5  # of the host memory that is available
_FILE_SHARE = 0.5  # of the disk space that is free

Tensors = tuple[Tensor, ...]
Key = tuple[int, int]  # unit, option


@dataclass(frozen=True)
class MemoryPlan:
    """How many bytes of compressed parameters are kept where.

    Attributes:
        all_bytes: Every option of every unit, in the model's own precision.
        dear_bytes: Of those, what is worth keeping on a lower tier.
        device_bytes: Cap on the model's devices; host memory where the model is on the CPU.
        host_bytes: Cap in pinned host memory; 0 where the model is on the CPU.
        file_bytes: Cap in mapped files.
        each_bytes: Cap on each device by itself where the model is spread over several.
    """

    all_bytes: int
    dear_bytes: int
    device_bytes: int
    host_bytes: int = 0
    file_bytes: int = 0
    each_bytes: tuple[tuple[torch.device, int], ...] = ()

    def __str__(self) -> str:
        caps = [(size, f"on {device}") for device, size in self.each_bytes]
        caps = caps or [(self.device_bytes, "on the device")]
        caps += [(self.host_bytes, "in pinned host memory"), (self.file_bytes, "in mapped files")]
        where = ", ".join(f"{size / 2**30:.2f} GiB {place}" for size, place in caps if size)
        return (
            f"{self.all_bytes / 2**30:.2f} GiB of compressed parameters, "
            f"{self.dear_bytes / 2**30:.2f} of them dear to make; kept: {where or 'none'}"
        )


def plan_memory(
    model: nn.Module, space: SearchSpace, *, most_bytes: int, folder: Path | None
) -> MemoryPlan:
    """What fits where on this machine now.

    Args:
        model: Already on its device, or spread over several.
        space: Units and menus.
        most_bytes: Cap of host memory.
        folder: Where mapped files may go; ``None`` for nowhere.
    """
    element_size = next(model.parameters()).element_size()
    sizes = [
        (option.operator.name, _home(model, unit), unit.num_weights * element_size)
        for unit, menu in zip(space.units, space.menus, strict=True)
        if not unit.is_cache
        for option in menu
    ]
    dear_bytes = sum(size for name, _, size in sizes if name not in CHEAP)
    held: Counter[torch.device] = Counter()
    for _, device, size in sizes:
        held[device] += size
    host = min(most_bytes, int(_HOST_SHARE * psutil.virtual_memory().available))
    caps = {device: min(size, _most_on(device, host)) for device, size in held.items()}
    host = min(host, dear_bytes) if any(device.type == "cuda" for device in caps) else 0
    on_devices = sum(caps.values())
    left = max(0, dear_bytes - on_devices - host)
    disk = 0 if folder is None or not left else int(_FILE_SHARE * shutil.disk_usage(folder).free)
    each = tuple(caps.items()) if len(caps) > 1 else ()
    return MemoryPlan(
        held.total(), dear_bytes, on_devices, host, min(dear_bytes, disk), each_bytes=each
    )


def _home(model: nn.Module, unit: Unit) -> torch.device:
    """The device of a unit's weights; of the first where they are on several."""
    return model.get_parameter(unit.members[0].name).device


def _most_on(device: torch.device, host_bytes: int) -> int:
    """What compressed parameters may take there."""
    if device.type != "cuda":
        return host_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return int(_DEVICE_SHARE * free)


class _Tier(Protocol):
    """Holds tensors under a cap, least recently used out first."""

    def take(self, key: Key) -> Tensors | None:
        """What is held under a key, removed."""
        ...

    def give(self, key: Key, tensors: Tensors) -> list[tuple[Key, Tensors]]:
        """Hold tensors; returns what had to go for them, or them if they are too large."""
        ...


class _MemoryTier:
    """Tensors in memory; pinned if so asked, so that copies to a device need not wait."""

    def __init__(self, most_bytes: int, *, pinned: bool = False) -> None:
        self._most_bytes = most_bytes
        self._pinned = pinned
        self._held: OrderedDict[Key, Tensors] = OrderedDict()
        self._held_bytes = 0

    def look(self, key: Key) -> Tensors | None:
        """What is held under a key, which becomes the last used."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def take(self, key: Key) -> Tensors | None:
        tensors = self._held.pop(key, None)
        if tensors is not None:
            self._held_bytes -= _num_bytes(tensors)
        return tensors

    def give(self, key: Key, tensors: Tensors) -> list[tuple[Key, Tensors]]:
        size = _num_bytes(tensors)
        if size > self._most_bytes:
            return [(key, tensors)]
        dropped = []
        while self._held_bytes + size > self._most_bytes:
            oldest = next(iter(self._held))
            old = self.take(oldest)
            assert old is not None
            dropped.append((oldest, old))
        self._held[key] = tuple(_to_host(t) for t in tensors) if self._pinned else tensors
        self._held_bytes += size
        return dropped


class _FileTier:
    """Tensors in safetensors files of this process, mapped when read."""

    def __init__(self, most_bytes: int, folder: Path) -> None:
        self._most_bytes = most_bytes
        self._folder = folder / f"bank-{os.getpid()}"
        self._sizes: OrderedDict[Key, int] = OrderedDict()

    def take(self, key: Key) -> Tensors | None:
        """What a file holds; the file stays, since what it holds never changes."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        held = load_file(self._path(key))
        return tuple(held[str(index)] for index in range(len(held)))

    def give(self, key: Key, tensors: Tensors) -> list[tuple[Key, Tensors]]:
        size = _num_bytes(tensors)
        if key in self._sizes or size > self._most_bytes:
            return []
        while sum(self._sizes.values()) + size > self._most_bytes:
            oldest, _ = self._sizes.popitem(last=False)
            self._path(oldest).unlink()
        self._folder.mkdir(parents=True, exist_ok=True)
        named = {str(index): tensor.cpu() for index, tensor in enumerate(tensors)}
        write_tensors(named, self._path(key), what="compressed parameters")
        self._sizes[key] = size
        return []

    def clear(self) -> None:
        """Delete the files."""
        self._sizes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key[0]}-{key[1]}.safetensors"


class TensorStore:
    """Keeps tensors by (unit, option), the last used ones nearest to the device.

    Args:
        plan: Caps of the tiers.
        folder: Of the mapped files; needed if the plan has any.
    """

    def __init__(self, plan: MemoryPlan, folder: Path | None = None) -> None:
        self.plan = plan
        self._folder = folder
        self._make_tiers()

    def get(self, key: Key) -> Tensors | None:
        """What is kept, on the device it came from; ``None`` where it has to be made."""
        held = self._nearest(key).look(key)
        if held is not None:
            return held
        for tier in self._lower:
            if (found := tier.take(key)) is not None:
                pairs = zip(found, self._where[key], strict=True)
                moved = tuple(tensor.to(device) for tensor, device in pairs)
                self._give(key, moved)
                return moved
        return None

    def put(self, key: Key, tensors: Tensors, *, cheap: bool) -> None:
        """Keep tensors; those that are cheap to make never leave the device for another tier."""
        self._where[key] = tuple(tensor.device for tensor in tensors)
        if cheap:
            self._cheap.add(key)
        self._give(key, tensors)

    def clear(self) -> None:
        """Forget everything, files too."""
        for tier in self._lower:
            if isinstance(tier, _FileTier):
                tier.clear()
        self._make_tiers()

    def _make_tiers(self) -> None:
        self._device = _MemoryTier(self.plan.device_bytes)
        self._devices = {device: _MemoryTier(size) for device, size in self.plan.each_bytes}
        self._lower: list[_Tier] = []
        if self.plan.host_bytes:
            self._lower.append(_MemoryTier(self.plan.host_bytes, pinned=True))
        if self.plan.file_bytes:
            assert self._folder is not None
            self._lower.append(_FileTier(self.plan.file_bytes, self._folder))
        self._cheap: set[Key] = set()
        self._where: dict[Key, tuple[torch.device, ...]] = {}

    def _nearest(self, key: Key) -> _MemoryTier:
        """The tier on the device that what is kept under a key came from."""
        first = self._where.get(key, ())[:1]
        return self._devices.get(first[0], self._device) if first else self._device

    def _give(self, key: Key, tensors: Tensors) -> None:
        """Keep on the device; what has to go for it moves down, tier by tier."""
        falling = self._nearest(key).give(key, tensors)
        for tier in self._lower:
            dear = [pair for pair in falling if pair[0] not in self._cheap]
            falling = [further for pair in dear for further in tier.give(*pair)]


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _to_host(tensor: Tensor) -> Tensor:
    """In host memory, pinned where there is a device to copy to."""
    host = tensor.cpu()
    return host.pin_memory() if torch.cuda.is_available() else host

"""Where the parts of one model lie: device maps as users write them, and what came of them.

The problem: a model that fits on no single device can still be searched if its blocks lie on
several. Loading it so is the work of ``accelerate``, which brings each module's inputs to the
module's device; what measures must then put every tensor beside the weights that it meets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model that ``accelerate`` works out itself."""

DeviceMap = str | Mapping[str, str | int]
"""One of ``DEVICE_MAPS``, a device, or devices by module name (``""`` for all others)."""


def parse_device_map(text: str) -> str | dict[str, str | int]:
    """A device map as a user writes it: a word, or a JSON object of devices by module name.

    Raises:
        ValueError: It begins like an object and is none, or gives a module something else than a
            device.
    """
    if not text.lstrip().startswith("{"):
        return text
    wanted = 'devices by module name such as {"model.layers.0": 0, "": 1}'
    try:
        found: dict[str, str | int] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--device-map: expected {wanted}, got {text!r} ({error})") from error
    for name, place in found.items():
        if isinstance(place, bool) or not isinstance(place, str | int):
            raise ValueError(f"--device-map: expected {wanted}, got {place!r} for {name!r}")
    return found


def check_device_map(device_map: DeviceMap, device: str) -> tuple[str, ...]:
    """Refuse a map that is none, that stands beside a device, or that nothing could serve.

    Returns:
        The devices that it names, each once.

    Raises:
        ValueError: An unknown word, a device beside it, or ``accelerate`` is missing.
    """
    by_name = not isinstance(device_map, str) or device_map.partition(":")[0] in ("cpu", "cuda")
    if not by_name and device_map not in DEVICE_MAPS:
        words = ", ".join(DEVICE_MAPS)
        raise ValueError(
            f"expected the device map {words} or devices by module name, got {device_map!r}"
        )
    if device != "auto":
        raise ValueError(f"give a device map or the device {device!r}, not both")
    if find_spec("accelerate") is None:
        raise ValueError(
            "a device map needs accelerate: pip install 'model-allocator[device-map]', "
            "or stream the model on one device"
        )
    if isinstance(device_map, str):
        return () if device_map in DEVICE_MAPS else (device_map,)
    places = map(_device, device_map.values())
    return tuple(dict.fromkeys(place for place in places if place != "disk"))


def check_blocks(device_map: DeviceMap, model: nn.Module) -> None:
    """Refuse a map that splits a block: its states are kept and brought along block by block.

    Args:
        device_map: Words pass: ``accelerate`` keeps the blocks of a word's map whole.
        model: Its weights may be on the meta device.

    Raises:
        ValueError: A block would lie on several devices; with its name and theirs.
    """
    if isinstance(device_map, str):
        return
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for name, module in model.named_modules():
        if type(module).__name__ not in blocks:
            continue
        weights = (f"{name}.{weight}" for weight, _ in module.named_parameters())
        found = sorted({_place_of(weight, device_map) for weight in weights})
        if len(found) > 1:
            raise ValueError(
                f"the device map splits {name} between the devices {', '.join(found)}; "
                "give all of a block one device"
            )


def _place_of(weight: str, device_map: Mapping[str, str | int]) -> str:
    """The device of the longest name in the map that leads to a weight; empty where none does."""
    parts = weight.split(".")
    for length in range(len(parts), -1, -1):
        if (name := ".".join(parts[:length])) in device_map:
            return _device(device_map[name])
    return ""


def _device(place: str | int) -> str:
    """A device as torch names it."""
    return f"cuda:{place}" if isinstance(place, int) else place


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that a model's parameters lie on, each once, in their order."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))

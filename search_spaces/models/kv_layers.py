"""The cache of a model's attention layers as units: one per layer, or keys and values apart.

The problem: how many bytes a cache takes is in a model's configuration, not in its weights, under
names that differ between architectures; and layers differ: a sliding window caches no more tokens
than it sees, and layers that share another's keys cache nothing. What follows works on the meta
device, and refuses layers that cache something else than keys and values.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from search_spaces.models.geometry import head_dim
from search_spaces.operators import AnyOperator, Keep, KVQuantize
from search_spaces.operators.kv_cache import KEYS, VALUES
from search_spaces.space import Member, Unit

KV_MENU: tuple[AnyOperator, ...] = (*(KVQuantize(bits, bits) for bits in (2, 3, 4, 6, 8)), Keep())
"""What is offered for a cache unless a space file says otherwise."""


def cache_units(
    model: nn.Module, context: int, *, batch: int = 1, apart: bool = False
) -> tuple[Unit, ...]:
    """The units of a model's cache at a context and a batch.

    Args:
        model: A causal language model of ``transformers``, real or on the meta device.
        context: Tokens of each sequence.
        batch: Sequences.
        apart: Keys and values are units of their own, ``MODULE.keys.cache`` and
            ``MODULE.values.cache``, instead of one unit ``MODULE.cache``.

    Raises:
        ValueError: The configuration lacks what prices a cache, or a layer's is not one of keys
            and values.
    """
    if context < 1 or batch < 1:
        raise ValueError(f"expected a context and a batch of 1 or more, got {context} and {batch}")
    modules = attention_modules(model)
    units = []
    for layer, (window, config) in _layers(model).items():
        if layer not in modules:
            raise ValueError(f"{_name(model)}: no attention module says that it is layer {layer}")
        path = modules[layer]
        tokens = min(context, window) if window else context
        keys, values = (
            Member(path, part, (batch, tokens, _channels(model, config, path, part)), cache=True)
            for part in (KEYS, VALUES)
        )
        if apart:
            for member in (keys, values):
                kind = f"{member.parameter}_cache"
                units.append(Unit(f"{member.name}.cache", (member,), layer, kind))
        else:
            units.append(Unit(f"{path}.cache", (keys, values), layer, "cache"))
    return tuple(units)


def attention_modules(model: nn.Module) -> dict[int, str]:
    """Path of the attention module of each layer, by the layer's index in the cache."""
    return {
        module.layer_idx: name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
    }


def _layers(model: nn.Module) -> dict[int, tuple[int | None, Any]]:
    """(sliding window or ``None``, configuration) of each layer that has a cache of its own."""
    from transformers.cache_utils import (
        DummyLayer,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )

    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{_name(model)} has no configuration of transformers: no cache to price")
    config = config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{_name(model)} attends through latents: its cache cannot be priced yet")
    cached = DynamicCache(config=config).layers
    own: list[Any] = list(getattr(config, "per_layer_config", None) or [config] * len(cached))
    found: dict[int, tuple[int | None, Any]] = {}
    for layer, kind in enumerate(cached):
        if type(kind) is DynamicLayer:
            found[layer] = (None, own[layer])
        elif type(kind) is DynamicSlidingWindowLayer:
            found[layer] = (kind.sliding_window, own[layer])
        elif not isinstance(kind, DummyLayer):
            raise ValueError(
                f"{_name(model)}: layer {layer} keeps a {type(kind).__name__}, which is not a "
                "cache of keys and values only"
            )
    if not found:
        raise ValueError(f"{_name(model)} says nothing of its layers: its cache cannot be priced")
    return found


def _channels(model: nn.Module, config: Any, path: str, part: str) -> int:
    """Channels of a layer's keys or values: the cached heads times their width.

    Where keys and values are projected apart, the projection is as wide; a configuration may hold
    numbers that its architecture ignores.
    """
    projection = getattr(model.get_submodule(path), f"{part[0]}_proj", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    heads = getattr(config, "num_attention_heads", None)
    width = head_dim(config)
    cached = heads
    if hasattr(type(config), "num_key_value_heads"):
        cached = config.num_key_value_heads or heads
    # Falcon's newer architecture repeats its heads before it caches them.
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        cached = 1
    if not width or not cached:
        raise ValueError(
            f"{_name(model)}: its configuration lacks the heads that are cached or their width"
        )
    return int(cached * width)


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__

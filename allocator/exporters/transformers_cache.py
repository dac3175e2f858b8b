"""transformers: bits, groups and residual of every layer's cache, and the cache object itself.

The problem: no configuration of ``transformers`` can say this. Its ``QuantizedCache`` takes one
setting for all layers, and its own quantized layers (quanto: 2 and 4 bits; hqq: 1, 2, 3, 4 and 8)
one width for keys and values. But ``generate`` takes a cache object, so the plan is written as
JSON and :func:`load_cache` makes the object from it::

    cache = load_cache(Path("transformers_cache.json"), model.config)
    model.generate(**inputs, past_key_values=cache)

The layers are those that the plan was measured with: they store the packed codes, scales and
offsets that it priced. A cache serves one generation; load a new one, or call its ``reset``, for
the next. Assisted decoding is refused, since tokens cannot be taken back out of closed groups.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from allocator.exporters.base import DENSE, Mismatch, Receipt, read_mapping, write_text
from allocator.plan import Plan
from search_spaces.operators import AnyOperator, KVQuantize
from search_spaces.operators.kv_cache import KEYS, VALUES
from search_spaces.space import Member

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

FILE_NAME = "transformers_cache.json"

_FORMAT = "model-allocator cache"
_DENSE_BITS = 16
_NAMES = {"bits", "group_size", "residual"}

Setting = dict[str, int]
"""``bits``, and unless these are 16, ``group_size`` and ``residual``."""


class TransformersCacheExporter:
    """Writes ``transformers_cache.json``, from which :func:`load_cache` makes a cache."""

    name: ClassVar[str] = "transformers-cache"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``transformers_cache.json`` into a folder.

        Raises:
            ValueError: The plan decides no cache, or the folder cannot be written.
        """
        members = _members(plan)
        layers: dict[int, dict[str, Any]] = {}
        for layer, member, operator in members:
            entry = layers.setdefault(layer, {"layer": layer, "module": member.module})
            entry[member.parameter] = _setting(member.parameter, operator)
        batch, tokens = (max(member.shape[axis] for _, member, _ in members) for axis in (0, 1))
        data = {
            "format": _FORMAT,
            "batch": batch,
            "context": tokens,
            "cache_bytes": plan.cache_bytes,
            "layers": [layers[layer] for layer in sorted(layers)],
        }
        path = write_text(destination, FILE_NAME, json.dumps(data, indent=1) + "\n")
        num_units = sum(entry.unit.is_cache for entry in plan.units)
        notes = (
            "allocator.exporters.transformers_cache.load_cache makes a cache for generate from the "
            "file; transformers' own QuantizedCache has one setting for all layers and cannot.",
            "The file speaks of caches only: export or apply the plan's weights besides.",
        )
        return Receipt((path,), num_units, notes)

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare the settings that :func:`load_cache` would use with the plan.

        Raises:
            ValueError: The plan decides no cache, or the file is missing or cannot be read.
        """
        written = _read(artefact)
        mismatches = []
        for layer, member, operator in _members(plan):
            expected = _says(_setting(member.parameter, operator))
            got = _says(written.pop((layer, member.parameter), {"bits": _DENSE_BITS}))
            if got != expected:
                mismatches.append(Mismatch(member.name, expected, got))
        return mismatches + [
            Mismatch(f"{part} of layer {layer}", "not in the plan", _says(setting))
            for (layer, part), setting in sorted(written.items())
        ]


def load_cache(path: Path, config: Any) -> Cache:
    """An empty cache whose layers are quantized as an exported plan says.

    Args:
        path: ``transformers_cache.json``, or the folder that holds it.
        config: The configuration of the plan's model.

    Raises:
        ValueError: The file is missing or cannot be read, or speaks of layers that the model does
            not have.
    """
    from objectives.quantized_layer import quantized_cache

    layers: dict[int, dict[str, KVQuantize]] = {}
    for (layer, part), setting in _read(path).items():
        if setting["bits"] != _DENSE_BITS:
            operator = KVQuantize(
                setting["bits"], setting["bits"], setting["group_size"], setting["residual"]
            )
            layers.setdefault(layer, {})[part] = operator
    return quantized_cache(config, layers)


def _members(plan: Plan) -> list[tuple[int, Member, AnyOperator]]:
    """(layer, keys or values, operator) of every cache of a plan."""
    found = [
        (entry.depth or 0, member, entry.choice)
        for entry in plan.units
        if entry.unit.is_cache
        for member in entry.unit.members
    ]
    if not found:
        raise ValueError("the plan decides no cache: search with --context to put one in")
    return found


def _setting(part: str, operator: AnyOperator) -> Setting:
    if not isinstance(operator, KVQuantize):
        return {"bits": _DENSE_BITS}
    bits = operator.key_bits if part == KEYS else operator.value_bits
    return {"bits": bits, "group_size": operator.group_size, "residual": operator.residual}


def _says(setting: Setting) -> str:
    if setting["bits"] == _DENSE_BITS:
        return DENSE
    return KVQuantize(
        setting["bits"], setting["bits"], setting["group_size"], setting["residual"]
    ).label


def _read(artefact: Path) -> dict[tuple[int, str], Setting]:
    """The file's settings by layer and part."""
    data = read_mapping(artefact, FILE_NAME)
    if data.get("format") != _FORMAT:
        raise ValueError(f"{artefact}: its format is {data.get('format')!r}, not {_FORMAT!r}")
    found: dict[tuple[int, str], Setting] = {}
    try:
        for entry in data["layers"]:
            for part in (KEYS, VALUES):
                setting = entry[part]
                names = {"bits"} if setting["bits"] == _DENSE_BITS else _NAMES
                if set(setting) != names or any(type(v) is not int for v in setting.values()):
                    raise ValueError(f"expected {', '.join(sorted(names))} as integers")
                _says(setting)  # refuses values that no operator takes
                found[int(entry["layer"]), part] = setting
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{artefact}: not a cache of layers ({error!r})") from error
    return found

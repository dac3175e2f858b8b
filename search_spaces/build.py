"""Build the search space of a model from what a user asked for.

The problem: presets, space files and the command line all say which units may become what. Here
they meet: units are discovered, tied, excluded, pinned and given their menus, and a wish that
touches nothing (a misspelt pattern) is an error rather than a silent no-op.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from search_spaces.models import discover
from search_spaces.models.geometry import head_dim
from search_spaces.models.kv_layers import KV_MENU, cache_units
from search_spaces.operators import AnyOperator, Keep, KVQuantize
from search_spaces.presets import PRESETS
from search_spaces.registry import unknown_name
from search_spaces.space import SearchSpace, Unit, build_menu
from search_spaces.storage import StoredTensor
from search_spaces.ties import tie_units
from search_spaces.yaml_space import SpaceFile, load_space_file

logger = logging.getLogger(__name__)

_DENSE_DTYPE = "BF16"
_NUM_NAMES_SHOWN = 3


@dataclass(frozen=True)
class SpaceRequest:
    """What a user asked for. Patterns are globs over unit, module and parameter names.

    Attributes:
        space: A preset's name or the path of a YAML space file.
        ties: A runtime, or ``None`` for the file's own (``none`` for presets).
        pins: (glob, operator label) pairs; a label is that of an operator in the menus or
            ``keep``. They override the file's pins on the units they match.
        exclude: Globs of units that stay dense, besides the file's.
        open_units: ``embeddings`` and ``head``, besides the file's.
        bar_keep: Offer no dense option.
        context: Tokens of each sequence for which the model's cache counts in the budget; 0 leaves
            it out. It is searched where the space says so and stays at 16 bits elsewhere.
        batch: Sequences of the cache.
        apart: Choose for keys and values apart.
    """

    space: str = "bits"
    ties: str | None = None
    pins: tuple[tuple[str, str], ...] = ()
    exclude: tuple[str, ...] = ()
    open_units: tuple[str, ...] = ()
    bar_keep: bool = False
    context: int = 0
    batch: int = 1
    apart: bool = False


def build_space(model: nn.Module, request: SpaceRequest) -> SearchSpace:
    """The search space of a model, priced to the byte.

    Args:
        model: Real or on the meta device.
        request: What may be chosen.

    Raises:
        ValueError: Unknown preset, runtime or label; a faulty space file; a pattern that matches
            no unit; pins that contradict each other or an exclusion; nothing left to search.
    """
    wish = _load(request.space, request.context)
    ties = request.ties or wish.ties
    found = discover(model, open_units={*wish.open, *request.open_units}, dense_dtype=_DENSE_DTYPE)
    caches = _caches(model, request, wish)
    units = (*tie_units(found.units, ties), *caches)
    excluded = {
        unit.name
        for pattern in (*wish.exclude, *request.exclude)
        for unit in _matching(units, pattern, "exclude")
    }
    geometry = head_dim(getattr(model, "config", None))
    menus = _menus(units, wish, geometry, bar_keep=request.bar_keep or not wish.keep)
    by_label = _by_label((*menus.values(), KV_MENU) if caches else menus.values())
    ours = [(pattern, _labelled(label, by_label)) for pattern, label in request.pins]
    theirs = [
        (pattern, _labelled(pin, by_label) if isinstance(pin, str) else pin)
        for pattern, pin in wish.pins.items()
    ]
    pins = {**_pinned(units, theirs), **_pinned(units, ours)}
    if both := sorted(excluded & set(pins)):
        raise ValueError(f"unit {both[0]!r} is both pinned and excluded; drop one of the two")
    for cache in caches:
        if cache.name in excluded:  # it stays dense, but in the budget: it is in no file
            excluded.remove(cache.name)
            pins[cache.name] = Keep()
    for unit in units:
        if unit.name in pins and (reason := _unfit(unit, pins[unit.name], model)):
            raise ValueError(f"pin of {unit.name!r} to {pins[unit.name].label}: {reason}")
    searched = tuple(unit for unit in units if unit.name not in excluded)
    free = {unit.name: menus[unit.name] for unit in searched if unit.name not in pins}
    usable = _usable(searched, free, model)
    return SearchSpace(
        wish.name,
        searched,
        tuple(
            build_menu(unit, (pins[unit.name],) if unit.name in pins else usable[unit.name])
            for unit in searched
        ),
        found.fixed + _dense(model, [unit for unit in units if unit.name in excluded]),
        ties,
    )


def _load(space: str, context: int) -> SpaceFile:
    """A preset or a file, in the form of a file.

    A preset for weights and caches does without the caches when there is no context.
    """
    if space in PRESETS:
        preset = PRESETS[space]
        kv = preset.kv and (context > 0 or preset.operators == (Keep(),))
        return SpaceFile(name=space, menu=preset.operators, ties=preset.ties, kv=kv)
    if space.endswith((".yaml", ".yml")) or os.path.exists(space):
        return load_space_file(Path(space))
    raise ValueError(unknown_name("space", space, list(PRESETS)) + "; or give a .yaml file")


def _caches(model: nn.Module, request: SpaceRequest, wish: SpaceFile) -> tuple[Unit, ...]:
    """The model's cache as units, if there is a context that it is for."""
    if request.context:
        return cache_units(model, request.context, batch=request.batch, apart=request.apart)
    if wish.kv:
        raise ValueError(
            f"the space {wish.name!r} searches the model's cache: say for how many tokens "
            "(--context)"
        )
    if request.batch != 1 or request.apart:
        raise ValueError("batch and apart speak of the model's cache: give its context too")
    return ()


def bind_geometry(operator: AnyOperator, channels: int) -> AnyOperator:
    """The operator knowing the channels of a head, if it asks and was not told."""
    if getattr(operator, "head_dim", None) != 0:
        return operator
    bound: AnyOperator = replace(operator, head_dim=channels)  # type: ignore[type-var]
    return bound


def _unfit(unit: Unit, operator: AnyOperator, model: nn.Module) -> str:
    """Why an operator cannot serve a unit of this model, or nothing if it can."""
    if operator.name == "modegpt":
        for member in unit.members:
            path, _, leaf = member.module.rpartition(".")
            parent = model.get_submodule(path)
            own = dict(parent.named_parameters())
            if leaf == "q_proj" and {"q_norm.weight", "q_proj.bias"} & own.keys():
                return "its heads have norms or biases of queries and keys, which cannot shrink"
    return unit.unfit(operator)


def _usable(
    units: Sequence[Unit], menus: Mapping[str, tuple[AnyOperator, ...]], model: nn.Module
) -> dict[str, tuple[AnyOperator, ...]]:
    """The menus without options that a unit cannot take or that keeping it dense dominates.

    An option as large as the dense matrix can only lose. What is left out is logged.

    Raises:
        ValueError: Nothing is left of a menu.
    """
    unfit: dict[str, str] = {}
    dropped = [0, 0]
    usable = {}
    for unit in units:
        if unit.name not in menus:
            continue
        offered = menus[unit.name]
        dense = min((unit.bytes(o) for o in offered if o.name == "keep"), default=None)
        kept = []
        for operator in offered:
            if reason := _unfit(unit, operator, model):
                dropped[0] += 1
                unfit.setdefault(operator.label, f"{operator.label} on {unit.name}: {reason}")
            elif dense is not None and operator.name != "keep" and unit.bytes(operator) >= dense:
                dropped[1] += 1
            else:
                kept.append(operator)
        if not kept:
            reasons = "; ".join(unfit.values()) or "all are as large as the dense matrix"
            raise ValueError(f"no option of the menu serves {unit.name!r} ({reasons})")
        usable[unit.name] = tuple(kept)
    if unfit:
        first = next(iter(unfit.values()))
        logger.warning("%d options do not fit their units, such as %s", dropped[0], first)
    if dropped[1]:
        logger.warning("%d options are no smaller than the dense matrix: left out", dropped[1])
    return usable


def _menus(
    units: Sequence[Unit], wish: SpaceFile, channels: int, *, bar_keep: bool
) -> dict[str, tuple[AnyOperator, ...]]:
    """Operators by unit: the last matching menu, without repeats, with or without ``Keep``."""
    cached: tuple[AnyOperator, ...] = KV_MENU if wish.kv else (Keep(),)
    chosen = {unit.name: cached if unit.is_cache else wish.menu for unit in units}
    for entry in wish.menus:
        meant = _meant(units, entry.units, "menus", operators=entry.menu)
        chosen.update((unit.name, entry.menu) for unit in meant)
    menus: dict[str, tuple[AnyOperator, ...]] = {}
    for unit in units:
        name, operators = unit.name, chosen[unit.name]
        if unit.is_cache and operators == (Keep(),):
            menus[name] = operators  # not searched, so there is nothing to bar
            continue
        kept = [operator for operator in operators if not (bar_keep and operator.name == "keep")]
        if not bar_keep and all(operator.name != "keep" for operator in kept):
            kept.append(Keep())
        if not kept:
            raise ValueError(f"the menu of {name!r} offers nothing but keep, which is barred")
        bound = (bind_geometry(operator, channels) for operator in kept)
        menus[name] = tuple(dict.fromkeys(bound))
    return menus


def _by_label(menus: Iterable[tuple[AnyOperator, ...]]) -> dict[str, AnyOperator]:
    """Operators that a pin can name: all that any menu offers, and ``keep`` even when barred."""
    by_label: dict[str, AnyOperator] = {}
    for operator in (*(operator for menu in dict.fromkeys(menus) for operator in menu), Keep()):
        by_label.setdefault(operator.label, operator)
    return by_label


def _labelled(label: str, by_label: Mapping[str, AnyOperator]) -> AnyOperator:
    if label not in by_label:
        raise ValueError(unknown_name("operator label", label, sorted(by_label)))
    return by_label[label]


def _pinned(
    units: Sequence[Unit], pins: Sequence[tuple[str, AnyOperator]]
) -> dict[str, AnyOperator]:
    """The pinned operator by unit name; two pins on one unit must agree."""
    pinned: dict[str, tuple[str, AnyOperator]] = {}
    for pattern, operator in pins:
        for unit in _meant(units, pattern, "pin", operators=(operator,)):
            other, before = pinned.setdefault(unit.name, (pattern, operator))
            if before != operator:
                raise ValueError(
                    f"unit {unit.name!r} is pinned to {before.label} by {other!r} and to "
                    f"{operator.label} by {pattern!r}; make them agree"
                )
    return {name: operator for name, (_, operator) in pinned.items()}


def _meant(
    units: Sequence[Unit], pattern: str, what: str, *, operators: Sequence[AnyOperator]
) -> list[Unit]:
    """Units that a glob matches and operators are for: caches and weights share names, not those.

    Raises:
        ValueError: There is none.
    """
    sorts = {isinstance(o, KVQuantize) for o in operators if not isinstance(o, Keep)}
    matched = _matching(units, pattern, what)
    if not sorts:
        return matched
    meant = [unit for unit in matched if unit.is_cache in sorts]
    if not meant:
        kind, other = ("caches", "weights") if True in sorts else ("weights", "caches")
        raise ValueError(f"{what}: {operators[0].label} is for {kind}, {pattern!r} means {other}")
    return meant


def _matching(units: Sequence[Unit], pattern: str, what: str) -> list[Unit]:
    """Units with a name that a glob matches: their own, or a member's module or parameter.

    Raises:
        ValueError: There is none.
    """
    matched = [unit for unit in units if any(fnmatchcase(n, pattern) for n in _names(unit))]
    if matched:
        return matched
    # A glob is compared with the ends of names that have as many parts as it spells out.
    spelt = pattern.strip("*.?")
    num_parts = spelt.count(".") + 1
    ends = {".".join(n.split(".")[-num_parts:]) for unit in units for n in _names(unit)}
    close = difflib.get_close_matches(spelt, sorted(ends), n=1)
    suggestion = f" (did you mean '*.{close[0]}'?)" if close else ""
    shown = ", ".join(unit.name for unit in units[:_NUM_NAMES_SHOWN])
    raise ValueError(
        f"{what}: {pattern!r} matches none of the {len(units)} units{suggestion}; "
        f"they are named like {shown}"
    )


def _names(unit: Unit) -> tuple[str, ...]:
    """Everything that addresses a unit."""
    members = (name for member in unit.members for name in (member.module, member.name))
    return tuple(dict.fromkeys((unit.name, *members)))


def _dense(model: nn.Module, units: Sequence[Unit]) -> tuple[StoredTensor, ...]:
    """The dense tensors of units that are not searched, as they lie in the model."""
    return tuple(
        StoredTensor(member.name, _DENSE_DTYPE, tuple(model.get_parameter(member.name).shape))
        for unit in units
        for member in unit.members
    )

"""Build the search space of a model from what a user asked for.

The problem: presets, space files and the command line all say which units may become what. Here
they meet: units are discovered, tied, excluded, pinned and given their menus, and a wish that
touches nothing (a misspelt pattern) is an error rather than a silent no-op.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from search_spaces.models import discover
from search_spaces.operators import Keep, Operator
from search_spaces.presets import PRESETS
from search_spaces.registry import unknown_name
from search_spaces.space import SearchSpace, Unit, build_menu
from search_spaces.storage import StoredTensor
from search_spaces.ties import tie_units
from search_spaces.yaml_space import SpaceFile, load_space_file

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
    """

    space: str = "bits"
    ties: str | None = None
    pins: tuple[tuple[str, str], ...] = ()
    exclude: tuple[str, ...] = ()
    open_units: tuple[str, ...] = ()
    bar_keep: bool = False


def build_space(model: nn.Module, request: SpaceRequest) -> SearchSpace:
    """The search space of a model, priced to the byte.

    Args:
        model: Real or on the meta device.
        request: What may be chosen.

    Raises:
        ValueError: Unknown preset, runtime or label; a faulty space file; a pattern that matches
            no unit; pins that contradict each other or an exclusion; nothing left to search.
    """
    wish = _load(request.space)
    ties = request.ties or wish.ties
    found = discover(model, open_units={*wish.open, *request.open_units}, dense_dtype=_DENSE_DTYPE)
    units = tie_units(found.units, ties)
    excluded = {
        unit.name
        for pattern in (*wish.exclude, *request.exclude)
        for unit in _matching(units, pattern, "exclude")
    }
    menus = _menus(units, wish, bar_keep=request.bar_keep or not wish.keep)
    by_label = _by_label(menus.values())
    ours = [(pattern, _labelled(label, by_label)) for pattern, label in request.pins]
    theirs = [
        (pattern, _labelled(pin, by_label) if isinstance(pin, str) else pin)
        for pattern, pin in wish.pins.items()
    ]
    pins = {**_pinned(units, theirs), **_pinned(units, ours)}
    if both := sorted(excluded & set(pins)):
        raise ValueError(f"unit {both[0]!r} is both pinned and excluded; drop one of the two")
    searched = tuple(unit for unit in units if unit.name not in excluded)
    return SearchSpace(
        wish.name,
        searched,
        tuple(
            build_menu(unit, (pins[unit.name],) if unit.name in pins else menus[unit.name])
            for unit in searched
        ),
        found.fixed + _dense(model, [unit for unit in units if unit.name in excluded]),
        ties,
    )


def _load(space: str) -> SpaceFile:
    """A preset or a file, in the form of a file."""
    if space in PRESETS:
        return SpaceFile.model_validate({"name": space, "menu": space})
    if space.endswith((".yaml", ".yml")) or os.path.exists(space):
        return load_space_file(Path(space))
    raise ValueError(unknown_name("space", space, list(PRESETS)) + "; or give a .yaml file")


def _menus(
    units: Sequence[Unit], wish: SpaceFile, *, bar_keep: bool
) -> dict[str, tuple[Operator, ...]]:
    """Operators by unit: the last matching menu, without repeats, with or without ``Keep``."""
    chosen = dict.fromkeys((unit.name for unit in units), wish.menu)
    for entry in wish.menus:
        chosen.update((u.name, entry.menu) for u in _matching(units, entry.units, "menus"))
    menus = {}
    for name, operators in chosen.items():
        kept = [operator for operator in operators if not (bar_keep and operator.name == "keep")]
        if not bar_keep and all(operator.name != "keep" for operator in kept):
            kept.append(Keep())
        if not kept:
            raise ValueError(f"the menu of {name!r} offers nothing but keep, which is barred")
        menus[name] = tuple(dict.fromkeys(kept))
    return menus


def _by_label(menus: Iterable[tuple[Operator, ...]]) -> dict[str, Operator]:
    """Operators that a pin can name: all that any menu offers, and ``keep`` even when barred."""
    by_label: dict[str, Operator] = {}
    for operator in (*(operator for menu in dict.fromkeys(menus) for operator in menu), Keep()):
        by_label.setdefault(operator.label, operator)
    return by_label


def _labelled(label: str, by_label: Mapping[str, Operator]) -> Operator:
    if label not in by_label:
        raise ValueError(unknown_name("operator label", label, sorted(by_label)))
    return by_label[label]


def _pinned(units: Sequence[Unit], pins: Sequence[tuple[str, Operator]]) -> dict[str, Operator]:
    """The pinned operator by unit name; two pins on one unit must agree."""
    pinned: dict[str, tuple[str, Operator]] = {}
    for pattern, operator in pins:
        for unit in _matching(units, pattern, "pin"):
            other, before = pinned.setdefault(unit.name, (pattern, operator))
            if before != operator:
                raise ValueError(
                    f"unit {unit.name!r} is pinned to {before.label} by {other!r} and to "
                    f"{operator.label} by {pattern!r}; make them agree"
                )
    return {name: operator for name, (_, operator) in pinned.items()}


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

"""Options of searches by name: from words and plain numbers to the dataclasses that searches take.

The problem: every search has options with defaults, and a run's configuration holds plain data. A
search takes its options as further parameters whose defaults are dataclasses, and nothing else has
to be declared: their fields are the options. One such parameter needs no prefix; of several, as the
default search has, each gives its name (``descent.attempts``), and so does a dataclass in a field.
Where the dataclass has a class method ``published``, ``schedule=published`` starts from what it
returns instead of from the defaults, and its parameters are options too.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from search_spaces.registry import unknown_name

Scalar = bool | int | float | str
"""What an option's value is before its type is known; a list is written with commas."""

_SCHEDULES = ("default", "published")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One option of a search.

    Attributes:
        hint: Its type.
        default: Its value where nothing is said; empty where it must be given.
        published: It is a parameter of ``published`` and means nothing without.
    """

    hint: Any
    default: Any
    published: bool = False

    def __str__(self) -> str:
        if self.default is not _REQUIRED and get_origin(self.hint) is not Literal:
            return _word(self.default)
        choices = get_args(self.hint) if get_origin(self.hint) is Literal else ("required",)
        return "|".join(map(str, choices))


def options_of(factory: Callable[..., Any]) -> dict[str, Option]:
    """The options of a search, in the order in which it declares them."""
    found: dict[str, Option] = {}
    for prefix, defaults in _parts(factory).values():
        found |= _fields(defaults, prefix)
        found |= _schedule(type(defaults), prefix)
    return found


def configured(
    name: str, factory: Callable[..., Any], values: Mapping[str, Scalar]
) -> dict[str, Any]:
    """The parameters of a search besides its setting, where any value is given.

    Args:
        name: Of the search, for messages.
        factory: The search.
        values: Options by name, without the search's name.

    Raises:
        ValueError: An unknown option, or a value that it cannot take.
    """
    known = options_of(factory)
    if values and not known:
        raise ValueError(f"the search {name} has no options, got {', '.join(values)}")
    for key in values:
        if key not in known:
            raise ValueError(unknown_name(f"option of the search {name}", key, list(known)))
    try:
        given = {key: _converted(key, value, known[key].hint) for key, value in values.items()}
        return {
            parameter: _made(defaults, prefix, given)
            for parameter, (prefix, defaults) in _parts(factory).items()
            if any(key.startswith(prefix) for key in given)
        }
    except ValueError as error:
        raise ValueError(f"options of the search {name}: {error}") from error


def split_options(
    names: Collection[str], options: Mapping[str, Scalar]
) -> dict[str, dict[str, Scalar]]:
    """Which of several searches each option is for, by its prefix; one search needs none.

    Raises:
        ValueError: An option of several searches without a prefix, or one that is given twice.
    """
    found: dict[str, dict[str, Scalar]] = {name: {} for name in names}
    (first, *others) = names
    for key, value in options.items():
        owner, _, own = key.partition(".")
        if owner not in found or not own:
            if others:
                raise ValueError(
                    f"the option {key} is for none of {', '.join(names)}: begin it with the name "
                    f"of the search, such as {first}.{key}"
                )
            owner, own = first, key
        if own in found[owner]:
            raise ValueError(f"the option {own} of the search {owner} is given twice")
        found[owner][own] = value
    return found


def parse_options(words: Collection[str]) -> dict[str, Scalar]:
    """KEY=VALUE, repeated, as a mapping; a value that is no JSON number or truth value is a word.

    Raises:
        ValueError: A word is something else, or a key is given twice.
    """
    found: dict[str, Scalar] = {}
    for word in words:
        key, separator, text = (part.strip() for part in word.partition("="))
        if not separator or not key or not text:
            raise ValueError(
                f"--search-option expects KEY=VALUE such as same_size_only=true, got {word!r}"
            )
        if key in found:
            raise ValueError(f"--search-option {key} is given twice")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        found[key] = value if isinstance(value, bool | int | float) else text
    return found


def _parts(factory: Callable[..., Any]) -> dict[str, tuple[str, Any]]:
    """For each parameter that holds options: the prefix of their names, and their defaults."""
    parameters = inspect.signature(factory).parameters
    held = {name: p.default for name, p in parameters.items() if _holds_fields(p.default)}
    return {name: (f"{name}." if len(held) > 1 else "", default) for name, default in held.items()}


def _holds_fields(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _fields(defaults: Any, prefix: str) -> dict[str, Option]:
    """The fields of a dataclass that words can say, those of dataclasses in it included."""
    hints = get_type_hints(type(defaults))
    found: dict[str, Option] = {}
    for field in fields(defaults):
        value, key = getattr(defaults, field.name), prefix + field.name
        if _holds_fields(value):
            found |= _fields(value, f"{key}.")
        elif _sayable(hints[field.name]):
            found[key] = Option(hints[field.name], value)
    return found


def _schedule(kind: type, prefix: str) -> dict[str, Option]:
    """The option ``schedule`` and what the published one needs to know, where there is one."""
    published = getattr(kind, "published", None)
    if published is None:
        return {}
    hints = get_type_hints(published)
    found = {f"{prefix}schedule": Option(Literal[_SCHEDULES], "default")}
    for name, parameter in inspect.signature(published).parameters.items():
        found[prefix + name] = Option(hints[name], parameter.default, published=True)
    return found


def _made(defaults: Any, prefix: str, given: Mapping[str, Any]) -> Any:
    """The options with the given values; checked by their own class."""
    base, changes = _base(defaults, prefix, given), {}
    for field in fields(base):
        key = prefix + field.name
        value = getattr(base, field.name)
        if _holds_fields(value):
            changes[field.name] = _made(value, f"{key}.", given)
        elif key in given:
            changes[field.name] = given[key]
    return replace(base, **changes)


def _base(defaults: Any, prefix: str, given: Mapping[str, Any]) -> Any:
    """What the given values change: the defaults, or the published schedule."""
    options = {k: o for k, o in _schedule(type(defaults), prefix).items() if o.published}
    parameters = {key: given[key] for key in options if key in given}
    if given.get(f"{prefix}schedule") != "published":
        for key in parameters:
            raise ValueError(f"{key} belongs to the published schedule: add schedule=published")
        return defaults
    for key, option in options.items():
        if option.default is _REQUIRED and key not in parameters:
            raise ValueError(f"schedule=published needs {key}={option}")
    return type(defaults).published(
        **{key.removeprefix(prefix): value for key, value in parameters.items()}
    )


def _sayable(hint: Any) -> bool:
    """Whether a word or a number says a value of this type."""
    if get_origin(hint) in (UnionType, Union):
        return all(part is NoneType or _sayable(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return len(parts) == 2 and parts[1] is ... and parts[0] in _EXPECTED
    return hint in _EXPECTED or get_origin(hint) is Literal


def _converted(key: str, value: Scalar, hint: Any) -> Any:
    """A value as its option's type.

    Raises:
        ValueError: It is none.
    """
    try:
        return _as(value, hint)
    except ValueError:
        expected = _expectation(hint)
        raise ValueError(f"{key}: expected {expected}, got {_word(value)!r}") from None


def _as(value: Scalar, hint: Any) -> Any:
    if get_origin(hint) in (UnionType, Union):
        if value == "none":
            return None
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return _as(value, inner)
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        words = value.split(",") if isinstance(value, str) else [value]
        return tuple(_as(_scalar(word) if inner is not str else word, inner) for word in words)
    if get_origin(hint) is Literal:
        fits = value in get_args(hint)
    elif hint is float:
        fits = type(value) in (int, float) and math.isfinite(float(value))
        value = float(value) if fits else value
    else:
        fits = type(value) is hint
    if not fits:
        raise ValueError(value)
    return value


def _scalar(word: Scalar) -> Scalar:
    """A part of a list as a number, where it is one."""
    return word if not isinstance(word, str) else parse_options([f"part={word}"])["part"]


def _expectation(hint: Any) -> str:
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(
            "none" if part is NoneType else _expectation(part) for part in get_args(hint)
        )
    if get_origin(hint) is tuple:
        return f"{_EXPECTED[get_args(hint)[0]]} or several with commas"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return _EXPECTED[hint]


def _word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

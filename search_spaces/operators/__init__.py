"""Operators: one file per way to compress, and the table that names them.

Adding one is one new file and one line below; the conformance tests then run on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from search_spaces.operators.base import Matrix, Operator, Statistics
from search_spaces.operators.keep import Keep
from search_spaces.operators.round_to_nearest import RoundToNearest
from search_spaces.registry import Registry

__all__ = [
    "OPERATORS",
    "Keep",
    "Matrix",
    "Operator",
    "RoundToNearest",
    "Statistics",
    "operator_from_json",
    "operator_to_json",
]

OPERATORS: Registry[type[Operator]] = Registry(
    "operator",
    {
        "keep": Keep,
        "round_to_nearest": RoundToNearest,
    },
    entry_point_group="model_allocator.operators",
)


def operator_to_json(operator: Operator) -> dict[str, Any]:
    """The operator's name and parameters as plain data."""
    values = {field.name: getattr(operator, field.name) for field in fields(_dataclass(operator))}
    return {"name": operator.name, **values}


def operator_from_json(data: Mapping[str, Any]) -> Operator:
    """The operator that :func:`operator_to_json` wrote.

    Raises:
        ValueError: The name is missing or unknown, a parameter is unknown or has the wrong type,
            or the operator refuses its value.
    """
    if not isinstance(data.get("name"), str):
        raise ValueError(f"operator: expected a mapping with a 'name', got {data!r}")
    kind = OPERATORS[data["name"]]
    parameters = {key: value for key, value in data.items() if key != "name"}
    known = {field.name: field.type for field in fields(_dataclass(kind))}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(
                f"operator {data['name']!r} has no parameter {key!r}; "
                f"it takes {', '.join(known) or 'none'}"
            )
        _check_type(data["name"], key, value, str(known[key]))
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"operator {data['name']!r}: {error}") from error


def _dataclass(operator: object) -> Any:
    """Operators are dataclasses by contract, which their protocol cannot say."""
    return operator


def _check_type(operator: str, key: str, value: object, annotation: str) -> None:
    """Refuse a JSON value of another type than the field's (true is not 1 here)."""
    expected: tuple[type, ...] = {
        "int": (int,),
        "float": (float, int),
        "bool": (bool,),
    }.get(annotation, (str,))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise ValueError(f"operator {operator!r}: {key} must be {annotation}, got {value!r}")

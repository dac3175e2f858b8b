"""JSON Schema of operators, so that editors can complete and check a space file. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from search_spaces.operators import OPERATORS

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


def operator_schemas() -> dict[str, Any]:
    """One definition per operator, and ``operator`` for any of them; references are local."""
    definitions: dict[str, Any] = {name: _operator_schema(name) for name in OPERATORS}
    definitions["matrix_operator"] = _any(
        name for name in OPERATORS if not hasattr(OPERATORS[name], "layout_unit")
    )
    definitions["operator"] = _any(OPERATORS)
    return definitions


def _any(names: Iterable[str]) -> dict[str, Any]:
    return {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}


def _operator_schema(name: str) -> dict[str, Any]:
    """Fields with their types and defaults, as the dataclass declares them."""
    kind: Any = OPERATORS[name]
    properties: dict[str, Any] = {"name": {"const": name}}
    required = ["name"]
    for field in fields(kind):
        if field.type == "Operator":
            schema: dict[str, Any] = {"$ref": "#/$defs/matrix_operator"}
        else:
            schema = {"type": _TYPES.get(str(field.type), "string")}
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
        elif isinstance(field.default, bool | int | float | str):
            schema["default"] = field.default
        properties[field.name] = schema
    summary = (kind.__doc__ or "").split("\n\n")[0].strip()
    return {
        "type": "object",
        "description": summary,
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }

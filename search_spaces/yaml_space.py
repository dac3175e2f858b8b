"""Spaces written by hand, as YAML. No torch.

The problem: a space file comes from a user, so a typo must not silently change what is searched,
and a hostile file must not harm. Only plain YAML is read (no tags, aliases, merge keys or repeated
keys, at most 1 MB), patterns are globs, and every error is one sentence with its line.

A file with everything in it::

    name: attention-first
    menu: bits                      # a preset, or a list of operators
    keep: true                      # offer the dense matrix too
    menus:                          # for some units another menu; later entries win
      - units: "*.down_proj"
        menu:
          - {name: round_to_nearest, bits: 4, group_size: 32}
          - {name: round_to_nearest, bits: 6, group_size: 32}
    pins:
      "*.layers.0.*": int8-g64      # the label of an operator in the menus, or an operator
    exclude: ["*.layers.29.*"]
    open: [embeddings]
    ties: vllm
    kv: true                        # search the bits of the model's cache too; needs a context
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
)

from search_spaces.operator_schema import operator_schemas
from search_spaces.operators import AnyOperator, Operator, UnitOperator, operator_from_json
from search_spaces.presets import PRESETS
from search_spaces.ties import TIES

_MOST_BYTES = 2**20


def _operator(value: object) -> AnyOperator:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an operator such as {{name: keep}}, got {value!r}")
    return operator_from_json(value)


def _menu(value: object) -> tuple[AnyOperator, ...]:
    if isinstance(value, tuple) and all(isinstance(o, Operator | UnitOperator) for o in value):
        return value  # from Python
    if isinstance(value, str):
        return PRESETS[value].operators
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected the name of a preset or a list of operators, got {value!r}")
    return tuple(_operator(item) for item in value)


def _pin(value: object) -> AnyOperator | str:
    return value if isinstance(value, str) else _operator(value)


def _ties(value: str) -> str:
    TIES[value]
    return value


_OPERATOR = {"const": "any operator"}  # pydantic takes no references of ours: put in at the end
Operators = Annotated[
    SkipValidation[tuple[AnyOperator, ...]],
    PlainValidator(_menu),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(PRESETS), "type": "string"},
                {"type": "array", "items": _OPERATOR, "minItems": 1},
            ]
        }
    ),
]
Pin = Annotated[
    SkipValidation[AnyOperator | str],
    PlainValidator(_pin),
    WithJsonSchema({"anyOf": [{"type": "string"}, _OPERATOR]}),
]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True
    )


class PatternMenu(_Strict):
    """The menu of the units that a glob matches."""

    units: str
    menu: Operators


class SpaceFile(_Strict):
    """What a space file says; the module's docstring shows one.

    Attributes:
        name: The space's name in plans and reports.
        menu: Operators offered for every unit.
        keep: Whether the dense matrix is offered too; false bars it from every menu.
        menus: Other menus for some units; the last match wins.
        pins: Glob -> the one operator of the units it matches, or its label.
        exclude: Globs of units that stay dense and outside the budgeted choice.
        open: ``embeddings`` and ``head``, where they are to be searched.
        ties: The runtime whose fused kernels tie matrices together.
        kv: Whether the bits of the model's cache are searched; a context must be asked for then.
            The caches' menu is :data:`search_spaces.models.kv_layers.KV_MENU` unless ``menus`` has
            another for units named ``*.cache``.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    menu: Operators
    keep: bool = True
    menus: list[PatternMenu] = []
    pins: dict[str, Pin] = {}
    exclude: list[str] = []
    open: list[Literal["embeddings", "head"]] = []
    ties: Annotated[str, AfterValidator(_ties)] = "none"
    kv: bool = False


def space_json_schema() -> dict[str, Any]:
    """The JSON Schema of a space file, for editors."""
    text = json.dumps(SpaceFile.model_json_schema())
    text = text.replace(json.dumps(_OPERATOR), json.dumps({"$ref": "#/$defs/operator"}))
    schema: dict[str, Any] = json.loads(text)
    definitions = schema.get("$defs", {}) | operator_schemas()
    return schema | {"title": "model-allocator search space", "$defs": definitions}


def load_space_file(path: Path) -> SpaceFile:
    """Read and check a space file.

    Raises:
        ValueError: Unreadable, too large, not plain YAML, a repeated or unknown field, an unknown
            operator, preset or runtime. One sentence with the file and the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read the space file {path}: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path}: larger than {_MOST_BYTES} bytes, not a space file")
    try:
        loader = _PlainLoader(content.decode("utf-8"))
        root = loader.get_single_node()
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        quotes = "; quote patterns that begin with *" if "alias" in str(error) else ""
        raise ValueError(f"{path}, line {line}: {error.problem}{quotes}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not plain YAML text ({type(error).__name__})") from error
    if root is None or not isinstance(data, dict):
        raise ValueError(f"{path}, line 1: expected a mapping with name and menu, got {data!r:.60}")
    try:
        return SpaceFile.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"])
        line = _line_of(root, first["loc"])
        source = content.decode("utf-8").splitlines()[line - 1].strip()
        raise ValueError(f"{path}, line {line}: {where}: {message} (in {source!r})") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, merge keys and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _marked("aliases are not allowed", self.current_event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _marked("expected a word or quoted text as key", key.start_mark)
            if key.value in seen:
                raise _marked(f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return node


def _marked(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _line_of(node: yaml.Node, location: Sequence[int | str]) -> int:
    """Line of the deepest node on the way to a place in the data."""
    line = node.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1

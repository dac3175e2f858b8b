"""Operators: one file per way to compress, and the table that names them.

Adding one is one new file and one line below; the conformance tests then run on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from search_spaces.operators.base import (
    Matrix,
    Operator,
    PackedOperator,
    Statistics,
    UnitOperator,
)
from search_spaces.operators.clipped_round import ClippedRound
from search_spaces.operators.codebook import Codebook
from search_spaces.operators.decoupled import DecoupledRound
from search_spaces.operators.dense_and_sparse import DenseAndSparse
from search_spaces.operators.dictionary import Dictionary
from search_spaces.operators.gguf_block import GGUFBlock
from search_spaces.operators.gptq import GPTQ
from search_spaces.operators.keep import Keep
from search_spaces.operators.kronecker import Kronecker
from search_spaces.operators.kv_cache import KVQuantize
from search_spaces.operators.low_rank import LowRank
from search_spaces.operators.low_rank_plus import LowRankPlus
from search_spaces.operators.low_rank_sparse_columns import LowRankSparseColumns
from search_spaces.operators.modegpt import MoDeGPT
from search_spaces.operators.normal_float import NormalFloat
from search_spaces.operators.power_of_two import PowerOfTwo
from search_spaces.operators.prune import Prune, PruneNM
from search_spaces.operators.pyramid import Pyramid
from search_spaces.operators.residual_stack import ResidualStack
from search_spaces.operators.round_to_nearest import RoundToNearest
from search_spaces.operators.row_prune import RowPrune
from search_spaces.operators.shrink import Shrink
from search_spaces.operators.sparse_gpt import SparseGPT
from search_spaces.registry import Registry

__all__ = [
    "GPTQ",
    "OPERATORS",
    "AnyOperator",
    "ClippedRound",
    "Codebook",
    "DecoupledRound",
    "DenseAndSparse",
    "Dictionary",
    "GGUFBlock",
    "KVQuantize",
    "Keep",
    "Kronecker",
    "LowRank",
    "LowRankPlus",
    "LowRankSparseColumns",
    "Matrix",
    "MoDeGPT",
    "NormalFloat",
    "Operator",
    "PackedOperator",
    "PowerOfTwo",
    "Prune",
    "PruneNM",
    "Pyramid",
    "ResidualStack",
    "RoundToNearest",
    "RowPrune",
    "Shrink",
    "SparseGPT",
    "Statistics",
    "UnitOperator",
    "operator_from_json",
    "operator_to_json",
]

AnyOperator = Operator | UnitOperator

OPERATORS: Registry[type[AnyOperator]] = Registry(
    "operator",
    {
        "clipped_round": ClippedRound,
        "decoupled": DecoupledRound,
        "gptq": GPTQ,
        "gguf": GGUFBlock,
        "keep": Keep,
        "kv_quantize": KVQuantize,
        "low_rank_plus": LowRankPlus,
        "low_rank_sparse_columns": LowRankSparseColumns,
        "residual_stack": ResidualStack,
        "prune": Prune,
        "prune_n_m": PruneNM,
        "normal_float": NormalFloat,
        "codebook": Codebook,
        "dense_and_sparse": DenseAndSparse,
        "pyramid": Pyramid,
        "power_of_two": PowerOfTwo,
        "round_to_nearest": RoundToNearest,
        "row_prune": RowPrune,
        "shrink": Shrink,
        "sparse_gpt": SparseGPT,
        "dictionary": Dictionary,
        "kronecker": Kronecker,
        "low_rank": LowRank,
        "modegpt": MoDeGPT,
    },
    entry_point_group="model_allocator.operators",
)


def operator_to_json(operator: AnyOperator) -> dict[str, Any]:
    """The operator's name and parameters as plain data; nested operators as nested mappings."""
    values = {field.name: getattr(operator, field.name) for field in fields(_dataclass(operator))}
    plain = {
        key: operator_to_json(value) if isinstance(value, Operator | UnitOperator) else value
        for key, value in values.items()
    }
    return {"name": operator.name, **plain}


def operator_from_json(data: Mapping[str, Any]) -> AnyOperator:
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
        if known[key] == "Operator":
            parameters[key] = _nested(data["name"], key, value)
        else:
            _check_type(data["name"], key, value, str(known[key]))
    try:
        return kind(**parameters)
    except TypeError as error:
        raise ValueError(f"operator {data['name']!r}: {error}") from error


def _nested(operator: str, key: str, value: object) -> Operator:
    """An operator inside another: its field's type is ``Operator``."""
    if not isinstance(value, Mapping):
        raise ValueError(f"operator {operator!r}: {key} must be an operator, got {value!r}")
    made = operator_from_json(value)
    if not isinstance(made, Operator):
        raise ValueError(f"operator {operator!r}: {key} cannot be {made.name}, which takes a unit")
    return made


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

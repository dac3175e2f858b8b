"""What may be chosen: units, their menus, and the bytes that are not up for choice.

The problem this file solves: searches, solvers, exporters and reports must agree on one exact
meaning of "a choice" and of its bytes. Everything here is frozen plain data that loads without
torch; a space is its JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from search_spaces.operators import (
    AnyOperator,
    Operator,
    UnitOperator,
    operator_from_json,
    operator_to_json,
)
from search_spaces.storage import (
    Shape,
    StoredTensor,
    header_base_bound,
    header_entry_bound,
    payload_bytes,
    safetensors_bytes,
)
from search_spaces.uniform import uniform

Assignment = tuple[int, ...]
"""One option index per unit, in the space's order."""


@dataclass(frozen=True)
class Member:
    """One parameter of a unit, or the keys or values that an attention layer caches.

    Attributes:
        module: Path of the module that owns the parameter, as in ``model.named_modules()``.
        parameter: Its name inside the module, ``weight`` for most; ``keys`` or ``values``.
        shape: (rows, columns) or (matrices, rows, columns) for fused experts. Rows are outputs,
            whatever the layout in memory. Of a cache: (batch, tokens, channels).
        transposed: The parameter holds (columns, rows), as GPT-2's Conv1D does.
        cache: No parameter but a cache: it takes memory while the model runs and is not in its
            file.
    """

    module: str
    parameter: str
    shape: Shape
    transposed: bool = False
    cache: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(f"{self.name}: expected a matrix or a stack of them, got {self.shape}")

    @property
    def name(self) -> str:
        """The parameter's full name in the model."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def num_matrices(self) -> int:
        """1, or the number of stacked experts."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of each matrix."""
        return self.shape[-2], self.shape[-1]

    @property
    def num_weights(self) -> int:
        """Weights in all matrices."""
        return prod(self.shape)

    def layout(self, operator: Operator) -> tuple[StoredTensor, ...]:
        """The stored tensors of this parameter under an operator, with their names in a file.

        A dense parameter keeps its own name; compressed ones are stored as ``NAME.codes`` and so
        on. Stacked experts are stored as stacks of their tensors.
        """
        stored = []
        for tensor in operator.layout(self.matrix_shape):
            stack = () if len(self.shape) == 2 else (self.num_matrices,)
            name = self.name if tensor.name == "weight" else f"{self.name}.{tensor.name}"
            stored.append(StoredTensor(name, tensor.dtype, stack + tensor.shape))
        return tuple(stored)


@dataclass(frozen=True)
class Unit:
    """The piece that gets one choice: a matrix, or matrices tied together.

    Attributes:
        name: How people and plans address it, unique in its space.
        members: The parameters that share the choice.
        depth: Index of the block it sits in; ``None`` for embeddings and heads.
        kind: Its projection class, such as ``q_proj``; units of one kind are alike across depth.
    """

    name: str
    members: tuple[Member, ...]
    depth: int | None
    kind: str

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(f"unit {self.name!r} has no members")

    @property
    def num_weights(self) -> int:
        """Weights in all members; a cache has none."""
        return sum(member.num_weights for member in self.members if not member.cache)

    @property
    def num_elements(self) -> int:
        """Weights, or elements of a cache."""
        return sum(member.num_weights for member in self.members)

    @property
    def is_cache(self) -> bool:
        """Whether the unit is a layer's cache and not part of the model's file."""
        return self.members[0].cache

    def unfit(self, operator: AnyOperator) -> str:
        """Why the operator cannot serve this unit, or nothing if it can."""
        if isinstance(operator, UnitOperator):
            return operator.unfit_unit(self.members)
        if self.is_cache and operator.name != "keep":
            return f"{self.name} is a cache, which takes kv_quantize or keep"
        reasons = (operator.unfit(member.matrix_shape) for member in self.members)
        return next(filter(None, reasons), "")

    def bytes(self, operator: AnyOperator) -> int:
        """Payload bytes of the whole unit under one operator."""
        if isinstance(operator, UnitOperator):
            return payload_bytes(operator.layout_unit(self.members))
        return sum(
            operator.bytes(member.matrix_shape) * member.num_matrices for member in self.members
        )

    def layout(self, operator: AnyOperator) -> tuple[StoredTensor, ...]:
        """All stored tensors of the unit under one operator."""
        if isinstance(operator, UnitOperator):
            return operator.layout_unit(self.members)
        return tuple(tensor for member in self.members for tensor in member.layout(operator))


@dataclass(frozen=True)
class Option:
    """An operator as offered for one unit, with its exact payload bytes."""

    operator: AnyOperator
    bytes: int


Menu = tuple[Option, ...]


@dataclass(frozen=True)
class SearchSpace:
    """All units and menus, and what else the stored model holds.

    Bytes add up: a stored model is ``bytes(assignment) + fixed_bytes + container_bytes`` at most,
    where the first is exact, the second the dense tensors that are not searched, and the last an
    upper bound of the file's header that holds for every assignment. ``stored_bytes`` is the exact
    size of one assignment's file and, where caches are searched, of its caches.

    Attributes:
        name: The preset or file it came from.
        units: What is searched, in the model's order.
        menus: For each unit its options, ordered by bytes. A pinned unit has one option.
        fixed: Dense tensors that are not up for choice; tied parameters appear once.
        ties: The runtime whose fused kernels decided the tied groups, or ``none``.
    """

    name: str
    units: tuple[Unit, ...]
    menus: tuple[Menu, ...]
    fixed: tuple[StoredTensor, ...]
    ties: str = "none"

    def __post_init__(self) -> None:
        if not self.units:
            raise ValueError("the space has no units: every matrix is excluded or fixed")
        if len(self.units) != len(self.menus):
            raise ValueError(f"{len(self.units)} units but {len(self.menus)} menus")
        names = [unit.name for unit in self.units]
        if len(set(names)) != len(names):
            raise ValueError("unit names must be unique")
        for unit, menu in zip(self.units, self.menus, strict=True):
            if not menu:
                raise ValueError(f"unit {unit.name!r} has an empty menu")

    @cached_property
    def num_weights(self) -> int:
        """Weights in the searched units: the denominator of bits per weight."""
        return sum(unit.num_weights for unit in self.units)

    @cached_property
    def has_caches(self) -> bool:
        """Whether any unit is a layer's cache."""
        return any(unit.is_cache for unit in self.units)

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """For each unit the names of its options."""
        return tuple(tuple(option.operator.label for option in menu) for menu in self.menus)

    @cached_property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics that some operator of some menu needs."""
        return frozenset().union(*(o.operator.needs for menu in self.menus for o in menu))

    @cached_property
    def fixed_bytes(self) -> int:
        """Payload of the tensors that are not searched."""
        return sum(tensor.bytes for tensor in self.fixed)

    @cached_property
    def container_bytes(self) -> int:
        """Upper bound of the file's header over all assignments."""
        pairs = zip(self.units, self.menus, strict=True)
        weights = [(unit, menu) for unit, menu in pairs if not unit.is_cache]
        most = self.fixed_bytes + sum(menu[-1].bytes for _, menu in weights)
        most += 4096 + 512 * (len(self.fixed) + 8 * len(weights))
        bound = header_base_bound(self.metadata)
        bound += sum(header_entry_bound(tensor, most) for tensor in self.fixed)
        for unit, menu in weights:
            bound += max(
                sum(header_entry_bound(tensor, most) for tensor in unit.layout(option.operator))
                for option in menu
            )
        return bound

    @property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of a packed file."""
        return {"format": "model-allocator"}

    @cached_property
    def least_bytes(self) -> int:
        """Searched payload when every unit takes its cheapest option."""
        return sum(min(option.bytes for option in menu) for menu in self.menus)

    @cached_property
    def most_bytes(self) -> int:
        """Searched payload when every unit takes its dearest option."""
        return sum(max(option.bytes for option in menu) for menu in self.menus)

    @property
    def overhead_bytes(self) -> int:
        """What a stored model holds besides the searched payload, at most."""
        return self.fixed_bytes + self.container_bytes

    @cached_property
    def depths(self) -> int:
        """Number of blocks that hold units."""
        return len({unit.depth for unit in self.units if unit.depth is not None})

    def check(self, assignment: Assignment) -> None:
        """Raise ``ValueError`` unless the assignment names an option of every unit."""
        if len(assignment) != len(self.units):
            raise ValueError(f"expected {len(self.units)} choices, got {len(assignment)}")
        for unit, menu, index in zip(self.units, self.menus, assignment, strict=True):
            if not 0 <= index < len(menu):
                raise ValueError(f"unit {unit.name!r} has {len(menu)} options, got index {index}")

    def bytes(self, assignment: Assignment) -> int:
        """Exact payload bytes of the searched units."""
        self.check(assignment)
        return sum(menu[i].bytes for menu, i in zip(self.menus, assignment, strict=True))

    def bits_per_weight(self, searched_bytes: int) -> float:
        """Searched payload as bits per searched weight; 0 where no weights are searched."""
        return 8 * searched_bytes / self.num_weights if self.num_weights else 0.0

    def weight_bits(self, assignment: Assignment) -> float:
        """Bits per searched weight of an assignment, its caches left out."""
        return self.bits_per_weight(self.bytes(assignment) - self.cache_bytes(assignment))

    def operators(self, assignment: Assignment) -> tuple[AnyOperator, ...]:
        """The chosen operator of each unit."""
        self.check(assignment)
        return tuple(menu[i].operator for menu, i in zip(self.menus, assignment, strict=True))

    def stored_tensors(self, assignment: Assignment) -> tuple[StoredTensor, ...]:
        """Every tensor of the packed file under an assignment."""
        chosen = zip(self.units, self.operators(assignment), strict=True)
        return self.fixed + tuple(
            tensor
            for unit, operator in chosen
            if not unit.is_cache
            for tensor in unit.layout(operator)
        )

    def cache_bytes(self, assignment: Assignment) -> int:
        """Exact bytes of the caches that are searched; they are in memory, not in the file."""
        self.check(assignment)
        return sum(
            menu[i].bytes
            for unit, menu, i in zip(self.units, self.menus, assignment, strict=True)
            if unit.is_cache
        )

    def stored_bytes(self, assignment: Assignment) -> int:
        """Exact size of the packed safetensors file, header included, and of searched caches."""
        file = safetensors_bytes(self.stored_tensors(assignment), self.metadata)
        return file + self.cache_bytes(assignment)

    def uniform(self, searched_bytes: int) -> Assignment | None:
        """The most generous uniform assignment: see :func:`search_spaces.uniform.uniform`."""
        return uniform(self, searched_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_json` makes an equal space."""
        return {
            "name": self.name,
            "ties": self.ties,
            "units": [asdict(unit) for unit in self.units],
            "menus": [[operator_to_json(o.operator) for o in menu] for menu in self.menus],
            "fixed": [asdict(tensor) for tensor in self.fixed],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """The space that :meth:`to_json` wrote; bytes are priced anew."""
        units = tuple(
            Unit(
                unit["name"],
                tuple(
                    Member(
                        m["module"],
                        m["parameter"],
                        tuple(m["shape"]),
                        m["transposed"],
                        m["cache"],
                    )
                    for m in unit["members"]
                ),
                unit["depth"],
                unit["kind"],
            )
            for unit in data["units"]
        )
        menus = tuple(
            build_menu(unit, [operator_from_json(o) for o in menu])
            for unit, menu in zip(units, data["menus"], strict=True)
        )
        fixed = tuple(StoredTensor(t["name"], t["dtype"], tuple(t["shape"])) for t in data["fixed"])
        return cls(data["name"], units, menus, fixed, data["ties"])

    @cached_property
    def sha256(self) -> str:
        """Hash of the space's JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def build_menu(unit: Unit, operators: Sequence[AnyOperator]) -> Menu:
    """Price the operators for a unit and order them by bytes, then label.

    Raises:
        ValueError: The same operator is offered twice.
    """
    if len(set(operators)) != len(operators):
        raise ValueError(f"the menu of {unit.name!r} offers an operator twice")
    options = [Option(operator, unit.bytes(operator)) for operator in operators]
    return tuple(sorted(options, key=lambda option: (option.bytes, option.operator.label)))

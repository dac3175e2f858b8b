"""Tie the matrices that a runtime's fused kernels force to one format. No torch.

The problem: a serving engine that runs q, k and v as one matrix product reads one quantization
scheme for all three, so a plan that gives them different ones cannot be served there. Tied
matrices become one unit with one choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from search_spaces.families import fusible_projections
from search_spaces.registry import Registry
from search_spaces.space import Unit


@dataclass(frozen=True)
class Ties:
    """What one runtime fuses.

    Attributes:
        summary: One line for lists.
        fusible: Name of a fused projection -> the sibling modules it is made of.
        experts: Whether all experts of a layer, up and down alike, share one format.
    """

    summary: str
    fusible: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: bool = False


TIES: Registry[Ties] = Registry(
    "runtime",
    {
        "none": Ties("every matrix has its own choice"),
        "vllm": Ties(
            "q/k/v, gate/up and the experts of a layer share a choice",
            fusible_projections(),
            experts=True,
        ),
        "modules": Ties(
            "q/k/v/o share a choice, and so do the matrices of a feed-forward block",
            {
                "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
                "mlp": ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
            },
        ),
        "llama.cpp": Ties("every matrix has its own choice: GGUF types are per tensor"),
    },
    entry_point_group="model_allocator.ties",
)


def tie_units(units: Sequence[Unit], runtime: str) -> tuple[Unit, ...]:
    """Merge the units that a runtime fuses; each group stands where its first member stood.

    Args:
        units: One matrix each, in the model's order, as discovered.
        runtime: A name of ``TIES``.

    Raises:
        ValueError: Unknown runtime.
    """
    ties = TIES[runtime]
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault(_group_of(unit, ties), []).append(unit)
    return tuple(
        members[0] if len(members) == 1 else _merge(path, fused, members, ties)
        for (path, fused), members in groups.items()
    )


def _group_of(unit: Unit, ties: Ties) -> tuple[str, str]:
    """(path of the common parent, fused name); a unit that is not fused is its own group."""
    parts = unit.name.split(".")
    if ties.experts and "experts" in parts[:-1]:
        return ".".join(parts[: parts.index("experts") + 1]), "experts"
    for fused, siblings in ties.fusible.items():
        if parts[-1] in siblings:
            return ".".join(parts[:-1]), fused
    return unit.name, ""


def _merge(path: str, fused: str, units: Sequence[Unit], ties: Ties) -> Unit:
    """One unit of several, named ``PATH.{q,k,v}_proj``, or by its path for experts."""
    members = tuple(member for unit in units for member in unit.members)
    prefix = units[0].kind.rpartition(".")[0]
    if fused == "experts":
        kind = ".".join(prefix.split(".")[: prefix.split(".").index("experts") + 1])
        return Unit(path, members, units[0].depth, kind)
    present = {unit.name.rpartition(".")[2] for unit in units}
    ordered = [name for name in ties.fusible[fused] if name in present]
    name = ".".join(filter(None, (path, _braced(ordered))))
    return Unit(name, members, units[0].depth, ".".join(filter(None, (prefix, fused))))


def _braced(names: Sequence[str]) -> str:
    """``{q,k,v}_proj`` for ``q_proj``, ``k_proj``, ``v_proj``."""
    heads, _, tails = zip(*(name.rpartition("_") for name in names), strict=True)
    if len(set(tails)) == 1:
        return f"{{{','.join(heads)}}}_{tails[0]}"
    return f"{{{','.join(names)}}}"

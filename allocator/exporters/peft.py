"""PEFT: ``adapter_config.json`` with a LoRA rank per module.

The problem: fine-tuning wants capacity where the model is hard to compress, and a rank that a plan
gives a matrix measures that. PEFT keeps one regular expression per module for its rank and another
for its alpha, takes the first that matches, gives every other targeted module its default and
ignores a pattern that matches nothing. So patterns are whole, escaped names, and reading back
applies its rules to every module the plan knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import multimode
from typing import Any, ClassVar

from allocator.exporters.base import (
    DENSE,
    Mismatch,
    Receipt,
    fixed_modules,
    num_weight_units,
    read_mapping,
    write_text,
)
from allocator.plan import Plan, PlanUnit
from search_spaces.operators import Keep, LowRank
from search_spaces.space import Member

FILE_NAME = "adapter_config.json"


class PeftExporter:
    """Writes a LoRA configuration with the ranks of a plan under ``low_rank`` and ``keep``."""

    name: ClassVar[str] = "peft"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``adapter_config.json``; every alpha equals its rank, so that adapters scale by 1.

        Raises:
            ValueError: An operator other than ``low_rank`` and ``keep``, no matrix under the
                former, one that is no module's weight, or a folder that cannot be written.
        """
        ranks = {member.module: rank for _, member, rank in _ranks(plan) if rank}
        if not ranks:
            raise ValueError("peft: no unit of the plan is under low_rank, so no module has a rank")
        patterns = {f"^{re.escape(module)}": rank for module, rank in ranks.items()}
        most_common = min(multimode(ranks.values()))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": plan.model.name,
            "fan_in_fan_out": any(member.transposed for _, member, rank in _ranks(plan) if rank),
            "r": most_common,
            "lora_alpha": most_common,
            "target_modules": list(ranks),
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
        }
        path = write_text(destination, FILE_NAME, json.dumps(config, indent=1) + "\n")
        note = (
            "PEFT adds adapters of these ranks to the dense matrices, for fine-tuning; to store "
            "and run the matrices at these ranks, export to factorised."
        )
        return Receipt((path,), num_weight_units(plan), (note,))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Apply PEFT's rules to every module of the plan and compare.

        Raises:
            ValueError: The file is missing, or PEFT could not read it.
        """
        config = read_mapping(artefact, FILE_NAME)
        _check(config)
        mismatches = []
        modules = set()
        for entry, member, rank in _ranks(plan):
            modules.add(member.module)
            expected, got = _says(rank, rank), _adapter(config, member.module)
            if expected != got:
                unit = entry.name
                place = unit if unit == member.module else f"{unit} ({member.module})"
                mismatches.append(Mismatch(place, expected, got))
        for module in fixed_modules(plan):
            modules.add(module)
            if (got := _adapter(config, module)) != DENSE:
                mismatches.append(Mismatch(module, DENSE, got))
        unknown = [] if isinstance(config["target_modules"], str) else config["target_modules"]
        return mismatches + [
            Mismatch(target, "not in the plan", _adapter(config, target))
            for target in unknown
            if not any(_targets(target, module) for module in modules)
        ]


def _ranks(plan: Plan) -> Iterator[tuple[PlanUnit, Member, int]]:
    """Every weight matrix with its rank, 0 where it is kept.

    Raises:
        ValueError: Something that a rank does not say.
    """
    for entry in plan.units:
        operator = entry.choice
        if entry.unit.is_cache:
            continue
        if not isinstance(operator, Keep | LowRank):
            raise ValueError(
                f"peft cannot say {operator.label!r} (unit {entry.name!r}): it takes low_rank and "
                "keep"
            )
        for member in entry.unit.members:
            if isinstance(operator, Keep):
                yield entry, member, 0
            elif member.parameter != "weight" or len(member.shape) != 2:
                raise ValueError(
                    f"peft ranks are of weight matrices of modules: it cannot say anything about "
                    f"{member.name!r} of shape {list(member.shape)}"
                )
            else:
                yield entry, member, operator.rank(member.matrix_shape)


def _check(config: dict[str, Any]) -> None:
    """Refuse what PEFT's own reading would trip over."""
    targets = config.get("target_modules")
    if not isinstance(targets, str | list):
        raise ValueError(f"peft: target_modules must be a list or an expression, got {targets!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.setdefault(name, {})
        if not isinstance(patterns, dict):
            raise ValueError(f"peft: {name} must be a mapping, got {patterns!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"peft: {name}: {pattern!r} is no expression ({error})") from error


def _adapter(config: dict[str, Any], module: str) -> str:
    """What PEFT would put on a module."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        hit = re.fullmatch(targets, module) is not None
    else:
        hit = any(_targets(target, module) for target in targets)
    if not hit:
        return DENSE
    return _says(
        _first(config["rank_pattern"], module, config.get("r", 8)),
        _first(config["alpha_pattern"], module, config.get("lora_alpha", 8)),
    )


def _targets(target: str, module: str) -> bool:
    """PEFT's rule for a list: the name itself or the end of it."""
    return module == target or module.endswith(f".{target}")


def _first(patterns: dict[str, Any], module: str, default: object) -> object:
    """PEFT's rule: the first pattern that matches at a dot and to the end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _says(rank: object, alpha: object) -> str:
    return f"rank {rank}, alpha {alpha}" if rank else DENSE

"""GPTQModel, and vLLM reading its configuration: ``quantize_config.json`` with per-module rules.

The problem: a ``dynamic`` rule is a regular expression matched from the start of the name and not
to its end, the first match wins, and a rule that matches nothing is silent. Every rule here is
anchored at both ends, escaped, and names one module. A Linear that no rule names would get the base
settings, so every dense matrix has a rule that takes it out.

vLLM matches the rules against the names of its fused layers. Plans tied for vLLM therefore name a
fused group by its parts and by its fused name in one rule.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from allocator.exporters.base import (
    DENSE,
    Choice,
    Mismatch,
    Receipt,
    choices,
    describe,
    fixed_modules,
    num_weight_units,
    read_mapping,
    require_whole_groups,
    write_text,
)
from allocator.plan import Plan
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.ties import TIES

FILE_NAME = "quantize_config.json"

# What GPTQModel's own kernels accept besides a whole row, which it writes as -1.
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_BITS = (2, 3, 4, 5, 6, 7, 8)
_BITS_OF_EVERY_KERNEL = (2, 3, 4, 8)

Settings = dict[str, Any]


class GPTQModelExporter:
    """Writes ``quantize_config.json`` for GPTQModel and vLLM."""

    name: ClassVar[str] = "gptqmodel"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``quantize_config.json`` into a folder.

        Raises:
            ValueError: Nothing to quantize, a matrix outside the blocks and the head, bits other
                than 2 to 8, or a group size that the kernels lack or that does not divide the
                columns.
        """
        found = tuple(choices(plan, self.name))
        for choice in found:
            _require_expressible(choice)
        _require_no_dense_stacks(plan)
        quantized = [_settings(c) for c in found if isinstance(c.operator, RoundToNearest)]
        if not quantized:
            raise ValueError("gptqmodel has nothing to do: the plan keeps every matrix dense")
        ((base, _),) = Counter(tuple(s.items()) for s in quantized).most_common(1)
        config = {
            **dict(base),
            "desc_act": False,
            "lm_head": any(c.kind == "head" and not isinstance(c.operator, Keep) for c in found),
            "quant_method": "gptq",
            "dynamic": _dynamic(plan, found),
        }
        path = write_text(destination, FILE_NAME, json.dumps(config, indent=1) + "\n")
        return Receipt((path,), num_weight_units(plan), _notes(plan, quantized))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Apply GPTQModel's matching rule to every module of the plan and compare.

        Raises:
            ValueError: No such file, not JSON, or a rule that is no regular expression.
        """
        config = read_mapping(artefact, FILE_NAME)
        rules = _rules(config)
        mismatches = []
        for entry in _by_unit(choices(plan, self.name)):
            for choice, runtime_name in _runtime_names(entry, plan.ties):
                got = _resolve(config, rules, runtime_name, choice.member.matrix_shape[1])
                if got != choice.says:
                    place = choice.place_of(runtime_name)
                    mismatches.append(Mismatch(place, choice.says, got))
        for module in fixed_modules(plan):
            got = _resolve(config, rules, module, -1)
            if got != DENSE:
                mismatches.append(Mismatch(module, DENSE, got))
        return mismatches


def _require_expressible(choice: Choice) -> None:
    operator = choice.operator
    if isinstance(operator, Keep):
        return
    if choice.depth is None and choice.kind != "head":
        raise ValueError(
            "gptqmodel quantizes the blocks and the head only: it cannot compress "
            f"{choice.module!r}; pin it to keep and search again"
        )
    if operator.bits not in _BITS:
        raise ValueError(
            f"gptqmodel takes 2 to 8 bits: module {choice.module!r} asks for {operator.bits}"
        )
    require_whole_groups(choice, "gptqmodel")
    if operator.group_size and operator.group_size not in _GROUP_SIZES:
        raise ValueError(
            f"gptqmodel has kernels for groups of {', '.join(map(str, _GROUP_SIZES))} and whole "
            f"rows: module {choice.module!r} asks for groups of {operator.group_size}"
        )


def _require_no_dense_stacks(plan: Plan) -> None:
    """Fused experts are split into Linears there, which no rule of ours would take out."""
    dense = [(tensor.name, tensor.shape) for tensor in plan.fixed]
    dense += [(m.name, m.shape) for e in plan.units for m in e.unit.members if not m.cache]
    for name, shape in dense:
        if len(shape) == 3 and not name.endswith(".weight"):
            raise ValueError(
                f"gptqmodel splits fused experts and would quantize {name!r}, which the plan "
                "keeps dense"
            )


def _settings(choice: Choice) -> Settings:
    operator = choice.operator
    assert isinstance(operator, RoundToNearest)
    return {
        "bits": operator.bits,
        "group_size": operator.group_size or -1,
        "sym": operator.symmetric,
    }


def _dynamic(plan: Plan, found: Sequence[Choice]) -> dict[str, Settings]:
    """The rules, those that take modules out first as GPTQModel itself orders them."""
    out: dict[str, Settings] = {f"-:{_pattern('', [m])}": {} for m in fixed_modules(plan)}
    into: dict[str, Settings] = {}
    for entry in _by_unit(found):
        for pattern in _patterns([choice.module for choice in entry], plan.ties):
            if isinstance(entry[0].operator, Keep):
                out[f"-:{pattern}"] = {}
            else:
                into[f"+:{pattern}"] = _settings(entry[0])
    return {**out, **into}


def _by_unit(found: Iterator[Choice] | Sequence[Choice]) -> list[list[Choice]]:
    units: dict[str, list[Choice]] = {}
    for choice in found:
        units.setdefault(choice.unit, []).append(choice)
    return list(units.values())


def _patterns(modules: Sequence[str], ties: str) -> Iterator[str]:
    """One pattern per module, or per group of modules that the runtime fuses."""
    left = dict.fromkeys(modules)
    for parent, parts, fused in _fused_groups(modules, ties):
        for part in parts:
            del left[_join(parent, part)]
        yield _pattern(parent, [*parts, fused])
    for module in left:
        yield _pattern("", [module])


def _fused_groups(modules: Sequence[str], ties: str) -> Iterator[tuple[str, list[str], str]]:
    """(parent path, parts, fused name) of each group in a unit that the runtime runs as one."""
    for parent in dict.fromkeys(module.rpartition(".")[0] for module in modules):
        for fused, siblings in TIES[ties].fusible.items():
            parts = [part for part in siblings if _join(parent, part) in modules]
            if len(parts) > 1:
                yield parent, parts, fused


def _runtime_names(entry: Sequence[Choice], ties: str) -> Iterator[tuple[Choice, str]]:
    """Every name by which a runtime asks for a unit's settings."""
    for choice in entry:
        yield choice, choice.module
    for parent, _, fused in _fused_groups([choice.module for choice in entry], ties):
        yield entry[0], _join(parent, fused)


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _pattern(parent: str, leaves: Sequence[str]) -> str:
    """A pattern anchored at both ends that matches these names below a parent and nothing else."""
    names = "|".join(re.escape(leaf) for leaf in leaves)
    prefix = re.escape(f"{parent}.") if parent else ""
    return f"^{prefix}{names if len(leaves) == 1 else f'({names})'}$"


def _rules(config: Settings) -> list[tuple[re.Pattern[str], bool, Settings]]:
    """Each rule's pattern, whether it takes modules out, and its settings, in matching order."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(v, dict) for v in dynamic.values()):
        raise ValueError(f"dynamic: expected a mapping of rules to settings, got {dynamic!r:.80}")
    # GPTQModel moves the rules that take modules out to the front.
    ordered = sorted(dynamic, key=lambda rule: not rule.startswith("-"))
    return [(_compiled(rule), rule.startswith("-:"), dynamic[rule]) for rule in ordered]


def _compiled(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule[2:] if rule.startswith(("+:", "-:")) else rule)
    except re.error as error:
        raise ValueError(f"rule {rule!r} is not a regular expression: {error}") from error


def _resolve(
    config: Settings,
    rules: Sequence[tuple[re.Pattern[str], bool, Mapping[str, Any]]],
    name: str,
    columns: int,
) -> str:
    """What GPTQModel does to a module: the first rule that matches from the start of its name."""
    settings = {"bits": 4, "group_size": 128, "sym": True, **config}
    for pattern, out, overrides in rules:
        if pattern.match(name):
            if out:
                return DENSE
            settings |= overrides
            break
    group_size = columns if settings["group_size"] == -1 else settings["group_size"]
    return describe(settings["bits"], group_size, settings["sym"])


def _notes(plan: Plan, quantized: Sequence[Settings]) -> tuple[str, ...]:
    notes = [
        "GPTQModel calibrates and rounds the dense weights anew: bits and groups are the plan's, "
        "the loss will differ from the plan's measured one (usually lower)."
    ]
    planar = sorted({s["bits"] for s in quantized} - set(_BITS_OF_EVERY_KERNEL))
    if planar:
        notes.append(
            f"{', '.join(map(str, planar))} bits need GPTQModel's planar checkpoint format, which "
            "vLLM does not load; for vLLM offer 2, 3, 4 and 8 bits."
        )
    if plan.ties != "vllm":
        notes.append(
            "The plan is not tied for vLLM, which runs q/k/v and gate/up as one layer each and "
            "ignores rules for their parts; search with --ties vllm to serve it there."
        )
    return tuple(notes)

"""llm-compressor: ``recipe.yaml``, which prunes every matrix to the plan's sparsity.

The problem: llm-compressor takes one sparsity for all targets of a modifier, or a list in the order
in which the model holds the targets whatever their order in the recipe, and a target that matches
nothing is silent. So where every layer has one sparsity the recipe is one modifier with the layers
and their list; otherwise one modifier per distinct setting, with the exact names of its modules.
Run it with ``oneshot(model=model, recipe="recipe.yaml", dataset=...)``.

Three things differ there. Wanda cuts ``int(columns * sparsity)`` weights of a row, so a sparsity is
written that makes this the plan's number. ``mask_structure`` counts the weights that go, not those
that stay. SparseGPT picks its mask over all rows of a block, so that rows end unequal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from allocator.exporters.base import (
    DENSE,
    Mismatch,
    Receipt,
    fixed_modules,
    read_text,
    write_text,
)
from allocator.plan import Plan
from search_spaces.operators import AnyOperator, Keep
from search_spaces.operators.prune import Prune, PruneNM, num_pruned
from search_spaces.operators.sparse_gpt import SparseGPT
from search_spaces.space import Member

FILE_NAME = "recipe.yaml"
_SPARSE_GPT, _WANDA = "SparseGPTModifier", "WandaPruningModifier"
_ANYWHERE = "0:0"
_LAYER = re.compile(r"(.+?\.\d+)\.")
_DEFAULTS = {"mask_structure": _ANYWHERE, "block_size": 128, "dampening_frac": 0.01}
_ACCEPTS = "it takes keep, and 16-bit values of prune and prune_n_m by wanda and of sparse_gpt"


@dataclass(frozen=True)
class _Setting:
    """What one modifier does to one matrix.

    Attributes:
        modifier: Its class.
        sparsity: As written; of n:m patterns it has no effect.
        options: Its other arguments, sorted.
    """

    modifier: str
    sparsity: float
    options: tuple[tuple[str, Any], ...]

    def says(self, columns: int) -> str:
        """What happens to a matrix of so many columns, comparable between plan and recipe."""
        options = dict(self.options)
        structure = options.pop("mask_structure", _ANYWHERE)
        if structure != _ANYWHERE:
            amount = f"{structure} dropped"
        elif self.modifier == _WANDA:
            amount = f"{int(columns * self.sparsity)} of {columns} dropped"
        else:
            amount = f"sparsity {self.sparsity:g}"
        rest = "".join(f", {key} {value}" for key, value in sorted(options.items()))
        return f"{self.modifier}: {amount}{rest}"


@dataclass(frozen=True)
class _Matrix:
    """One module of the plan and what should happen to it."""

    unit: str
    module: str
    columns: int
    setting: _Setting | None

    @property
    def says(self) -> str:
        return DENSE if self.setting is None else self.setting.says(self.columns)

    @property
    def place(self) -> str:
        return self.unit if self.module == self.unit else f"{self.unit} ({self.module})"


class LLMCompressorExporter:
    """Writes ``recipe.yaml`` for llm-compressor's one-shot pruning."""

    name: ClassVar[str] = "llm-compressor"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``recipe.yaml`` into a folder.

        Raises:
            ValueError: Nothing to prune, an operator that llm-compressor lacks, a sparsity of 0 or
                1, or a parameter that is not the weight matrix of a Linear.
        """
        matrices = tuple(_matrices(plan))
        if all(matrix.setting is None for matrix in matrices):
            raise ValueError("llm-compressor has nothing to do: the plan keeps every matrix dense")
        stages = _by_layer(plan, matrices) or _by_setting(matrices)
        # A stage whose key does not end so is ignored without a word.
        recipe = {f"sparsity_{i}_stage": {"sparsity_modifiers": m} for i, m in enumerate(stages)}
        text = yaml.safe_dump(recipe, sort_keys=False, width=1000)
        path = write_text(destination, FILE_NAME, text)
        note = (
            "llm-compressor prunes anew, on the calibration text it is given, and keeps the rest "
            "dense; SparseGPT there gives rows of one matrix different numbers of weights."
        )
        return Receipt((path,), len(plan.units), (note,))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Match the recipe's targets as llm-compressor does and compare.

        Raises:
            ValueError: No such file, or not a recipe of pruning modifiers.
        """
        matrices = tuple(_matrices(plan))
        modifiers = list(_read(artefact))
        fixed = tuple(fixed_modules(plan))
        found = _resolve(modifiers, [matrix.module for matrix in matrices] + list(fixed))
        mismatches = []
        for matrix in matrices:
            got = " then ".join(s.says(matrix.columns) for s in found.pop(matrix.module, []))
            if (got or DENSE) != matrix.says:
                mismatches.append(Mismatch(matrix.place, matrix.says, got or DENSE))
        for name, settings in sorted(found.items()):
            says = DENSE if name in fixed else "not in the plan"
            mismatches.append(Mismatch(name, says, settings[0].says(0)))
        return mismatches


def _matrices(plan: Plan) -> Iterator[_Matrix]:
    """The plan module by module; dense parameters of other kinds need no word."""
    for entry in plan.units:
        for member in entry.unit.members:
            setting = _setting(entry.choice, member, entry.name)
            named = member.parameter == "weight" and len(member.shape) == 2
            if setting is not None and (not named or member.transposed):
                raise ValueError(
                    f"llm-compressor prunes the weights of Linear modules: it cannot say anything "
                    f"about {member.name!r} of shape {list(member.shape)}"
                )
            if named:
                yield _Matrix(entry.name, member.module, member.matrix_shape[1], setting)


def _setting(operator: AnyOperator, member: Member, unit: str) -> _Setting | None:
    """The modifier that does what an operator does, or ``None`` for a dense matrix."""
    if isinstance(operator, Keep):
        return None
    columns = member.matrix_shape[1]
    if isinstance(operator, SparseGPT) and operator.values == Keep():
        structure = f"{operator.m - operator.n}:{operator.m}" if operator.m else _ANYWHERE
        options = {
            "block_size": operator.block,
            "dampening_frac": operator.damping,
            "mask_structure": structure,
        }
        _require_some(operator.sparsity, member)
        return _Setting(_SPARSE_GPT, operator.sparsity, tuple(options.items()))
    if isinstance(operator, Prune | PruneNM) and operator.score == "wanda":
        if isinstance(operator, PruneNM) and operator.values == Keep():
            structure = f"{operator.m - operator.n}:{operator.m}"
            options = {"mask_structure": structure}
            return _Setting(_WANDA, 1 - operator.n / operator.m, tuple(options.items()))
        if isinstance(operator, Prune) and operator.values == Keep() and operator.pattern == "row":
            _require_some(operator.sparsity, member)
            sparsity = _truncating(columns, operator.sparsity)
            return _Setting(_WANDA, sparsity, (("mask_structure", _ANYWHERE),))
    raise ValueError(
        f"llm-compressor cannot say {operator.label!r} (unit {unit!r}): {_ACCEPTS}; "
        "`allocator apply` writes any plan as a dense checkpoint"
    )


def _require_some(sparsity: float, member: Member) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(
            f"llm-compressor takes a sparsity between 0 and 1: {member.name!r} has {sparsity:g}"
        )


def _truncating(columns: int, sparsity: float) -> float:
    """A sparsity that gives the plan's number of weights when its product is cut to an integer."""
    number = num_pruned(columns, sparsity)
    return sparsity if int(columns * sparsity) == number else (number + 0.5) / columns


def _by_setting(matrices: Sequence[_Matrix]) -> list[dict[str, Any]]:
    """One modifier per distinct setting, with the exact names of its modules."""
    targets: dict[_Setting, list[str]] = {}
    for matrix in matrices:
        if matrix.setting is not None:
            targets.setdefault(matrix.setting, []).append(matrix.module)
    return [
        {s.modifier: {"sparsity": s.sparsity, **dict(s.options), "targets": names}}
        for s, names in targets.items()
    ]


def _by_layer(plan: Plan, matrices: Sequence[_Matrix]) -> list[dict[str, Any]]:
    """One modifier with a sparsity for each layer; empty where the plan is not of that kind."""
    layers: dict[str, set[_Setting | None]] = {}
    for matrix in matrices:
        found = _LAYER.match(matrix.module)
        if found:
            layers.setdefault(found[1], set()).add(matrix.setting)
        elif matrix.setting is not None:
            return []
    # Every Linear inside a layer that is named would be pruned, searched or not.
    others = {found[1] for name in fixed_modules(plan) if (found := _LAYER.match(name))}
    settings = {name: next(iter(found)) for name, found in layers.items() if len(found) == 1}
    if len(settings) < len(layers) or others & layers.keys():
        return []
    pruned = {name: setting for name, setting in settings.items() if setting is not None}
    shared = {(s.modifier, s.options) for s in pruned.values()}
    if len(pruned) < 2 or len(shared) > 1:
        return []
    ((modifier, options),) = shared
    ordered = sorted(pruned, key=_layer_order)
    sparsities = [pruned[name].sparsity for name in ordered]
    return [{modifier: {"sparsity": sparsities, **dict(options), "targets": ordered}}]


def _layer_order(name: str) -> tuple[str, int]:
    """Where a layer stands in its list."""
    stack, _, index = name.rpartition(".")
    return stack, int(index)


def _read(artefact: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The modifiers that llm-compressor would make of a recipe, in its order."""
    try:
        recipe = yaml.safe_load(read_text(artefact, FILE_NAME))
    except yaml.YAMLError as error:
        raise ValueError(f"{artefact}: not valid YAML ({error})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{artefact}: expected a recipe, got {type(recipe).__name__}")
    for stage, groups in recipe.items():
        if not str(stage).endswith("_stage") or not isinstance(groups, dict):
            continue
        for group, modifiers in groups.items():
            if not str(group).endswith("_modifiers") or not isinstance(modifiers, dict):
                continue
            for modifier, arguments in modifiers.items():
                if modifier not in (_SPARSE_GPT, _WANDA) or not isinstance(arguments, dict):
                    raise ValueError(f"{artefact}: {modifier!r} is not a pruning modifier")
                yield modifier, arguments


def _resolve(
    modifiers: Sequence[tuple[str, Mapping[str, Any]]], modules: Sequence[str]
) -> dict[str, list[_Setting]]:
    """What happens to each module by the toolkit's matching; also to names that no module has.

    Args:
        modifiers: Classes and arguments in the recipe's order.
        modules: Every Linear of the plan, in the model's order, which is that of a list.
    """
    names = dict.fromkeys(
        ".".join(parts[:end])
        for parts in (module.split(".") for module in modules)
        for end in range(1, len(parts) + 1)
    )
    found: dict[str, list[_Setting]] = {}
    for modifier, arguments in modifiers:
        targets = arguments.get("targets", ["Linear"])
        targets = [targets] if isinstance(targets, str) else list(targets)
        layers = [name for name in names if any(_matches(name, target) for target in targets)]
        sparsity = arguments.get("sparsity")
        if isinstance(sparsity, list) and len(sparsity) != len(layers):
            raise ValueError(
                f"{modifier} has {len(sparsity)} sparsities for {len(layers)} targets that exist"
            )
        options = {key: arguments.get(key, _DEFAULTS[key]) for key in _options(modifier)}
        for index, layer in enumerate(layers):
            value = sparsity[index] if isinstance(sparsity, list) else sparsity
            if not isinstance(value, int | float):
                raise ValueError(f"{modifier}: sparsity must be a number or a list, got {value!r}")
            setting = _Setting(modifier, float(value), tuple(options.items()))
            for module in modules:
                if module == layer or module.startswith(f"{layer}."):
                    found.setdefault(module, []).append(setting)
        for target in targets:
            if not any(_matches(name, target) for name in names):
                setting = _Setting(modifier, 0.0, tuple(options.items()))
                found.setdefault(target, []).append(setting)
    return found


def _options(modifier: str) -> tuple[str, ...]:
    return tuple(sorted(_DEFAULTS)) if modifier == _SPARSE_GPT else ("mask_structure",)


def _matches(name: str, target: str) -> bool:
    """Names match exactly, or from their start by a regular expression."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target

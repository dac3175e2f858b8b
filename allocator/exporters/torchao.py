"""torchao: a ``FqnToConfig`` as JSON, one exact name per module.

The problem: torchao ignores names it does not know, and the order of its regular expressions does
not survive ``transformers``' sorted ``config.json``. So only exact names are written. The JSON is
what ``torchao.core.config.config_to_dict`` gives; ``config_from_dict`` reads it::

    config = config_from_dict(json.loads(Path("torchao_config.json").read_text()))
    quantize_(model, config, filter_fn=None)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from search_spaces.operators import Keep

if TYPE_CHECKING:
    from torch import nn

FILE_NAME = "torchao_config.json"

Json = dict[str, Any]


class TorchaoExporter:
    """Writes ``torchao_config.json``, a serialized ``FqnToConfig``."""

    name: ClassVar[str] = "torchao"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``torchao_config.json`` into a folder.

        Raises:
            ValueError: A matrix stored transposed, or groups that do not divide its columns.
        """
        found = tuple(choices(plan, self.name))
        for choice in found:
            _require_expressible(choice)
        configs = {choice.module: _config(choice) for choice in found}
        # torchao serializes the mapping under its old name as well and compares the two on reading.
        fields = {"fqn_to_config": configs, "module_fqn_to_config": configs}
        text = json.dumps(_typed("FqnToConfig", fields, version=1), indent=1)
        path = write_text(destination, FILE_NAME, text + "\n")
        return Receipt((path,), num_weight_units(plan), _notes(found))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Apply torchao's precedence of names to every module of the plan and compare.

        Raises:
            ValueError: No such file, not JSON, or not a serialized ``FqnToConfig``.
        """
        configs = _read(artefact)
        expected = {c.module: (c.place, c.says, c) for c in choices(plan, self.name)}
        mismatches = []
        for module, (place, says, choice) in expected.items():
            got = _described(_resolve(configs, module), choice.member.matrix_shape[1])
            if got != says:
                mismatches.append(Mismatch(place, says, got))
        for module in fixed_modules(plan):
            got = _described(_resolve(configs, module), -1)
            if got != DENSE:
                mismatches.append(Mismatch(module, DENSE, got))
        return mismatches


def verify_model(plan: Plan, model: nn.Module) -> list[Mismatch]:
    """Read bits and groups back from a model that torchao has quantized, and compare.

    Args:
        plan: What was asked for.
        model: After ``torchao.quantization.quantize_``, or loaded from a checkpoint saved after it.

    Returns:
        One entry per module whose tensor is stored otherwise than the plan says; empty when equal.
    """
    mismatches = []
    for choice in choices(plan, "torchao"):
        weight: Any = model.get_submodule(choice.module).weight
        got = _stored(weight)
        # An asymmetric tensor may have all zero points at zero, a symmetric one must have.
        if isinstance(choice.operator, Keep) or choice.operator.symmetric:
            expected = choice.says
        else:
            expected = choice.says.replace("a-", "-")
            got = got.replace("a-", "-")
        if got != expected:
            mismatches.append(Mismatch(choice.place, expected, got))
    for module in fixed_modules(plan):
        got = _stored(model.get_submodule(module).weight)
        if got != DENSE:
            mismatches.append(Mismatch(module, DENSE, got))
    return mismatches


def _stored(weight: Any) -> str:
    """How a tensor is stored, by the attributes of torchao's ``IntxUnpackedToInt8Tensor``."""
    target = getattr(weight, "target_dtype", None)
    if target is None:
        return DENSE
    bits = str(target).removeprefix("torch.int")
    return describe(bits, weight.block_size[-1], not bool((weight.zero_point != 0).any()))


def _require_expressible(choice: Choice) -> None:
    if isinstance(choice.operator, Keep):
        return
    if choice.member.transposed:
        raise ValueError(
            "torchao groups along the last dimension in memory, which is not the columns of "
            f"{choice.module!r}: it is stored transposed"
        )
    require_whole_groups(choice, "torchao")


def _config(choice: Choice) -> Json | None:
    """The module's ``IntxWeightOnlyConfig`` as torchao serializes it; ``None`` leaves it dense."""
    operator = choice.operator
    if isinstance(operator, Keep):
        return None
    if operator.group_size:
        granularity = _typed("PerGroup", {"group_size": operator.group_size}, version=1)
    else:
        granularity = _typed("PerAxis", {"axis": 0}, version=1)
    mapping = "SYMMETRIC" if operator.symmetric else "ASYMMETRIC"
    fields = {
        "weight_dtype": _typed("torch.dtype", f"int{operator.bits}"),
        "granularity": granularity,
        "mapping_type": _typed("MappingType", mapping),
        # The plan priced float16 scales; torchao's default is the weight's own type.
        "scale_dtype": _typed("torch.dtype", "float16"),
        "intx_packing_format": _typed("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": _typed("IntxChooseQParamsAlgorithm", "AFFINE"),
    }
    return _typed("IntxWeightOnlyConfig", fields, version=2)


def _typed(kind: str, data: object, *, version: int | None = None) -> Json:
    return {"_type": kind, **({} if version is None else {"_version": version}), "_data": data}


def _read(artefact: Path) -> Mapping[str, Any]:
    """The file's mapping from names to configurations."""
    data = read_mapping(artefact, FILE_NAME)
    fields = data.get("_data")
    if data.get("_type") != "FqnToConfig" or not isinstance(fields, dict):
        raise ValueError(f"{artefact}: not a serialized FqnToConfig of torchao")
    configs = fields.get("fqn_to_config") or fields.get("module_fqn_to_config")
    if not isinstance(configs, dict):
        raise ValueError(f"{artefact}: the FqnToConfig names no module")
    if fields.get("module_fqn_to_config", configs) != configs:
        raise ValueError(f"{artefact}: fqn_to_config and module_fqn_to_config differ")
    return configs


def _resolve(configs: Mapping[str, Any], module: str) -> Any:
    """The toolkit's precedence: exact parameter, exact module, first full match, default."""
    for name in (f"{module}.weight", module):
        if name in configs:
            return configs[name]
    for name in (f"{module}.weight", module):
        for pattern, config in configs.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], name):
                return config
    return configs.get("_default")


def _described(config: Any, columns: int) -> str:
    """What one serialized configuration does to a weight of so many columns."""
    if config is None:
        return DENSE
    try:
        if config["_type"] != "IntxWeightOnlyConfig":
            return str(config["_type"])
        fields = config["_data"]
        granularity = fields["granularity"]
        per_row = granularity["_type"] == "PerAxis"
        group_size = columns if per_row else granularity["_data"]["group_size"]
        bits = fields["weight_dtype"]["_data"].removeprefix("int")
        return describe(bits, group_size, fields["mapping_type"]["_data"] == "SYMMETRIC")
    except (AttributeError, KeyError, TypeError):
        return f"unreadable: {json.dumps(config)[:80]}"


def _notes(found: tuple[Choice, ...]) -> tuple[str, ...]:
    notes = [
        "torchao keeps each code in a whole byte (IntxUnpackedToInt8Tensor): its files are larger "
        "than the plan's bytes.",
        "torchao rounds the dense weights anew on the plan's grids; the few weights that lie on a "
        "tie (the largest of a symmetric group) may go the other way.",
    ]
    if any(c.kind in ("embeddings", "head") and not isinstance(c.operator, Keep) for c in found):
        notes.append(
            "The plan opens the embedding or the head: pass include_input_output_embeddings=True "
            "to transformers' TorchAoConfig, and note that torchao unties tied embeddings."
        )
    return tuple(notes)

"""Factorised checkpoint: a folder that transformers loads with matrices as two Linear layers.

The problem: a dense checkpoint of a low-rank plan is as large and as slow as the model. Here every
matrix under ``low_rank`` is stored and run as its two factors. The folder carries the few lines of
code that exchange the modules, so that it is loaded by::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its model type is its own: without ``trust_remote_code`` transformers then refuses it, where
otherwise it would fill the missing dense matrices with random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from allocator.exporters.base import (
    DENSE,
    Mismatch,
    Receipt,
    fixed_modules,
    folder_of,
    num_weight_units,
    read_mapping,
    write_text,
)
from allocator.plan import Plan, PlanUnit, save_plan
from search_spaces.operators import Keep, LowRank, Statistics
from search_spaces.space import Member

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from objectives.loading import LoadedModel

FILE_NAME = "factorised.json"
MODELING_NAME = "modeling_factorised.py"

_MODULES_SOURCE = Path(__file__).with_name("factorised_modules.py")
_CLASSES = '''

from transformers import {architecture}, {config}  # noqa: E402


class FactorisedConfig({config}):
    """That of the dense model, and ``factorised``: (rows, rank, columns) by module."""

    model_type = "factorised_{model_type}"


class FactorisedForCausalLM({architecture}):
    """The dense model's architecture with some of its matrices as two."""

    config_class = FactorisedConfig

    def __init__(self, config):
        super().__init__(config)
        factorise(self, config.factorised)
'''

Sizes = tuple[int, int, int]
"""Rows, rank and columns."""


class FactorisedExporter:
    """Writes the ranks of a plan, and with the model a checkpoint of its factors."""

    name: ClassVar[str] = "factorised"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``factorised.json``: (rows, rank, columns) by module.

        Raises:
            ValueError: No matrix is under ``low_rank``, one that is cannot become two Linear
                layers, or the folder cannot be written.
        """
        path = _write_sizes(plan, destination)
        note = (
            "The file says the shapes of the factors; export with --model to write the "
            "checkpoint that holds them."
        )
        return Receipt((path,), num_weight_units(plan), (note,))

    def write_model(
        self,
        plan: Plan,
        loaded: LoadedModel,
        destination: Path,
        statistics: Mapping[str, Statistics],
    ) -> Receipt:
        """Write a checkpoint with the factors in place of the matrices.

        Dense tensors and factors are stored in the plan's 16-bit types, matrices under other
        operators as what they decompress to in the model's own; the model is changed. The folder
        appears whole or not at all.

        Raises:
            ValueError: The plan is for another model, ``write`` refuses it, statistics are missing,
                the model is not of transformers' own, or the folder is not empty or cannot be
                written.
        """
        from allocator.apply import apply_plan, check_loaded, new_folder

        model = loaded.model
        check_loaded(plan, loaded)
        code = _modeling(model)
        factors = {m.module: _factors(model, m, o, statistics) for _, m, o in _low_rank(plan)}
        dtype = model.dtype
        apply_plan(model, plan, statistics)
        _store_as_planned(model, plan)
        _exchange(model, _sizes(plan), factors)
        with new_folder(destination) as folder:
            model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            save_plan(plan, folder / "plan.json")
            _write_sizes(plan, folder)
            write_text(folder, MODELING_NAME, code)
            _write_config(folder, plan, str(dtype).removeprefix("torch."))
        files = [destination / FILE_NAME, *sorted(destination.iterdir())]
        return Receipt(tuple(dict.fromkeys(files)), num_weight_units(plan), _notes(plan))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare the file with the plan, and the tensors where the checkpoint lies beside it.

        Raises:
            ValueError: A file is missing or cannot be read.
        """
        written = read_mapping(artefact, FILE_NAME)
        folder = folder_of(artefact)
        checkpoint = None
        if (folder / MODELING_NAME).is_file():
            configured = read_mapping(folder, "config.json").get("factorised")
            checkpoint = (configured, _stored_shapes(folder))
        mismatches = []
        units = {m.module: entry.name for entry in plan.units for m in entry.unit.members}
        expected = _sizes(plan)
        for module, sizes in expected.items():
            got = [_says(written.pop(module, None))]
            if checkpoint is not None:
                got += _in_checkpoint(module, *checkpoint)
            wrong = next((one for one in got if one != _says(sizes)), None)
            if wrong is not None:
                unit = units[module]
                place = unit if unit == module else f"{unit} ({module})"
                mismatches.append(Mismatch(place, _says(sizes), wrong))
        known = {*units, *fixed_modules(plan)}
        return mismatches + [
            Mismatch(name, DENSE if name in known else "not in the plan", _says(sizes))
            for name, sizes in sorted(written.items())
        ]


def _low_rank(plan: Plan) -> list[tuple[PlanUnit, Member, LowRank]]:
    """Every matrix that becomes two, with its unit.

    Raises:
        ValueError: There is none, or one that is no module's weight.
    """
    found = []
    for entry in plan.units:
        operator = entry.choice
        if not isinstance(operator, LowRank):
            continue
        for member in entry.unit.members:
            if member.parameter != "weight" or len(member.shape) != 2:
                raise ValueError(
                    f"factorised exchanges modules with a weight matrix: it cannot factorise "
                    f"{member.name!r} of shape {list(member.shape)}"
                )
            found.append((entry, member, operator))
    if not found:
        raise ValueError(
            "factorised: no unit of the plan is under low_rank; `allocator apply` writes any plan "
            "as a dense checkpoint"
        )
    return found


def _notes(plan: Plan) -> tuple[str, ...]:
    """How to load the checkpoint, and what in it takes more bytes than the plan says."""
    operators = [entry.choice for entry in plan.units if not entry.unit.is_cache]
    dense = {o.label for o in operators if not isinstance(o, Keep | LowRank)}
    rounded = {
        o.label for o in operators if isinstance(o, LowRank) and not isinstance(o.factors, Keep)
    }
    notes = [f"Load it with trust_remote_code=True: it runs {MODELING_NAME} of the folder."]
    if dense:
        notes.append(f"Matrices under {', '.join(sorted(dense))} are written dense.")
    if rounded:
        notes.append(f"Factors under {', '.join(sorted(rounded))} are written decompressed.")
    return tuple(notes)


def _sizes(plan: Plan) -> dict[str, Sizes]:
    """(rows, rank, columns) by module."""
    return {
        member.module: (member.shape[0], operator.rank(member.matrix_shape), member.shape[1])
        for _, member, operator in _low_rank(plan)
    }


def _write_sizes(plan: Plan, folder: Path) -> Path:
    lines = (f" {json.dumps(module)}: {list(size)}" for module, size in _sizes(plan).items())
    return write_text(folder, FILE_NAME, "{\n" + ",\n".join(lines) + "\n}\n")


def _modeling(model: PreTrainedModel) -> str:
    """The code of the folder: our modules, and the model's own class on top of them."""
    import transformers

    architecture, config = type(model), type(model.config)
    for kind in (architecture, config):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise ValueError(
                f"factorised needs an architecture of transformers itself, got {kind.__name__}"
            )
    classes = _CLASSES.format(
        architecture=architecture.__name__,
        config=config.__name__,
        model_type=config.model_type,
    )
    return _MODULES_SOURCE.read_text(encoding="utf-8") + classes


def _factors(
    model: nn.Module, member: Member, operator: LowRank, statistics: Mapping[str, Statistics]
) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (rank, columns) as stored: in 16 bits where these hold them exactly."""
    from objectives.tensor_file import STORED_TYPES
    from search_spaces.operators.members import logical

    parameter = model.get_parameter(member.name).detach()
    (matrix,) = logical(parameter, member)
    packed = operator.pack(matrix.float(), statistics.get(member.name, Statistics()))
    left, right = operator.unpack_factors(packed, member.matrix_shape)
    dtype = parameter.dtype
    if isinstance(operator.factors, Keep):
        dtype = STORED_TYPES[operator.factors.layout(member.matrix_shape)[0].dtype]
    return left.to(parameter.device, dtype), right.to(parameter.device, dtype)


def _store_as_planned(model: nn.Module, plan: Plan) -> None:
    """Turn fixed and kept tensors, in place, into the types that hold them exactly."""
    from allocator.apply import tensor_of
    from objectives.tensor_file import STORED_TYPES

    planned = {tensor.name: tensor.dtype for tensor in plan.fixed}
    for entry in plan.units:
        if isinstance(entry.choice, Keep) and not entry.unit.is_cache:
            planned |= {
                member.name: tensor.dtype
                for member in entry.unit.members
                for tensor in member.layout(entry.choice)
            }
    for name, dtype in planned.items():
        tensor = tensor_of(model, name)
        tensor.data = tensor.data.to(STORED_TYPES[dtype])


def _exchange(
    model: nn.Module, sizes: Mapping[str, Sizes], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Put the factors in place of the matrices; a bias stays what it is."""
    import torch
    from torch import nn

    from allocator.exporters.factorised_modules import LowRankLinear, factorise

    biases = {name: getattr(model.get_submodule(name), "bias", None) for name in sizes}
    with torch.device("meta"):  # their own weights are not wanted
        factorise(model, sizes)
    for name, (left, right) in factors.items():
        module = model.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        module.left.weight = nn.Parameter(left.contiguous(), requires_grad=False)
        module.right.weight = nn.Parameter(right.contiguous(), requires_grad=False)
        bias = biases[name]
        if isinstance(bias, nn.Parameter):
            module.left.bias = bias


def _write_config(folder: Path, plan: Plan, dtype: str) -> None:
    """Point config.json to the folder's own classes."""
    config = read_mapping(folder, "config.json")
    stem = MODELING_NAME.removesuffix(".py")
    config |= {
        "architectures": ["FactorisedForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{stem}.FactorisedConfig",
            "AutoModelForCausalLM": f"{stem}.FactorisedForCausalLM",
        },
        "dtype": dtype,
        "factorised": _sizes(plan),
        "model_type": f"factorised_{config['model_type']}",
    }
    write_text(folder, "config.json", json.dumps(config, indent=2) + "\n")


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in the folder's safetensors files, by name."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                names = file.keys()
                shapes.update({name: file.get_slice(name).get_shape() for name in names})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    return shapes


def _in_checkpoint(module: str, configured: Any, shapes: Mapping[str, list[int]]) -> list[str]:
    """What the configuration says of a module, and what its tensors do."""
    left, right = (shapes.get(f"{module}.{side}.weight", []) for side in ("left", "right"))
    sizes = configured.get(module) if isinstance(configured, dict) else None
    stored = [*left, right[1]] if len(left) == len(right) == 2 and left[1] == right[0] else None
    dense = f"{module}.weight" in shapes
    return [_says(sizes), f"{DENSE} besides" if dense else _says(stored)]


def _says(sizes: object) -> str:
    if not isinstance(sizes, list | tuple):
        return DENSE if sizes is None else f"unreadable: {sizes!r}"
    return " x ".join(map(str, sizes))

"""From a plan to a model: in place, as a dense checkpoint, or as one packed file.

The problem: a plan is plain data, and a plan applied to another model than its own gives a working
model that is worse for no visible reason. Everything here first checks that the model has exactly
the plan's parameters. What is written is what the plan priced: searched matrices go through their
operator, every other tensor through its stored type, so that the packed file, the dense checkpoint
and the live model hold the same numbers.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from allocator.plan import CONTAINER_METADATA, Plan, PlanUnit, save_plan
from objectives.tensor_file import STORED_TYPES, write_tensors
from search_spaces.operators import Statistics
from search_spaces.operators.members import compress_unit, pack_unit, unpack_unit
from search_spaces.storage import StoredTensor

if TYPE_CHECKING:
    from objectives.loading import LoadedModel

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]


def check_model(
    plan: Plan,
    model: nn.Module,
    *,
    config_sha256: str | None = None,
    weights_sha256: str | None = None,
) -> None:
    """Refuse a model that the plan was not made for.

    Args:
        plan: Names, shapes and hashes to look for.
        model: Every parameter of it must be in the plan; tied ones count once.
        config_sha256: Of the model's configuration, compared with the plan's if given.
        weights_sha256: Of the model's weights, likewise.

    Raises:
        ValueError: A parameter is missing, left over or has another shape, or a hash differs.
    """
    made_for = f"the plan is for {plan.model.name!r}"
    covered = set()
    for name, shape in _expected_shapes(plan):
        tensor = _find(model, name)
        if tensor is None:
            raise ValueError(f"{made_for}: this model has no parameter {name!r}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{made_for}: expected {name!r} of shape {list(shape)}, "
                f"this model has {list(tensor.shape)}"
            )
        covered.add(_place(tensor))
    for name, parameter in model.named_parameters():
        if _place(parameter) not in covered:
            raise ValueError(f"{made_for}: it says nothing about this model's parameter {name!r}")
    for kind, ours, theirs in (
        ("configuration", plan.model.config_sha256, config_sha256),
        ("weights", plan.model.weights_sha256, weights_sha256),
    ):
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"{made_for}: this model has other {kind} (sha256 {theirs[:12]}, the plan was "
                f"made with {ours[:12]}); apply it to that model or search again"
            )


StatisticsByName = Mapping[str, Statistics]
NO_STATISTICS: StatisticsByName = {}


def check_loaded(plan: Plan, loaded: LoadedModel) -> None:
    """As :func:`check_model`, with the hashes of a model's files.

    Raises:
        ValueError: As there.
    """
    check_model(
        plan,
        loaded.model,
        config_sha256=loaded.config_sha256,
        weights_sha256=loaded.weights_sha256,
    )


def apply_plan(model: nn.Module, plan: Plan, statistics: StatisticsByName = NO_STATISTICS) -> None:
    """Replace a dense model's parameters, in place, by what the plan stores of them.

    Matrices are compressed in float32 and written back in the parameter's own dtype; tied
    parameters stay tied. Caches are not touched: they are no part of the model's weights.

    Args:
        model: The plan's model, dense.
        plan: Which operator each unit gets.
        statistics: By member name, for plans whose operators need them; see
            :mod:`objectives.statistics_file`.

    Raises:
        ValueError: The model is not the plan's, or an operator's statistics are missing.
    """
    check_model(plan, model)
    with torch.no_grad():
        for entry in _weights(plan):
            made = compressed(model, entry, statistics)
            for member, tensor in zip(entry.unit.members, made, strict=True):
                tensor_of(model, member.name).copy_(tensor)
    round_fixed(model, _fixed(plan))


def round_fixed(model: nn.Module, fixed: Iterable[StoredTensor]) -> None:
    """Round tensors that are not searched, in place, to the types they are stored in."""
    with torch.no_grad():
        for stored in fixed:
            tensor = tensor_of(model, stored.name)
            tensor.copy_(tensor.to(STORED_TYPES[stored.dtype]))


def compressed(
    model: nn.Module, entry: PlanUnit, statistics: StatisticsByName = NO_STATISTICS
) -> tuple[Tensor, ...]:
    """The parameters of one unit after compression, in the model's layout and dtype.

    The model is unchanged.

    Raises:
        ValueError: The operator's statistics are missing.
    """
    _check_statistics(entry, statistics)
    return compress_unit(_parameters(model, entry), entry.unit, entry.choice, statistics)


def write_checkpoint(
    loaded: LoadedModel,
    plan: Plan,
    output: Path,
    *,
    dtype: Dtype | None = None,
    statistics: StatisticsByName = NO_STATISTICS,
) -> None:
    """Apply a plan and write the dense result as a folder that ``transformers`` loads.

    The folder appears whole or not at all. The loaded model is changed in place.

    Args:
        loaded: The plan's model, dense.
        plan: Saved beside the weights as ``plan.json``.
        output: A new or empty folder.
        dtype: Of the written weights; ``None`` keeps the model's. Narrower types than float32
            round the decompressed values, so that the measured loss is only nearly reproduced.
        statistics: By member name, for plans whose operators need them.

    Raises:
        ValueError: The model is not the plan's, an operator's statistics are missing, or the output
            is not empty or cannot be written.
    """
    check_loaded(plan, loaded)
    with new_folder(output) as folder:
        model: nn.Module = loaded.model
        if dtype == "float32":
            model.float()  # first: a narrower parameter would round what is written to it
        apply_plan(model, plan, statistics)
        if dtype is not None:
            model.to(getattr(torch, dtype))
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        save_plan(plan, folder / "plan.json")
    logger.info("wrote %s", output)


def write_packed(
    model: nn.Module, plan: Plan, path: Path, statistics: StatisticsByName = NO_STATISTICS
) -> None:
    """Write the compressed model as one safetensors file of exactly ``plan.file_bytes``.

    Args:
        model: The plan's model, dense; it is not changed.
        plan: Decides every stored tensor.
        path: The file; an old one is replaced once the new one is complete.
        statistics: By member name, for plans whose operators need them.

    Raises:
        ValueError: The model is not the plan's, an operator's statistics are missing, or the file
            cannot be written.
    """
    check_model(plan, model)
    tensors = {
        stored.name: tensor_of(model, stored.name).detach().to(STORED_TYPES[stored.dtype]).cpu()
        for stored in _fixed(plan)
    }
    for entry in _weights(plan):
        _check_statistics(entry, statistics)
        tensors |= pack_unit(_parameters(model, entry), entry.unit, entry.choice, statistics)
    write_tensors(tensors, path, metadata=CONTAINER_METADATA, exact_bytes=plan.file_bytes)


def read_packed(path: Path, plan: Plan, model: nn.Module) -> None:
    """Load a packed file into a model, in place: the same numbers as :func:`apply_plan`.

    Args:
        path: What :func:`write_packed` wrote.
        plan: The plan it was written with.
        model: Of the plan's architecture; its weights are overwritten.

    Raises:
        ValueError: The file cannot be read, does not hold the plan's tensors, or the model has not
            the plan's parameters.
    """
    check_model(plan, model)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the packed model {path}: {error}") from error
    fill_model(model, plan, tensors, path)


def fill_model(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Overwrite a model's weights by what the tensors of a plan stand for.

    Args:
        model: One that :func:`check_model` accepts.
        plan: Says what each tensor is.
        tensors: By their names in the packed file.
        path: Where they are from, for messages.

    Raises:
        ValueError: They are not exactly the plan's stored tensors.
    """
    _check_stored(plan, tensors, path)
    with torch.no_grad():
        for stored in _fixed(plan):
            tensor_of(model, stored.name).copy_(tensors[stored.name])
        for entry in _weights(plan):
            unpacked = unpack_unit(tensors, entry.unit, entry.choice)
            for member, tensor in zip(entry.unit.members, unpacked, strict=True):
                tensor_of(model, member.name).copy_(tensor)


def _check_stored(plan: Plan, tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = {stored.name: stored for stored in plan.stored_tensors()}
    if expected.keys() != tensors.keys():
        name = min(expected.keys() ^ tensors.keys())
        where = "is missing" if name in expected else "is not in the plan"
        raise ValueError(f"{path} was written with another plan: tensor {name!r} {where}")
    for name, stored in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != stored.shape or tensor.dtype != STORED_TYPES[stored.dtype]:
            raise ValueError(
                f"{path} was written with another plan: expected {name!r} as {stored.dtype} "
                f"{list(stored.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )


def _check_statistics(entry: PlanUnit, statistics: StatisticsByName) -> None:
    """Refuse to compress blindly what was chosen with calibration text in view."""
    for member in entry.unit.members:
        known = statistics.get(member.name, Statistics())
        lacking = [kind for kind in sorted(entry.choice.needs) if getattr(known, kind) is None]
        if lacking:
            raise ValueError(
                f"{entry.choice.label} of {entry.name} needs statistics of the calibration text "
                f"({', '.join(lacking)}): give the run's folder, or its cache/statistics file"
            )


def _weights(plan: Plan) -> list[PlanUnit]:
    """The units that are part of the model's file."""
    return [entry for entry in plan.units if not entry.unit.is_cache]


def _parameters(model: nn.Module, entry: PlanUnit) -> list[Tensor]:
    return [tensor_of(model, member.name).detach() for member in entry.unit.members]


def _fixed(plan: Plan) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor(t.name, t.dtype, t.shape) for t in plan.fixed)


def _expected_shapes(plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of the plan with its shape as the model holds it."""
    for entry in _weights(plan):
        for member in entry.unit.members:
            *stack, rows, columns = member.shape
            matrix = (columns, rows) if member.transposed else (rows, columns)
            yield member.name, (*stack, *matrix)
    for tensor in plan.fixed:
        yield tensor.name, tensor.shape


def _find(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of this name, under any of its tied names."""
    module, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(module), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Equal for parameters that are tied, whether or not they are one object."""
    return tensor.data_ptr(), tuple(tensor.shape)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name, which the model has."""
    found = _find(model, name)
    assert found is not None, name
    return found


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``output`` if the block ends well and vanishes if not."""
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"{output} exists and is not an empty folder; choose another output")
        output.parent.mkdir(parents=True, exist_ok=True)
        parent = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {output}: {error.strerror}") from error
    try:
        folder = parent / output.name  # mkdtemp's own folder would keep other users out
        folder.mkdir()
        yield folder
        folder.replace(output)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(parent, ignore_errors=True)

"""A GGUF file with the very blocks that a plan was scored with.

The problem: llama-quantize compresses anew, so what it makes can differ from what was measured.
Here the plan's packed matrices go into the file as they are. A file that llama.cpp runs also needs
hyperparameters, the tokenizer and the norms in llama.cpp's form, which only its converter knows how
to write; they are taken from a converted file of the same model, ``like``. Without one the file
holds matrices only and llama.cpp will not load it, which is why this is a function and no exporter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allocator.apply import NO_STATISTICS, StatisticsByName, check_model
from allocator.exporters.gguf_names import GGUFTensor, family, gguf_tensors
from allocator.exporters.llama_cpp import read_gguf
from allocator.plan import Plan
from objectives.tensor_file import STORED_TYPES
from search_spaces.models.geometry import head_dim
from search_spaces.operators.members import pack_unit
from search_spaces.whole_file import replacing

logger = logging.getLogger(__name__)

_PERMUTED_FAMILIES = ("LLAMA",)
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


def write_gguf_tensors(
    plan: Plan,
    model: nn.Module,
    path: Path,
    *,
    like: Path | None = None,
    statistics: StatisticsByName = NO_STATISTICS,
) -> None:
    """Write the plan's matrices as GGUF; with ``like`` a model that llama.cpp loads.

    Args:
        plan: Types of all matrices: gguf and keep only, in a family that the exporter knows.
        model: The plan's model, dense; it is not changed.
        path: The file; an old one is replaced once the new one is complete.
        like: A conversion of the same model by llama.cpp's converter, in any type. Everything but
            the matrices is copied from it.
        statistics: By member name, for weighted types.

    Raises:
        ValueError: The plan is for another model or has operators without a GGUF type, statistics
            are missing, ``like`` is of another model, the gguf package is not installed, or the
            file cannot be written.
    """
    check_model(plan, model)
    tensors = list(gguf_tensors(plan))
    other = _Other(plan, model, like, {tensor.name for tensor in tensors}) if like else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    try:
        with replacing(path) as temporary, closing(_writer(plan, temporary)) as writer:
            if other:
                other.copy_metadata(writer)
            for tensor in tensors:
                _add(writer, tensor)
            if other:
                other.add_vectors(writer)
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for data in _matrices(plan, model, statistics):
                writer.write_tensor_data(data)
            if other:
                other.write_vectors(writer)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    logger.info("wrote %s", path)


def _writer(plan: Plan, path: Path) -> Any:
    """The gguf package's writer with the keys that every file needs."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family(plan)]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    return writer


def _add(writer: Any, tensor: GGUFTensor) -> None:
    """Announce a matrix, by the shape of its bytes."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type.upper()]
    shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=kind)


def _matrices(plan: Plan, model: nn.Module, statistics: StatisticsByName) -> Iterator[Any]:
    """Bytes of every matrix, in the order of :func:`gguf_tensors`, one unit in memory at a time."""
    parts: dict[str, list[GGUFTensor]] = {}
    for tensor in gguf_tensors(plan):
        parts.setdefault(tensor.source, []).append(tensor)
    for name, stored in _stored(plan, model, statistics):
        runs = torch.chunk(stored.contiguous().view(torch.uint8), len(parts[name]), dim=-2)
        for tensor, rows in zip(parts[name], runs, strict=True):
            if tensor.is_permuted and family(plan) in _PERMUTED_FAMILIES:
                rows = _halves_to_pairs(rows, head_dim(model.config))
            yield rows.contiguous().numpy()


def _stored(
    plan: Plan, model: nn.Module, statistics: StatisticsByName
) -> Iterator[tuple[str, Tensor]]:
    """Every matrix under its parameter's name, packed or in its dense type, on the CPU."""
    for entry in plan.units:
        operator, members = entry.choice, entry.unit.members
        parameters = [model.get_parameter(member.name).detach() for member in members]
        packed = pack_unit(parameters, entry.unit, operator, statistics)
        yield from zip((member.name for member in members), packed.values(), strict=True)
    for fixed in plan.fixed:
        if len(fixed.shape) >= 2:
            dense = model.get_parameter(fixed.name).detach()
            yield fixed.name, dense.to(STORED_TYPES[fixed.dtype]).cpu()


def _halves_to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder queries and keys: transformers rotates the halves of a head, ggml its pairs."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return heads.transpose(1, 2).reshape(rows.shape)


class _Other:
    """What is taken from a converted file of the same model: everything but matrices."""

    def __init__(self, plan: Plan, model: nn.Module, path: Path, matrices: set[str]) -> None:
        self._reader = read_gguf(path)
        self._vectors = [t for t in self._reader.tensors if len(t.shape) == 1]
        self._check(plan, model, path, matrices)

    def _check(self, plan: Plan, model: nn.Module, path: Path, matrices: set[str]) -> None:
        """Refuse a file of another model: other matrices, or vectors with other values."""
        import gguf

        held = {tensor.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        if held != matrices:
            name = min(held ^ matrices)
            where = "the plan has no" if name in held else "it has no"
            raise ValueError(f"{path} is not a conversion of the plan's model: {where} {name!r}")
        depth = 1 + max(entry.depth or 0 for entry in plan.units)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family(plan)], depth)
        vectors = {tensor.name: torch.tensor(np.float32(tensor.data)) for tensor in self._vectors}
        for fixed in plan.fixed:
            if len(fixed.shape) != 1:
                continue
            name = names.get_name(fixed.name, try_suffixes=(".weight", ".bias"))
            ours, theirs = model.get_parameter(fixed.name).detach().float().cpu(), vectors.get(name)
            # Gemma's norms multiply by one more than they store, which the converter adds.
            if theirs is None or not (_close(theirs, ours) or _close(theirs, ours + 1)):
                raise ValueError(
                    f"{path} is not a conversion of the plan's model: {fixed.name!r} differs"
                )

    def copy_metadata(self, writer: Any) -> None:
        """Hyperparameters and the tokenizer."""
        import gguf

        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in _OWN_KEYS:
                continue
            kind = field.types[0]
            within = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=within)

    def add_vectors(self, writer: Any) -> None:
        """Announce norms, biases and frequencies."""
        for tensor in self._vectors:
            data = tensor.data
            writer.add_tensor_info(
                tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type
            )

    def write_vectors(self, writer: Any) -> None:
        """Their values, in the same order."""
        for tensor in self._vectors:
            writer.write_tensor_data(tensor.data)


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to a rounding to bfloat16 on the way."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-3)

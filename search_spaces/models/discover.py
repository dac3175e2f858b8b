"""Find the matrices of a model: what can be searched, and what stays dense.

The problem this file solves: architectures name, fuse, stack and transpose their projections
differently, yet everything after this file wants one list of (rows, columns) matrices plus the
tensors stored beside them, each stored element counted exactly once. The walk is generic (linear
layers, Conv1D, stacked experts); what it cannot see is data in ``families``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.families import Family, family_of
from search_spaces.space import Member, Unit
from search_spaces.storage import ELEMENT_BYTES, StoredTensor

logger = logging.getLogger(__name__)

OPENABLE = ("embeddings", "head")

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_SAFETENSORS_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Discovery:
    """What was found in a model.

    Attributes:
        architecture: The configuration's ``model_type``, or the class name of a plain module.
        units: What can be searched, one matrix (or stack of experts) each, in the model's order.
        fixed: Every other stored tensor; tied parameters appear once, under the embedding's name.
    """

    architecture: str
    units: tuple[Unit, ...]
    fixed: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class _Matrix:
    """A parameter that can be searched, before it has a kind."""

    member: Member
    class_name: str
    depth: int | None
    path: tuple[str, ...]  # inside its block, without numbers


def discover(
    model: nn.Module, *, open_units: Collection[str] = (), dense_dtype: str = "BF16"
) -> Discovery:
    """Find the units of a model and the tensors stored beside them.

    Biases, norms and positions stay dense, and so do the routers of mixtures of experts: they are
    tiny, and an error there sends tokens to the wrong expert. Embeddings and head stay dense unless
    opened; when they are tied, opening either opens the one parameter they share.

    Args:
        model: Real or on the meta device.
        open_units: Any of ``embeddings`` and ``head``.
        dense_dtype: Stored type of dense floating-point parameters, by its safetensors name.
            Other tensors, and buffers saved with the model, keep their own.

    Raises:
        ValueError: Nothing to open, an unknown name in ``open_units`` or ``dense_dtype``, or a
            model whose matrices are quantized already.
    """
    if unknown := sorted(set(open_units) - set(OPENABLE)):
        raise ValueError(f"open: expected embeddings or head, got {', '.join(unknown)}")
    if dense_dtype not in ELEMENT_BYTES:
        raise ValueError(f"dense_dtype: expected one of {', '.join(ELEMENT_BYTES)}")
    architecture, family = _identify(model)
    tensors = _Tensors(model)
    embeddings, head = _ends(model, tensors)
    opened: dict[str, Unit] = {}
    for word, name in (("embeddings", embeddings), ("head", head)):
        if word not in open_units:
            continue
        if name is None:
            raise ValueError(f"open: {architecture} has no {word} to open")
        if name not in opened:
            kind = "embeddings" if name == embeddings else "head"
            opened[name] = _end_unit(name, tensors[name], kind)
    matrices = {
        matrix.member.name: matrix
        for matrix in _matrices(model, family)
        if tensors.name_of(matrix.member.name) == matrix.member.name
        and matrix.member.name not in (embeddings, head)
    }
    units = {**dict(zip(matrices, _with_kinds(list(matrices.values())), strict=True)), **opened}
    fixed = tuple(
        StoredTensor(name, _stored_dtype(tensors, name, dense_dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name not in units
    )
    if family is None:
        _warn_unknown(architecture, len(matrices), fixed, {embeddings, head})
    return Discovery(architecture, tuple(units[n] for n in tensors.names if n in units), fixed)


class _Tensors:
    """The stored tensors of a model by name; each distinct one once, in the model's order."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        saved = set(model.state_dict())
        buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in saved}
        self.parameters = frozenset(parameters)
        self._aliases: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        first: dict[object, str] = {}
        for name, tensor in {**parameters, **buffers}.items():
            original = first.setdefault(_identity(tensor), name)
            self._aliases[name] = original
            if original == name:
                self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of distinct tensors."""
        return tuple(self._tensors)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Distinct tensors with their names."""
        yield from self._tensors.items()

    def name_of(self, name: str) -> str:
        """The name under which a possibly tied tensor is stored."""
        return self._aliases[name]

    def rename(self, name: str) -> None:
        """Store a tied tensor under this one of its names instead of the first."""
        old = self._aliases[name]
        self._tensors = {name if key == old else key: t for key, t in self._tensors.items()}
        self._aliases = {
            key: name if value == old else value for key, value in self._aliases.items()
        }


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that are one in memory; meta tensors have no memory but themselves."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _identify(model: nn.Module) -> tuple[str, Family | None]:
    """Name of the architecture, and its family if it is known."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or not model_type:
        return type(model).__name__, None
    return model_type, family_of(model_type)


def _ends(model: nn.Module, tensors: _Tensors) -> tuple[str | None, str | None]:
    """Stored names of the input embedding's and the head's matrix; equal when they are tied."""
    names: list[str | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, getter, lambda: None)()
        except NotImplementedError:  # vision and audio models of transformers
            layer = None
        path = next((n for n, module in model.named_modules() if module is layer), None)
        name = f"{path}.weight" if path else None
        names.append(name if name in tensors.parameters else None)
    embeddings, head = names
    if embeddings:
        tensors.rename(embeddings)
    return embeddings, tensors.name_of(head) if head else None


def _end_unit(name: str, tensor: Tensor, kind: str) -> Unit:
    module, _, parameter = name.rpartition(".")
    _check_dense(name, tensor)
    return Unit(module, (Member(module, parameter, tuple(tensor.shape)),), None, kind)


def _matrices(model: nn.Module, family: Family | None) -> Iterator[_Matrix]:
    """Every matrix of a linear layer and every stack of experts, in the model's order."""
    from transformers.pytorch_utils import Conv1D  # slow to load

    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    for path, module in model.named_modules():
        if _is_router(model, path):
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D):
            names, transposed = ["weight"] if "weight" in own else [], isinstance(module, Conv1D)
        else:
            layout = _expert_layout(module, family)
            names = [] if layout is None else [n for n, p in own.items() if p.dim() == 3]
            transposed = bool(layout)
        for name in names:
            _check_dense(f"{path}.{name}", own[name])
            shape = tuple(own[name].shape)
            if transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            depth, inside = _place(path, lists)
            inside += () if name == "weight" else (name,)
            yield _Matrix(
                Member(path, name, shape, transposed), type(module).__name__, depth, inside
            )


def _expert_layout(module: nn.Module, family: Family | None) -> bool | None:
    """Whether stacked experts are transposed; ``None`` for a module that holds none we can read."""
    if "Experts" not in type(module).__name__:
        return None
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    return family.transposed_experts if family else None


def _is_router(model: nn.Module, path: str) -> bool:
    """Whether a module is, or is inside, what chooses between its sibling experts."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part in _ROUTER_NAMES:
            siblings = model.get_submodule(".".join(parts[:index])).named_children()
            if any("expert" in name and name != part for name, _ in siblings):
                return True
    return False


def _place(path: str, lists: set[str]) -> tuple[int | None, tuple[str, ...]]:
    """Index of the block, and the path inside it without further numbers."""
    parts = path.split(".") if path else []
    for index, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[:index]) in lists:
            return int(part), tuple(p for p in parts[index + 1 :] if not p.isdigit())
    return None, tuple(parts)


def _with_kinds(matrices: list[_Matrix]) -> list[Unit]:
    """Name the projection class of each: the shortest end of its path that is not ambiguous."""
    ends = Counter(
        path[start:] for path in {m.path for m in matrices} for start in range(len(path))
    )
    units = []
    for matrix in matrices:
        path, member = matrix.path, matrix.member
        length = 2 if "experts" in path[:-1] else 1  # an expert's down_proj is not the block's
        while length < len(path) and ends[path[-length:]] > 1:
            length += 1
        kind = ".".join(path[-length:]) or matrix.class_name.lower()
        name = member.module if member.parameter == "weight" else member.name
        units.append(Unit(name or kind, (member,), matrix.depth, kind))
    return units


def _check_dense(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2 or tensor.dim() < 2:
        raise ValueError(
            f"{name}: expected a dense floating-point matrix, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; load the model without quantization"
        )


def _stored_dtype(tensors: _Tensors, name: str, dense_dtype: str) -> str:
    """Parameters are stored dense at 16 bits; buffers and integers as they are."""
    tensor = tensors[name]
    if name in tensors.parameters and tensor.is_floating_point():
        return dense_dtype
    if tensor.dtype not in _SAFETENSORS_NAMES:
        raise ValueError(f"{name}: no stored format for {tensor.dtype}")
    return _SAFETENSORS_NAMES[tensor.dtype]


def _warn_unknown(
    architecture: str, num_units: int, fixed: tuple[StoredTensor, ...], ends: set[str | None]
) -> None:
    """Say what a fallback searches, and how much it leaves dense."""
    left = [t for t in fixed if len(t.shape) > 1 and t.name not in ends]
    logger.warning(
        "unknown architecture %r: searching its %d linear layers%s",
        architecture,
        num_units,
        f"; {len(left)} other matrices stay dense, such as {left[0].name}" if left else "",
    )

r"""llama.cpp: a file for ``llama-quantize --tensor-type-file``.

The problem: an entry ``PATTERN=TYPE`` is a regular expression searched for anywhere in llama.cpp's
own tensor names, after lower-casing; the first that is found wins and one that is never found is
silent. What no entry names gets the base type with ``--pure`` and a built-in mixture without. A
type whose block does not divide the columns is replaced with a warning only. So every matrix has an
entry here, dense ones too, escaped and anchored at both ends, and whole blocks are required.

``verify`` also takes the finished ``.gguf`` file: then it compares what llama-quantize really did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from allocator.exporters.base import DENSE, Mismatch, Receipt, read_text, write_text
from allocator.exporters.gguf_names import DENSE_TYPES, GGUFTensor, family, gguf_tensors
from allocator.plan import Plan
from search_spaces.operators import GGUFBlock
from search_spaces.operators.gguf_block import BLOCKS, FALLBACK

FILE_NAME = "tensor_types.txt"
BASE_TYPE = "q8_0"

_TYPES = (*BLOCKS, *DENSE_TYPES.values())


class LlamaCppExporter:
    """Writes ``tensor_types.txt`` for llama-quantize."""

    name: ClassVar[str] = "llama-cpp"

    def write(self, plan: Plan, destination: Path) -> Receipt:
        """Write ``tensor_types.txt`` into a folder: one ``PATTERN=TYPE`` per line.

        Raises:
            ValueError: An operator other than gguf and keep, a model of another family than the
                known ones, or a matrix that llama.cpp does not quantize.
        """
        lines = [
            f"^{re.escape(tensor.name)}$={tensor.type}\n"
            for tensor in gguf_tensors(plan)
            if tensor.can_be_quantized
        ]
        path = write_text(destination, FILE_NAME, "".join(lines))
        return Receipt((path,), len(plan.units), _notes(plan))

    def verify(self, plan: Plan, artefact: Path) -> list[Mismatch]:
        """Compare types and bytes of every matrix, by llama.cpp's matching and the gguf package.

        Args:
            plan: What to compare with.
            artefact: ``tensor_types.txt`` or its folder, or a finished ``.gguf`` file.

        Raises:
            ValueError: The file cannot be read or llama-quantize would refuse it, or the gguf
                package is not installed.
        """
        if artefact.suffix == ".gguf":
            return _verify_file(plan, artefact)
        rules = _parse(read_text(artefact, FILE_NAME))
        known = _known_names(plan)
        mismatches: list[Mismatch] = []
        for tensor in gguf_tensors(plan):
            name = known[tensor.source, tensor.part]
            if not tensor.can_be_quantized:
                continue
            got = _fallback(_resolve(rules, name), tensor.shape[-1])
            mismatches += _compare(tensor, got, _bytes_of(got, tensor.shape))
        names = set(known.values())
        return mismatches + [
            Mismatch(rule.text, "not in the plan", rule.type)
            for rule in rules
            if not any(rule.pattern.search(name) for name in names)
        ]


@dataclass(frozen=True)
class _Rule:
    text: str
    pattern: re.Pattern[str]
    type: str


def _parse(text: str) -> list[_Rule]:
    """The entries as llama-quantize reads them: separated by white space, patterns lower-cased."""
    rules = []
    for number, entry in enumerate(text.split(), 1):
        pattern, equals, kind = entry.partition("=")
        if not pattern or not equals or kind.lower() not in _TYPES:
            raise ValueError(
                f"entry {number} of {FILE_NAME}: expected PATTERN=TYPE with a type of "
                f"{', '.join(_TYPES)}, got {entry!r}"
            )
        try:
            rules.append(_Rule(entry, re.compile(pattern.lower()), kind.lower()))
        except re.error as error:
            raise ValueError(
                f"entry {number} of {FILE_NAME}: {pattern!r} is not a regular expression: {error}"
            ) from error
    return rules


def _resolve(rules: Sequence[_Rule], name: str) -> str:
    """The type llama-quantize aims at: the first pattern found anywhere in the name wins."""
    return next((rule.type for rule in rules if rule.pattern.search(name)), BASE_TYPE)


def _fallback(kind: str, columns: int) -> str:
    """The type it then takes: another where blocks do not divide the columns."""
    for tried in (kind, FALLBACK.get(kind, "f16")):
        if columns % BLOCKS.get(tried, (1, 0))[0] == 0:
            return tried
    return "f16"


def _compare(tensor: GGUFTensor, kind: str, num_bytes: int) -> Iterator[Mismatch]:
    """What differs between a tensor of the plan and the type and bytes that it really gets."""
    if kind != tensor.type:
        expected = DENSE if tensor.type in DENSE_TYPES.values() else tensor.type
        yield Mismatch(tensor.place, expected, kind)
    elif num_bytes != tensor.bytes:
        yield Mismatch(tensor.place, f"{tensor.bytes} bytes", f"{num_bytes} bytes")


def _verify_file(plan: Plan, path: Path) -> list[Mismatch]:
    """Compare with the tensors that a GGUF file holds; those of one dimension are not planned."""
    found = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    known = _known_names(plan)
    mismatches: list[Mismatch] = []
    for tensor in gguf_tensors(plan):
        held = found.pop(known[tensor.source, tensor.part], None)
        if held is None:
            mismatches += _compare(tensor, "no such tensor", 0)
        elif tensor.can_be_quantized:
            mismatches += _compare(tensor, held.tensor_type.name.lower(), held.n_bytes)
    return mismatches + [
        Mismatch(name, "not in the plan", tensor.tensor_type.name.lower())
        for name, tensor in found.items()
        if len(tensor.shape) > 1
    ]


def read_gguf(path: Path) -> Any:
    """The gguf package's reader on a file.

    Raises:
        ValueError: The package is not installed, or the file is not there or not GGUF.
    """
    gguf = _gguf()
    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"cannot read {path}: not a GGUF file ({error})") from error


def _known_names(plan: Plan) -> dict[tuple[str, int], str]:
    """The gguf package's own name for every part of every matrix of the plan."""
    gguf = _gguf()
    depths = [int(d) for t in gguf_tensors(plan) for d in re.findall(r"^blk\.(\d+)\.", t.name)]
    architecture = gguf.MODEL_ARCH[family(plan)]
    names = gguf.get_tensor_name_map(architecture, max(depths, default=0) + 1)
    known = {}
    for tensor in gguf_tensors(plan):
        source = tensor.source.removesuffix(".weight")
        if tensor.num_parts > 1:  # its converter takes fused experts apart first
            source = source.replace("gate_up_proj", ("gate_proj", "up_proj")[tensor.part])
        name = names.get_name(source)
        if name is None:
            raise ValueError(f"the gguf package has no name for {source!r} of {family(plan)}")
        known[tensor.source, tensor.part] = f"{name}.weight"
    return known


def _bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Payload bytes by the gguf package's table."""
    gguf = _gguf()
    width, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    num_weights = 1
    for extent in shape:
        num_weights *= extent
    return int(num_weights // width * size)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("checking GGUF needs the package gguf: pip install gguf") from error
    return gguf


def _notes(plan: Plan) -> tuple[str, ...]:
    vectors = [tensor for tensor in plan.fixed if len(tensor.shape) == 1]
    extra = sum(4 * tensor.shape[0] for tensor in vectors)
    extra -= sum(t.bytes for t in plan.stored_tensors() if t.name in {v.name for v in vectors})
    notes = [
        f"Convert the model with convert_hf_to_gguf.py, then run llama-quantize --pure "
        f"--tensor-type-file {FILE_NAME} DENSE.gguf OUT.gguf {BASE_TYPE.upper()}; a base type that "
        "is a float ignores the file, and --output-tensor-type and --token-embedding-type beat it.",
        f"llama.cpp keeps norms and biases in 32-bit floats, {extra} bytes more than the plan "
        "prices, and adds its own metadata and tokenizer.",
    ]
    choices = [entry.choice for entry in plan.units]
    num_weighted = sum(isinstance(c, GGUFBlock) and c.weighted for c in choices)
    if num_weighted:
        notes.append(
            f"{num_weighted} units were scored with an importance matrix: give llama-quantize one "
            "of the same text with --imatrix; it then weighs every matrix that has an entry there."
        )
    return tuple(notes)

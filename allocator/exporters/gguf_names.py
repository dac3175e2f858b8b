"""What llama.cpp calls a plan's tensors, and which type the plan gives each.

The problem: llama.cpp has tensor names of its own, one set per architecture, and its converter
splits or merges some parameters. The families here convert matrix by matrix, and stacks of fused
experts part by part; any other is refused, since a wrong name is ignored without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from allocator.plan import Plan
from search_spaces.operators import GGUFBlock, Keep
from search_spaces.operators.gguf_block import BLOCKS

# Our architecture: llama.cpp's, by its key in the gguf package.
FAMILIES = {
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "MixtralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
}

# ggml's plain floats by their names in safetensors, and their bytes.
DENSE_TYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_DENSE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}

_TOP = {"model.embed_tokens.weight": "token_embd", "lm_head.weight": "output"}
_IN_BLOCK = {
    "self_attn.q_proj.weight": ("attn_q",),
    "self_attn.k_proj.weight": ("attn_k",),
    "self_attn.v_proj.weight": ("attn_v",),
    "self_attn.o_proj.weight": ("attn_output",),
    "mlp.gate_proj.weight": ("ffn_gate",),
    "mlp.up_proj.weight": ("ffn_up",),
    "mlp.down_proj.weight": ("ffn_down",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "mlp.gate.weight": ("ffn_gate_inp",),
}
_PERMUTED = ("attn_q.weight", "attn_k.weight")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the GGUF file that a plan asks for.

    Attributes:
        unit: Whose choice it is; the tensor itself when fixed.
        source: The parameter it holds, or a part of.
        part: Which of ``num_parts`` equal runs of the parameter's rows.
        num_parts: 1 for most, 2 for gate and up of fused experts.
        name: Its name in the file.
        type: ggml's type in lower case.
        shape: (rows, columns) or (experts, rows, columns), as the file means it.
    """

    unit: str
    source: str
    part: int
    num_parts: int
    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def place(self) -> str:
        """The unit and, where that differs, the module, for messages."""
        module = self.source.removesuffix(".weight")
        return module if self.unit in (module, self.source) else f"{self.unit} ({module})"

    @property
    def bytes(self) -> int:
        """Payload bytes."""
        return type_bytes(self.type, self.shape)

    @property
    def is_permuted(self) -> bool:
        """Its rows are queries or keys, which some families keep in another order."""
        return self.name.endswith(_PERMUTED)

    @property
    def can_be_quantized(self) -> bool:
        """llama-quantize leaves the routers of experts alone."""
        return not self.name.endswith("ffn_gate_inp.weight")


def type_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Payload bytes of a tensor of a type whose blocks divide its columns."""
    width, size = BLOCKS[kind] if kind in BLOCKS else (1, _DENSE_BYTES[kind])
    num_blocks = shape[-1] // width
    for extent in shape[:-1]:
        num_blocks *= extent
    return num_blocks * size


def family(plan: Plan) -> str:
    """The gguf package's key of the plan's architecture.

    Raises:
        ValueError: It is not one of ``FAMILIES``.
    """
    found = FAMILIES.get(plan.model.architecture)
    if found is None:
        raise ValueError(
            f"llama-cpp knows the tensor names of {', '.join(FAMILIES)}; "
            f"the plan is for {plan.model.architecture}"
        )
    return found


def gguf_tensors(plan: Plan) -> Iterator[GGUFTensor]:
    """Every matrix of the plan, searched and fixed, as the GGUF file should hold it.

    Raises:
        ValueError: An operator that is no GGUF type, a cache, or a tensor without a name there.
    """
    family(plan)
    for entry in plan.units:
        operator = entry.choice
        if entry.unit.is_cache or not isinstance(operator, GGUFBlock | Keep):
            raise ValueError(
                f"llama-cpp cannot say {operator.label!r} (unit {entry.name!r}): it takes gguf and "
                "keep for matrices; `allocator apply` writes any plan as a dense checkpoint"
            )
        for member in entry.unit.members:
            (stored,) = operator.layout(member.matrix_shape)
            kind = DENSE_TYPES[stored.dtype] if isinstance(operator, Keep) else operator.type
            for tensor in _named(entry.name, member.name, kind, member.shape):
                if kind in BLOCKS and not tensor.can_be_quantized:
                    raise ValueError(
                        f"llama-cpp never quantizes {tensor.name!r} ({member.name!r}); pin it to "
                        "keep and search again"
                    )
                yield tensor
    for fixed in plan.fixed:
        if len(fixed.shape) >= 2:
            kind = DENSE_TYPES.get(fixed.dtype, "")
            if not kind:
                raise ValueError(f"llama-cpp cannot say that {fixed.name!r} is {fixed.dtype}")
            yield from _named(fixed.name, fixed.name, kind, fixed.shape)


def _named(unit: str, source: str, kind: str, shape: tuple[int, ...]) -> Iterator[GGUFTensor]:
    names = list(_names(source))
    count = len(names)
    for part, name in enumerate(names):
        extent = (*shape[:-2], shape[-2] // count, shape[-1])
        yield GGUFTensor(unit, source, part, count, name, kind, extent)


def _names(source: str) -> Iterator[str]:
    """Names in the file of a parameter.

    Raises:
        ValueError: It has none.
    """
    if source in _TOP:
        yield f"{_TOP[source]}.weight"
        return
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", source)
    if found is None or found[2] not in _IN_BLOCK:
        raise ValueError(f"llama-cpp has no name for {source!r} in the families that it knows")
    for leaf in _IN_BLOCK[found[2]]:
        yield f"blk.{found[1]}.{leaf}.weight"

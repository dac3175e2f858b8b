"""What must be known about an architecture that the generic walk cannot see. Data only, no torch.

The walk in ``models`` finds every matrix by itself. What is left to say about a family is which
of its projections read the same input, so that a serving runtime may run them as one fused kernel,
and how its fused experts lie in memory. Adding a family is adding an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

QKV: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
GATE_UP: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
# Latent attention: both down-projections of the hidden state.
LATENT: Mapping[str, tuple[str, ...]] = {
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


@dataclass(frozen=True)
class Family:
    """Architectures whose blocks look alike.

    Attributes:
        model_types: The ``model_type`` of their configurations.
        fusible: Name of a fused projection -> the sibling modules a runtime may fuse into it, in
            the order of their rows. Empty where the checkpoint itself is fused.
        transposed_experts: Stacked experts lie as (matrices, columns, rows). Asked only where the
            module does not say so itself, as most of ``transformers`` do (``is_transposed``).
    """

    model_types: tuple[str, ...]
    fusible: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed_experts: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        (
            "apertus",
            "arcee",
            "cohere",
            "cohere2",
            "cwm",
            "diffllama",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "mistral",
            "nemotron",
            "olmo",
            "olmo2",
            "olmo3",
            "qwen2",
            "qwen3",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
            "vaultgemma",
        ),
        {**QKV, **GATE_UP},
    ),
    "mixture_of_experts": Family(
        (
            "ernie4_5_moe",
            "flex_olmo",
            "glm4_moe",
            "gpt_oss",
            "granitemoe",
            "minimax_m2",
            "mixtral",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
        ),
        {**QKV, **GATE_UP},
    ),
    "llama4": Family(("llama4", "llama4_text"), {**QKV, **GATE_UP}, transposed_experts=True),
    "deepseek": Family(("deepseek_v2", "deepseek_v3"), {**LATENT, **GATE_UP}),
    "fused": Family(("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "glm", "glm4", "phi3")),
    "plain_mlp": Family(("biogpt", "gpt_neo", "gptj", "opt", "phi", "xglm"), QKV),
}


def family_of(model_type: str) -> Family | None:
    """The family that lists a ``model_type``, or ``None``."""
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    return None


def fusible_projections() -> dict[str, tuple[str, ...]]:
    """Every family's fusible projections; a name means the same siblings in all of them."""
    merged: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES.values():
        merged.update(family.fusible)
    return merged

"""A tiny random model of every family, by name, and how to read a unit's weights from one."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
STACKED = ("experts.gate_up_proj", "experts.down_proj")
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

# model_type -> (what differs from COMMON, the kinds of one block in any order)
FAMILIES = {
    "llama": ({}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({}, LLAMA),
    "mistral": ({}, LLAMA),
    "gemma": ({}, LLAMA),
    "gemma2": ({}, LLAMA),
    "gemma3_text": ({}, LLAMA),
    "phi": ({}, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "phi3": ({}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": ({"n_positions": 16}, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")),
    "gpt_neox": ({}, NEOX),
    "bloom": ({}, NEOX),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "mixtral": ({"num_local_experts": 3}, ATTENTION + STACKED),
    "qwen3_moe": ({"num_experts": 3, **EXPERTS}, ATTENTION + STACKED),
    "qwen2_moe": (
        {"num_experts": 3, "shared_expert_intermediate_size": 40, **EXPERTS},
        (*ATTENTION, *STACKED, "gate_proj", "up_proj", "shared_expert.down_proj"),
    ),
    "gpt_oss": ({"num_local_experts": 3, "num_experts_per_tok": 2}, ATTENTION + STACKED),
    "llama4_text": (
        {"num_local_experts": 3, "intermediate_size_mlp": 40},
        (*ATTENTION, *STACKED, "gate_proj", "up_proj", "shared_expert.down_proj"),
    ),
}


def tiny(model_type, device="meta", **overrides):
    """A random model with two blocks."""
    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES[model_type][0], **overrides})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def matrix(model, member):
    """A member's weights as (rows, columns) or (matrices, rows, columns)."""
    parameter = model.get_submodule(member.module).get_parameter(member.parameter).detach()
    return parameter.transpose(-1, -2) if member.transposed else parameter

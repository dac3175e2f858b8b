"""The priced cache against the one that a model really fills."""

import pytest
import torch
from tiny_models import COMMON, FAMILIES, tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from search_spaces.models.kv_layers import cache_units

TOKENS = 5
OTHERS = {
    "falcon": {"multi_query": True},
    "falcon with its newer blocks": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_bigcode": {"multi_query": True},
}


def build(name, device="cpu"):
    if name in FAMILIES:
        return tiny(name, device=device).eval()
    fields = {k: v for k, v in COMMON.items() if k not in ("head_dim", "num_key_value_heads")}
    config = AutoConfig.for_model(name.split()[0], **fields, **OTHERS.get(name, {}))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_prices_what_the_model_caches(name):
    model = build(name)
    units = cache_units(model, TOKENS, batch=2)
    filled = DynamicCache(config=model.config)
    tokens = torch.arange(2 * TOKENS).reshape(2, TOKENS) + 3
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=filled, use_cache=True)
    shapes = [
        tuple((s.shape[0], s.shape[2], s.shape[1] * s.shape[3]) for s in (layer.keys, layer.values))
        for layer in filled.layers
    ]
    assert [tuple(member.shape for member in unit.members) for unit in units] == shapes
    assert [unit.depth for unit in units] == [0, 1]
    assert all(unit.is_cache and unit.num_weights == 0 for unit in units)
    assert cache_units(build(name, "meta"), TOKENS, batch=2) == units


def test_names_and_kinds():
    tied = cache_units(tiny("llama"), 10)
    apart = cache_units(tiny("llama"), 10, apart=True)
    assert [unit.name for unit in tied] == [f"model.layers.{i}.self_attn.cache" for i in (0, 1)]
    assert {unit.kind for unit in tied} == {"cache"}
    assert [(unit.name, unit.kind) for unit in apart[:2]] == [
        ("model.layers.0.self_attn.keys.cache", "keys_cache"),
        ("model.layers.0.self_attn.values.cache", "values_cache"),
    ]
    assert [m for unit in apart for m in unit.members] == [m for u in tied for m in u.members]


def test_a_sliding_window_caches_no_more_than_it_sees():
    model = tiny("gemma2", sliding_window=8)
    assert [unit.members[0].shape[1] for unit in cache_units(model, 100)] == [8, 100]
    assert [unit.members[0].shape[1] for unit in cache_units(model, 6)] == [6, 6]
    (first, _) = cache_units(tiny("llama4_text", attention_chunk_size=16), 100)
    assert first.members[0].shape[1] == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("mamba", "meta"), "layer 0 keeps a LinearAttentionLayer"),
        (lambda: build("deepseek_v3", "meta"), "through latents"),
        (lambda: torch.nn.Linear(2, 2), "Linear has no configuration of transformers"),
    ],
)
def test_refuses_what_is_no_cache_of_keys_and_values(make, message):
    with pytest.raises(ValueError, match=message):
        cache_units(make(), 10)


def test_refuses_a_configuration_without_the_numbers():
    model = tiny("gpt2")
    model.config.n_head = model.config.head_dim = 0
    with pytest.raises(ValueError, match="gpt2: its configuration lacks the heads that are cached"):
        cache_units(model, 10)


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (-5, 1), (10, 0)])
def test_refuses_a_context_of_nothing(context, batch):
    with pytest.raises(ValueError, match=f"got {context} and {batch}"):
        cache_units(tiny("llama"), context, batch=batch)

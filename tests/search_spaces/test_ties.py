"""A runtime's fused kernels tie exactly what they fuse."""

import pytest
from tiny_models import FAMILIES, tiny

from search_spaces.families import FAMILIES as FAMILY_TABLE
from search_spaces.models import discover
from search_spaces.space import Member, Unit
from search_spaces.ties import TIES, tie_units

QKV, GATE_UP = "{q,k,v}_proj", "{gate,up}_proj"


def unit(name, kind=None):
    return Unit(name, (Member(name, "weight", (4, 4)),), 0, kind or name.rpartition(".")[2])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("runtime", TIES)
def test_ties_keep_every_matrix_and_unique_names(model_type, runtime):
    units = discover(tiny(model_type)).units
    tied = tie_units(units, runtime)
    members = [m.name for u in tied for m in u.members]
    assert sorted(members) == sorted(m.name for u in units for m in u.members)
    assert len({u.name for u in tied}) == len(tied)
    assert [u.depth for u in tied] == sorted(u.depth for u in tied)


@pytest.mark.parametrize("runtime", ["none", "llama.cpp"])
def test_no_ties_changes_nothing(runtime):
    units = discover(tiny("mixtral")).units
    assert tie_units(units, runtime) == units


def test_vllm_ties_a_llama_block():
    tied = tie_units(discover(tiny("llama")).units, "vllm")
    block = "model.layers.1."
    assert [(u.name, u.kind) for u in tied if u.depth == 1] == [
        (f"{block}self_attn.{QKV}", "qkv_proj"),
        (f"{block}self_attn.o_proj", "o_proj"),
        (f"{block}mlp.{GATE_UP}", "gate_up_proj"),
        (f"{block}mlp.down_proj", "down_proj"),
    ]
    assert [m.name for m in tied[0].members] == [
        f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"
    ]


def test_names_do_not_depend_on_the_order_of_modules():
    opt = tie_units(discover(tiny("opt")).units, "vllm")  # registers k, v, q
    assert opt[0].name == f"model.decoder.layers.0.self_attn.{QKV}"


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3", "bloom"])
def test_fused_checkpoints_need_no_ties(model_type):
    units = discover(tiny(model_type)).units
    assert tie_units(units, "vllm") == units


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_vllm_ties_the_experts_of_a_layer(model_type):
    tied = tie_units(discover(tiny(model_type)).units, "vllm")
    (experts,) = (u for u in tied if u.depth == 0 and u.kind == "experts")
    assert experts.name == "model.layers.0.mlp.experts"
    assert [m.parameter for m in experts.members] == ["gate_up_proj", "down_proj"]
    assert all(m.num_matrices == 3 for m in experts.members)


def test_vllm_ties_experts_that_are_modules():
    names = [f"h.0.moe.experts.{i}.{w}" for i in range(3) for w in ("w1", "w2")]
    units = [unit(n, f"experts.{n[-2:]}") for n in names]
    (experts,) = tie_units([*units], "vllm")
    assert (experts.name, experts.kind, len(experts.members)) == ("h.0.moe.experts", "experts", 6)


def test_only_siblings_are_tied():
    names = ["a.self_attn.q_proj", "a.cross_attn.k_proj", "a.cross_attn.v_proj", "a.mlp.up_proj"]
    tied = tie_units([unit(name) for name in names], "vllm")
    assert [u.name for u in tied] == [
        "a.self_attn.q_proj", "a.cross_attn.{k,v}_proj", "a.mlp.up_proj",
    ]  # fmt: skip


def test_ambiguous_kinds_stay_apart():
    names = ["a.self_attn.k_proj", "a.self_attn.v_proj"]
    (tied,) = tie_units([unit(n, n.removeprefix("a.")) for n in names], "vllm")
    assert tied.kind == "self_attn.qkv_proj"


def test_projections_without_a_common_ending():
    names = ["a.attn.q_a_proj", "a.attn.kv_a_proj_with_mqa"]
    (tied,) = tie_units([unit(name) for name in names], "vllm")
    assert tied.name == "a.attn.{q_a_proj,kv_a_proj_with_mqa}"


def test_a_fused_name_means_the_same_in_every_family():
    meanings = {}
    for family in FAMILY_TABLE.values():
        for fused, siblings in family.fusible.items():
            assert meanings.setdefault(fused, siblings) == siblings


def test_unknown_runtime():
    with pytest.raises(ValueError, match="unknown runtime 'vlm' \\(did you mean 'vllm'"):
        tie_units([unit("a")], "vlm")

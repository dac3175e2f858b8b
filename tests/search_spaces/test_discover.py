"""Every matrix of every family is found once, and every element of a model is counted once."""

import logging
from collections import Counter
from math import prod

import pytest
import torch
from tiny_models import FAMILIES, matrix, tiny
from torch import nn

from search_spaces.families import FAMILIES as FAMILY_TABLE
from search_spaces.models import discover, skeleton
from search_spaces.storage import StoredTensor

every_family = pytest.mark.parametrize("model_type", FAMILIES)
ENDS = ("embeddings", "head")


def num_elements(found):
    return sum(u.num_weights for u in found.units) + sum(prod(t.shape) for t in found.fixed)


def num_stored(model):
    saved = set(model.state_dict())
    buffers = sum(b.numel() for name, b in model.named_buffers() if name in saved)
    return sum(p.numel() for p in model.parameters()) + buffers


@every_family
def test_every_projection_of_every_block_once(model_type, caplog):
    found = discover(tiny(model_type))
    kinds = FAMILIES[model_type][1]
    assert Counter((u.depth, u.kind) for u in found.units) == Counter(
        (depth, kind) for depth in (0, 1) for kind in kinds
    )
    assert found.architecture == model_type
    assert [unit.depth for unit in found.units] == sorted(unit.depth for unit in found.units)
    assert "unknown architecture" not in caplog.text


@every_family
@pytest.mark.parametrize("open_units", [(), ENDS], ids=["closed", "opened"])
def test_every_element_is_counted_once(model_type, open_units):
    model = tiny(model_type)
    found = discover(model, open_units=open_units)
    assert num_elements(found) == num_stored(model)
    names = [m.name for unit in found.units for m in unit.members] + [t.name for t in found.fixed]
    assert len(set(names)) == len(names)
    assert set(names) <= set(model.state_dict())


@every_family
def test_names_resolve_and_shapes_match(model_type):
    model = tiny(model_type)
    for unit in discover(model, open_units=ENDS).units:
        (member,) = unit.members
        assert tuple(matrix(model, member).shape) == member.shape
        assert unit.name in (member.module, member.name)


@every_family
def test_columns_are_inputs_whatever_the_layout(model_type):
    """An attention projection or an expert's up-projection reads the hidden state."""
    model = tiny(model_type, intermediate_size=56, hidden_size=32)
    reading = ("q_proj", "qkv_proj", "c_attn", "query_key_value", "experts.gate_up_proj")
    inputs = [u.members[0].shape[-1] for u in discover(model).units if u.kind in reading]
    assert inputs
    assert set(inputs) == {32}


@every_family
def test_only_matrices_of_blocks_are_searched(model_type):
    found = discover(tiny(model_type))
    fixed = {t.name for t in found.fixed if len(t.shape) > 1}
    allowed = ("embed", "wte", "wpe", "lm_head", "router", "gate.weight", "bias")
    assert all(any(word in name for word in allowed) for name in fixed)
    assert {t.dtype for t in found.fixed} == {"BF16"}


def test_routers_stay_dense_even_as_linear_layers():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.shared_expert_gate = nn.Linear(8, 1)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 8)
            self.up = nn.Linear(8, 8)

    model = nn.Sequential(Mixture(), Gated())
    found = discover(model)
    assert {unit.name for unit in found.units} == {
        "0.experts.0", "0.experts.1", "0.experts.2", "1.gate", "1.up",
    }  # fmt: skip
    assert {unit.kind for unit in found.units} == {"experts", "gate", "up"}


def test_tied_embeddings_are_stored_and_opened_once():
    model = tiny("gemma")
    closed = [t for t in discover(model).fixed if t.shape == (61, 32)]
    assert closed == [StoredTensor("model.embed_tokens.weight", "BF16", (61, 32))]
    for words in (("embeddings",), ("head",), ENDS):
        opened = discover(model, open_units=words)
        ends = [unit for unit in opened.units if unit.depth is None]
        assert [(u.name, u.kind) for u in ends] == [("model.embed_tokens", "embeddings")]
        assert num_elements(opened) == num_stored(model)


def test_untied_ends_are_two_units():
    found = discover(tiny("llama"), open_units=ENDS)
    ends = [(unit.name, unit.kind) for unit in found.units if unit.depth is None]
    assert ends == [("model.embed_tokens", "embeddings"), ("lm_head", "head")]


def test_tied_by_shared_memory_only():
    model = tiny("llama", device="cpu")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    found = discover(model)
    assert [t.name for t in found.fixed if t.shape == (61, 32)] == ["model.embed_tokens.weight"]


def test_tied_takes_the_embeddings_name_though_the_head_comes_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 20, bias=False)
            self.table = nn.Embedding(20, 8)
            self.head.weight = self.table.weight

        def get_input_embeddings(self):
            return self.table

        def get_output_embeddings(self):
            return self.head

    assert [t.name for t in discover(Backwards()).fixed] == ["table.weight"]


def test_unknown_architecture_falls_back_to_linear_layers_and_says_so(caplog):
    model = nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.Linear(12, 9), nn.Sequential(nn.Linear(9, 5)), nn.BatchNorm1d(5)
    )
    with caplog.at_level(logging.WARNING):
        found = discover(model)
    assert [unit.name for unit in found.units] == ["1", "2.0"]
    assert [unit.depth for unit in found.units] == [1, 2]
    assert "unknown architecture 'Sequential': searching its 2 linear layers" in caplog.text
    assert "1 other matrices stay dense, such as 0.weight" in caplog.text
    assert num_elements(found) == num_stored(model)


def test_saved_buffers_keep_their_own_type():
    fixed = {t.name: t for t in discover(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5))).fixed}
    assert fixed["0.running_mean"].dtype == "F32"
    assert fixed["0.num_batches_tracked"] == StoredTensor("0.num_batches_tracked", "I64", ())


def test_a_single_linear_layer_is_a_model():
    (unit,) = discover(nn.Linear(4, 3)).units
    assert (unit.name, unit.depth, unit.members[0].shape) == ("linear", None, (3, 4))


def test_layers_shared_between_blocks_are_one_unit():
    shared = nn.Linear(4, 4, bias=False)
    found = discover(nn.Sequential(shared, nn.ReLU(), shared))
    assert [unit.name for unit in found.units] == ["0"]


def test_quantized_models_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="without quantization"):
        discover(nn.Sequential(layer))


def test_nothing_to_open():
    with pytest.raises(ValueError, match="Sequential has no head to open"):
        discover(nn.Sequential(nn.Linear(2, 2)), open_units=["head"])
    with pytest.raises(ValueError, match="expected embeddings or head, got haed"):
        discover(tiny("llama"), open_units=["haed"])


def test_a_model_type_belongs_to_one_family():
    listed = Counter(t for family in FAMILY_TABLE.values() for t in family.model_types)
    assert set(listed.values()) == {1}


def test_skeleton_has_every_parameter_and_no_weights(tmp_path):
    model = tiny("qwen3", device="cpu")
    model.config.save_pretrained(tmp_path)
    bare = skeleton(tmp_path)
    assert all(p.is_meta for p in bare.parameters())
    assert discover(bare) == discover(model)


@pytest.mark.parametrize("config", [None, "{}", "not json", '{"model_type": "vit"}'])
def test_skeleton_of_nothing_is_one_sentence(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="cannot build a causal language model from") as caught:
        skeleton(tmp_path)
    assert "\n" not in str(caught.value)


def test_skeleton_of_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no model folder .*nowhere"):
        skeleton(tmp_path / "nowhere")

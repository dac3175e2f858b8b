"""transformers-cache: the file, the cache made from it, and text generated with that."""

import json
from pathlib import Path

import pytest
import torch
from cli_runs import MODEL
from plan_factory import as_loaded, in_turn, make_plan, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer

from allocator.exporters import EXPORTERS, Exporter
from allocator.exporters.transformers_cache import load_cache
from allocator.plan import Plan, PlanMember, PlanUnit
from objectives.kv_cache import CacheSwitch
from objectives.quantized_layer import QuantizedLayer
from search_spaces.models.kv_layers import cache_units
from search_spaces.operators import Keep, KVQuantize, RoundToNearest, operator_to_json

SETTINGS = (KVQuantize(4, 2, 16), Keep(), KVQuantize(8, 8, 32, 4))


@pytest.fixture
def exporter():
    return EXPORTERS["transformers-cache"]()


def with_caches(model, *operators, apart=False):
    """A plan for weights and for the caches of 48 tokens, 2 sequences; operators dealt in turn."""
    deal = in_turn(*operators)
    plan = make_plan(model, in_turn(RoundToNearest(4, 32)))
    caches = []
    for unit in cache_units(model, 48, batch=2, apart=apart):
        operator = deal(unit)
        members = tuple(
            PlanMember(module=m.module, parameter=m.parameter, shape=m.shape, cache=True)
            for m in unit.members
        )
        caches.append(
            PlanUnit(
                name=unit.name,
                kind=unit.kind,
                depth=unit.depth,
                members=members,
                operator=operator_to_json(operator),
                bytes=unit.bytes(operator),
            )
        )
    size = sum(entry.bytes for entry in caches)
    data = plan.model_dump() | {"units": (*plan.units, *caches)}
    for field in ("budget_bytes", "achieved_bytes", "searched_bytes", "searched_budget_bytes"):
        data[field] += size
    return Plan.model_validate(data)


def test_is_an_exporter(exporter):
    assert isinstance(exporter, Exporter)
    assert EXPORTERS[exporter.name] is type(exporter)


@pytest.mark.parametrize("apart", [False, True])
def test_reads_back_what_it_wrote(exporter, apart, tmp_path):
    plan = with_caches(tiny_llama(layers=3), *SETTINGS, apart=apart)
    receipt = exporter.write(plan, tmp_path / "new" / "folder")
    (path,) = receipt.files
    assert receipt.num_units == (6 if apart else 3)
    assert all(note.endswith(".") for note in receipt.notes)
    assert exporter.verify(plan, path) == exporter.verify(plan, path.parent) == []
    first = path.read_bytes()
    exporter.write(plan, path.parent)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["transformers_cache.json"]


def test_says_every_layers_keys_and_values(exporter, tmp_path):
    plan = with_caches(tiny_llama(layers=3), *SETTINGS)
    (path,) = exporter.write(plan, tmp_path).files
    data = json.loads(path.read_text())
    assert (data["context"], data["batch"]) == (48, 2)
    assert data["cache_bytes"] == plan.cache_bytes
    assert data["layers"] == [
        {
            "layer": 0,
            "module": "model.layers.0.self_attn",
            "keys": {"bits": 4, "group_size": 16, "residual": 0},
            "values": {"bits": 2, "group_size": 16, "residual": 0},
        },
        {
            "layer": 1,
            "module": "model.layers.1.self_attn",
            "keys": {"bits": 16},
            "values": {"bits": 16},
        },
        {
            "layer": 2,
            "module": "model.layers.2.self_attn",
            "keys": {"bits": 8, "group_size": 32, "residual": 4},
            "values": {"bits": 8, "group_size": 32, "residual": 4},
        },
    ]


def test_finds_what_differs(exporter, tmp_path):
    model = tiny_llama(layers=3)
    exporter.write(with_caches(model, *SETTINGS), tmp_path)
    other = with_caches(model, SETTINGS[0], SETTINGS[0], SETTINGS[2])
    found = [(m.unit, m.expected, m.got) for m in exporter.verify(other, tmp_path)]
    assert found == [
        ("model.layers.1.self_attn.keys", "kv4-g16", "keep"),
        ("model.layers.1.self_attn.values", "kv2-g16", "keep"),
    ]
    (extra, _) = exporter.verify(with_caches(tiny_llama(), *SETTINGS), tmp_path)
    assert (extra.unit, extra.expected) == ("keys of layer 2", "not in the plan")


def test_refuses_a_plan_without_caches_and_folders_in_the_way(exporter, tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="decides no cache: search with --context"):
        exporter.write(make_plan(model, in_turn(Keep())), tmp_path)
    (tmp_path / "file").write_text("in the way")
    plan = with_caches(model, Keep())
    with pytest.raises(ValueError, match="cannot write"):
        exporter.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"model-allocator cache"', '"another"'),
        ('"bits": 4', '"bits": 40'),
        ('"bits": 4', '"bits": 4.0'),
        ('"bits": 4', '"bits": true'),
        ('"group_size": 16', '"groups": 16'),
        ('"layer": 0', '"layer": null'),
        ('"keys"', '"queries"'),
        ('"layers"', '"blocks"'),
    ],
)
def test_refuses_files_that_are_not_its_own(exporter, tmp_path, old, new):
    model = tiny_llama()
    plan = with_caches(model, *SETTINGS)
    (path,) = exporter.write(plan, tmp_path).files
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"transformers_cache\.json|format is 'another'"):
        load_cache(path, model.config)
    with pytest.raises(ValueError, match=r"transformers_cache\.json|format is 'another'"):
        exporter.verify(plan, path)


def test_weight_exporters_leave_caches_alone(tmp_path):
    model = tiny_llama()
    plan, without = with_caches(model, *SETTINGS), make_plan(model, in_turn(RoundToNearest(4, 32)))
    for name in ("torchao", "evopress", "gptqmodel"):
        exporter = EXPORTERS[name]()
        (path,) = exporter.write(without, tmp_path / "without").files
        receipt = exporter.write(plan, tmp_path / "with")
        assert receipt.files[0].read_bytes() == path.read_bytes()
        assert receipt.num_units == len(without.units)
        assert exporter.verify(plan, receipt.files[0]) == []
    (_, *weights) = (
        EXPORTERS["evopress"]().write_model(plan, as_loaded(model), tmp_path / "database", {}).files
    )
    assert len(weights) == len(without.units)


# What generation makes of it


@pytest.fixture(scope="module")
def trained():
    """The trained model and (2, 40) tokens of text."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text = (MODEL.parent / "persuasion.txt").read_text()[5000:9000]
    tokens = AutoTokenizer.from_pretrained(MODEL)(text[:400], return_tensors="pt").input_ids
    return model, tokens[0, :80].reshape(2, 40)


def exported(model, operator, folder, apart=False):
    plan = with_caches(model, *operator, apart=apart)
    (path,) = EXPORTERS["transformers-cache"]().write(plan, folder).files
    return plan, load_cache(path, model.config)


def generate(model, tokens, cache=None, **options):
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=24,
        min_new_tokens=24,
        **{"do_sample": False, "pad_token_id": 0, **options},
    )[:, tokens.shape[1] :]


def test_generates_with_the_plans_layers(trained, tmp_path):
    model, tokens = trained
    _, cache = exported(model, SETTINGS, tmp_path)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [QuantizedLayer, DynamicLayer, QuantizedLayer] * 2
    assert generate(model, tokens, cache).shape == (2, 24)
    assert cache.get_seq_length() == 40 + 23
    dense = cache.layers[1]
    # A third is open, in the model's float32; the rest is closed.
    assert cache.layers[0].nbytes < (dense.keys.nbytes + dense.values.nbytes) / 2
    beams = exported(model, SETTINGS, tmp_path)[1]
    assert generate(model, tokens, beams, num_beams=2).shape == (2, 24)


def test_generated_text_is_the_dense_one_at_eight_bits_and_not_at_one(trained, tmp_path):
    model, tokens = trained
    dense = generate(model, tokens)
    found = {}
    for bits in (1, 8):
        cache = exported(model, (KVQuantize(bits, bits, 8),), tmp_path)[1]
        found[bits] = (generate(model, tokens, cache) == dense).float().mean().item()
    kept = exported(model, (Keep(),), tmp_path)[1]
    assert torch.equal(generate(model, tokens, kept), dense)
    assert found[8] > 0.5 > 0.25 > found[1]  # the first word that differs changes all after it


@pytest.mark.parametrize("apart", [False, True])
def test_a_forward_pass_is_the_one_that_was_measured(trained, tmp_path, apart):
    model, tokens = trained
    plan, cache = exported(model, SETTINGS[:2], tmp_path, apart)
    with torch.inference_mode():
        ours = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        switch = CacheSwitch(model)
        for entry in plan.units:
            if entry.unit.is_cache:
                switch.choose(entry.unit, entry.choice)
        measured = model(input_ids=tokens).logits
        switch.clear()
        dense = model(input_ids=tokens).logits
    assert torch.equal(ours, measured)
    assert not torch.equal(ours, dense)


def test_refuses_a_model_with_fewer_layers(tmp_path):
    path = tmp_path / "transformers_cache.json"
    exported(tiny_llama(layers=3), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="has 2 layers, none of index 2"):
        load_cache(Path(path), tiny_llama(layers=2).config)

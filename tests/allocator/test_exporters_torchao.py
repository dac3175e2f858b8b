"""The torchao exporter against torchao itself: what its quantized model really stores."""

import json

import pytest
import torch
from plan_factory import MIXED, in_turn, make_plan, tiny_gpt2, tiny_llama

from allocator.apply import apply_plan
from allocator.exporters import EXPORTERS, Mismatch
from allocator.exporters.torchao import verify_model
from search_spaces.operators import Keep, RoundToNearest, Statistics


@pytest.fixture(params=["none", "vllm"])
def plan(request):
    return make_plan(tiny_llama(), in_turn(*MIXED), ties=request.param)


@pytest.fixture(scope="session")
def torchao():
    """The toolkit's own functions; skips where it is not installed."""
    pytest.importorskip("torchao")
    from torchao.core import config
    from torchao.quantization import quantize_

    return config.config_to_dict, config.config_from_dict, quantize_


def torchao_config(plan, folder):
    return json.loads(EXPORTERS["torchao"]().write(plan, folder).files[0].read_text())


@pytest.mark.parametrize("ties", ["none", "vllm"])
def test_torchao_stores_every_module_as_planned(torchao, tmp_path, ties):
    _, config_from_dict, quantize_ = torchao
    model = tiny_llama(layers=3, tied=False)
    plan = make_plan(model, in_turn(*MIXED), ties=ties, open_units=["embeddings", "head"])
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize_(model, config_from_dict(torchao_config(plan, tmp_path)), filter_fn=None)
    assert verify_model(plan, model) == []
    num_quantized = 0
    for entry in plan.units:
        operator = entry.choice
        for member in entry.unit.members:
            weight = model.get_submodule(member.module).weight
            if isinstance(operator, Keep):
                assert torch.equal(weight, dense[member.name])
                continue
            num_quantized += 1
            assert weight.target_dtype == getattr(torch, f"int{operator.bits}")
            assert weight.block_size == (1, operator.group_size or member.matrix_shape[1])
            assert weight.qdata.unique().numel() <= 2**operator.bits
            # The same numbers as the plan's operator, up to ties broken the other way by
            # multiplying with the reciprocal of a scale.
            ours = operator.apply(dense[member.name], Statistics())
            step = (weight.scale.float().max() * 1.01).item()
            difference = (weight.dequantize() - ours).abs()
            assert difference.max().item() <= step
            assert (difference > 0).float().mean().item() < 0.05
    assert num_quantized >= 15


def test_torchao_serializes_the_same_configuration(torchao, plan, tmp_path):
    config_to_dict, config_from_dict, _ = torchao
    written = torchao_config(plan, tmp_path)
    assert config_to_dict(config_from_dict(written)) == written


def test_torchao_ignores_unknown_names_silently_and_the_model_shows_it(torchao, tmp_path):
    _, config_from_dict, quantize_ = torchao
    model = tiny_llama()
    plan = make_plan(model, in_turn(RoundToNearest(4, 32)))
    exporter = EXPORTERS["torchao"]()
    (path,) = exporter.write(plan, tmp_path).files
    path.write_text(path.read_text().replace("layers.0.self_attn.q_proj", "layers.0.attn.q_proj"))
    quantize_(model, config_from_dict(json.loads(path.read_text())), filter_fn=None)
    expected = [Mismatch("model.layers.0.self_attn.q_proj", "int4-g32", "keep")]
    assert verify_model(plan, model) == expected
    assert exporter.verify(plan, path) == expected


@pytest.mark.parametrize(
    ("operators", "share"),
    [
        ((RoundToNearest(3, 32, symmetric=False), RoundToNearest(4, 16, symmetric=False)), 0.1),
        # A symmetric grid puts the largest weight of a group on a tie, broken either way.
        ((RoundToNearest(3, 32), RoundToNearest(4, 16)), 0.5),
    ],
    ids=["asymmetric", "symmetric"],
)
def test_torchao_model_computes_what_the_plan_does(torchao, tmp_path, operators, share):
    _, config_from_dict, quantize_ = torchao
    dense, applied, quantized = tiny_llama(), tiny_llama(), tiny_llama()
    plan = make_plan(dense, in_turn(*operators), dense_dtype="F32")
    apply_plan(applied, plan)
    quantize_(quantized, config_from_dict(torchao_config(plan, tmp_path)), filter_fn=None)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [model(tokens).logits for model in (dense, applied, quantized)]
    moved = (logits[0] - logits[1]).norm().item()
    assert (logits[2] - logits[1]).norm().item() < share * moved


@pytest.mark.parametrize("edit", [("int4", "int5"), ('"group_size": 32', '"group_size": 16')])
def test_torchao_verify_reads_bits_and_groups(tmp_path, edit):
    exporter = EXPORTERS["torchao"]()
    plan = make_plan(tiny_llama(), in_turn(RoundToNearest(4, 32)))
    (path,) = exporter.write(plan, tmp_path).files
    data = json.loads(path.read_text())
    configs = data["_data"]["fqn_to_config"]
    name = next(iter(configs))
    configs[name] = json.loads(json.dumps(configs[name]).replace(*edit))
    data["_data"]["module_fqn_to_config"] = configs
    path.write_text(json.dumps(data))
    assert [mismatch.unit for mismatch in exporter.verify(plan, path)] == [name]


def test_torchao_refuses(tmp_path):
    exporter = EXPORTERS["torchao"]()
    for operator, model, says in (
        (RoundToNearest(4, 48), tiny_llama(), r"'model\.layers\.0\.self_attn\.q_proj' has 64"),
        (RoundToNearest(4, 32), tiny_gpt2(), "stored transposed"),
    ):
        with pytest.raises(ValueError, match=says):
            exporter.write(make_plan(model, in_turn(operator)), tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"_type": "FqnToConfig", "_data": {}}', '{"_type": "X", "_data": 1}']
)
def test_torchao_refuses_to_verify_nonsense(plan, tmp_path, text):
    (tmp_path / "torchao_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"JSON|FqnToConfig"):
        EXPORTERS["torchao"]().verify(plan, tmp_path)

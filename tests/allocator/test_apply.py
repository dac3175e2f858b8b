"""Applying a plan: in place, as a checkpoint that transformers loads, as one packed file."""

import os
import stat
from pathlib import Path

import plan_factory
import pytest
import torch
from plan_factory import IDENTITY, MIXED, in_turn, make_plan, tiny_gpt2, tiny_llama
from torch import nn

from allocator.apply import apply_plan, check_model, read_packed, write_checkpoint, write_packed
from allocator.plan import load_plan
from objectives.loading import load_model
from search_spaces.operators import Keep, RoundToNearest, Statistics

ASSET = Path(__file__).parents[1] / "assets" / "tiny_llama"


def tiny_mixtral(*, seed=0):
    torch.manual_seed(seed)
    return plan_factory.tiny_mixtral(intermediate_size=48).eval()


MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# In place


@MODELS
def test_apply_compresses_every_matrix_and_rounds_the_rest(make):
    model, dense = make(), state(make())
    plan = make_plan(model, in_turn(*MIXED), ties="vllm")
    apply_plan(model, plan)
    after = state(model)
    for entry in plan.units:
        for member in entry.unit.members:
            before, now = dense[member.name], after[member.name]
            if member.transposed:
                before, now = before.transpose(-1, -2), now.transpose(-1, -2)
            pairs = zip(
                before.reshape(-1, *member.matrix_shape),
                now.reshape(-1, *member.matrix_shape),
                strict=True,
            )
            for matrix, compressed in pairs:
                assert torch.equal(compressed, entry.choice.apply(matrix, Statistics()))
                assert not torch.equal(compressed, matrix)
    for tensor in plan.fixed:
        stored = {"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
        assert torch.equal(after[tensor.name], dense[tensor.name].to(stored).float())


def test_apply_keeps_ties_and_dtype():
    model = tiny_llama().to(torch.bfloat16)
    plan = make_plan(model, in_turn(RoundToNearest(2, 32)), open_units=["embeddings"])
    before = model.lm_head.weight.clone()
    apply_plan(model, plan)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not torch.equal(model.lm_head.weight, before)


def test_applying_keep_twice_is_applying_it_once():
    model = tiny_llama()
    plan = make_plan(model, lambda unit: Keep())
    apply_plan(model, plan)
    once = state(model)
    apply_plan(model, plan)
    assert_equal_states(state(model), once)


def test_check_refuses_other_models():
    plan = make_plan(tiny_llama(), in_turn(*MIXED))
    check_model(plan, tiny_llama(seed=1))
    cases = [
        (tiny_llama(layers=1), "has no parameter 'model.layers.1"),
        (tiny_llama(layers=3), "says nothing about this model's parameter 'model.layers.2"),
        (tiny_llama(tied=False), "says nothing about this model's parameter 'lm_head.weight'"),
        (tiny_gpt2(), "has no parameter 'model.layers.0"),
        (nn.Linear(2, 2), "has no parameter"),
    ]
    wide = tiny_llama()
    wide.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 96))
    cases.append((wide, "expected 'model.layers.0.mlp.up_proj.weight' of shape [96, 64]"))
    for model, says in cases:
        before = state(model)
        with pytest.raises(ValueError) as error:
            apply_plan(model, plan)
        assert says in str(error.value)
        assert "the plan is for 'tiny'" in str(error.value)
        assert_equal_states(state(model), before)


def test_check_compares_hashes():
    model = tiny_llama()
    plan = make_plan(model, in_turn(*MIXED))
    hashes = {"config_sha256": "c" * 64, "weights_sha256": "w" * 64}
    check_model(plan, model, **hashes)
    for kind, says in (("config_sha256", "configuration"), ("weights_sha256", "weights")):
        with pytest.raises(ValueError, match=f"other {says}"):
            check_model(plan, model, **{**hashes, kind: "0" * 64})


def test_operators_that_need_statistics_are_refused(monkeypatch):
    model = tiny_llama()
    plan = make_plan(model, in_turn(RoundToNearest(4, 32)))
    monkeypatch.setattr(RoundToNearest, "needs", frozenset({"hessian"}))
    with pytest.raises(ValueError, match=r"needs statistics of the calibration text \(hessian\)"):
        apply_plan(model, plan)


# Packed


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_file_has_the_planned_size_and_gives_the_applied_model(make, dtype, tmp_path):
    dense, applied, loaded = make().to(dtype), make().to(dtype), make(seed=1).to(dtype)
    plan = make_plan(dense, in_turn(*MIXED), ties="vllm")
    path = tmp_path / "model.safetensors"
    before = state(dense)
    write_packed(dense, plan, path)
    assert path.stat().st_size == plan.achieved_bytes
    assert list(tmp_path.iterdir()) == [path]
    assert_equal_states(state(dense), before)
    apply_plan(applied, plan)
    read_packed(path, plan, loaded)
    assert_equal_states(state(loaded), state(applied))


def test_packed_file_of_another_plan_is_refused(tmp_path):
    model = tiny_llama()
    path = tmp_path / "model.safetensors"
    write_packed(model, make_plan(model, in_turn(RoundToNearest(4, 32))), path)
    before = state(model)
    for other, says in (
        (RoundToNearest(3, 32), "expected '.*codes' as U8"),
        (Keep(), "tensor '.*' is"),
        (RoundToNearest(4, 32, symmetric=False), "zeros' is missing"),
    ):
        with pytest.raises(ValueError, match=says):
            read_packed(path, make_plan(model, in_turn(other)), model)
    assert_equal_states(state(model), before)


def test_packed_file_that_cannot_be_read_or_written(tmp_path):
    model = tiny_llama()
    plan = make_plan(model, in_turn(RoundToNearest(4, 32)))
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="cannot read the packed model"):
        read_packed(path, plan, model)
    with pytest.raises(ValueError, match="cannot write"):
        write_packed(model, plan, tmp_path / "none" / "model.safetensors")
    write_packed(model, plan, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot read the packed model"):
        read_packed(path, plan, model)


# Checkpoints


@pytest.fixture
def loaded():
    return load_model(str(ASSET), dtype="float32", device="cpu")


def asset_plan(loaded, *operators):
    identity = IDENTITY.model_copy(
        update={
            "name": loaded.name,
            "architecture": loaded.architecture,
            "config_sha256": loaded.config_sha256,
            "weights_sha256": loaded.weights_sha256,
        }
    )
    return make_plan(loaded.model, in_turn(*operators), identity=identity)


def cross_entropy(model):
    tokens = torch.arange(64).reshape(2, 32) * 7 % 1024
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


def test_checkpoint_is_what_transformers_loads(loaded, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense_loss = cross_entropy(loaded.model)
    applied = load_model(str(ASSET), dtype="float32", device="cpu").model
    plan = asset_plan(loaded, RoundToNearest(3, 32), RoundToNearest(4, 64))
    output = tmp_path / "new" / "checkpoint"
    write_checkpoint(loaded, plan, output)
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint"]
    apply_plan(applied, plan)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    assert model.dtype == torch.float32
    assert_equal_states(state(model), state(applied))
    assert cross_entropy(model) == cross_entropy(applied)
    assert abs(cross_entropy(model) - dense_loss) > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "She was persuaded to be prudent."
    assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert load_plan(output / "plan.json") == plan
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checkpoint_loads_with_our_own_loader_and_is_another_model(loaded, tmp_path):
    plan = asset_plan(loaded, RoundToNearest(4, 32))
    write_checkpoint(loaded, plan, tmp_path / "out")
    again = load_model(str(tmp_path / "out"), dtype="float32", device="cpu")
    assert again.config_sha256 == loaded.config_sha256
    with pytest.raises(ValueError, match="other weights"):
        write_checkpoint(again, plan, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_dtype(dtype, tmp_path):
    """From a bfloat16 model a float32 checkpoint still holds the operators' exact results."""
    from transformers import AutoModelForCausalLM

    loaded = load_model(str(ASSET), dtype="bfloat16", device="cpu")
    exact = load_model(str(ASSET), dtype="bfloat16", device="cpu").model.float()
    plan = asset_plan(loaded, RoundToNearest(3, 32))
    write_checkpoint(loaded, plan, tmp_path / "out", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    apply_plan(exact, plan)
    name = "model.layers.0.self_attn.q_proj.weight"
    difference = (state(model)[name].float() - state(exact)[name]).abs().max().item()
    if dtype == "float32":
        assert difference == 0
    else:
        assert 0 < difference < 0.01 * state(exact)[name].abs().max().item()


def test_checkpoint_refuses_an_output_in_use(loaded, tmp_path):
    plan = asset_plan(loaded, RoundToNearest(4, 32))
    before = state(loaded.model)
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file.write_text("mine")
    for output in (folder, file):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            write_checkpoint(loaded, plan, output)
    with pytest.raises(ValueError, match="cannot write to"):
        write_checkpoint(loaded, plan, file / "below")
    assert_equal_states(state(loaded.model), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    empty = tmp_path / "empty"
    empty.mkdir()
    write_checkpoint(loaded, plan, empty)
    assert (empty / "config.json").is_file()


def test_checkpoint_that_fails_leaves_nothing(loaded, tmp_path, monkeypatch):
    plan = asset_plan(loaded, RoundToNearest(4, 32))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.model, "save_pretrained", full)
    with pytest.raises(ValueError, match="No space left"):
        write_checkpoint(loaded, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_refuses_another_model(loaded, tmp_path):
    plan = make_plan(loaded.model, in_turn(RoundToNearest(4, 32)))  # of another identity
    with pytest.raises(ValueError, match="the plan is for 'tiny': this model has other config"):
        write_checkpoint(loaded, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""Exporters of ranks: factorised checkpoints that transformers loads, and PEFT's configuration."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plan_factory import (
    as_loaded,
    in_turn,
    make_plan,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from allocator.apply import apply_plan
from allocator.exporters import EXPORTERS, Exporter, Mismatch
from allocator.exporters.base import ModelExporter
from allocator.plan import load_plan
from search_spaces.operators import Keep, LowRank, RoundToNearest, Statistics

NAMES = ("factorised", "peft")
RANKS = (LowRank(0.5), LowRank(0.25), Keep(), LowRank(0.8, multiple=4))
MODELS = {"llama": tiny_llama, "untied": lambda: tiny_llama(tied=False), "gpt2": tiny_gpt2}


class NoTokenizer:
    """Saves nothing: these models are random and speak no language."""

    def save_pretrained(self, folder):
        assert Path(folder).is_dir()


def loaded(model):
    return as_loaded(model, tokenizer=NoTokenizer())


def statistics_of(plan):
    """Hessians of correlated inputs, by member name."""
    found = {}
    for entry in plan.units:
        for member in entry.unit.members:
            generator = torch.Generator().manual_seed(len(found))
            inputs = torch.randn(200, member.shape[1], generator=generator).cumsum(1)
            found[member.name] = Statistics(hessian=inputs.T @ inputs / 200)
    return found


def logits(model):
    tokens = torch.arange(2 * 16).reshape(2, 16) * 7 % 80
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder for the code that transformers copies out of checkpoints."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def reload(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


# Both


@pytest.mark.parametrize("name", NAMES)
def test_reads_back_what_it_wrote(name, tmp_path):
    exporter = EXPORTERS[name]()
    assert isinstance(exporter, Exporter)
    assert exporter.name == name
    for ties in ("none", "vllm"):
        plan = make_plan(tiny_llama(layers=12), in_turn(*RANKS), ties=ties)
        receipt = exporter.write(plan, tmp_path / ties)
        (path,) = receipt.files
        before = path.read_bytes()
        assert receipt.num_units == len(plan.units)
        assert all(note.endswith(".") for note in receipt.notes)
        assert exporter.verify(plan, tmp_path / ties) == exporter.verify(plan, path) == []
        exporter.write(plan, tmp_path / ties)
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_finds_every_unit_that_differs(name, tmp_path):
    exporter, model = EXPORTERS[name](), tiny_llama(layers=12)
    plan = make_plan(model, in_turn(*RANKS))
    exporter.write(plan, tmp_path)
    for index in range(0, len(plan.units), 5):
        operators = [RANKS[i % 4] for i in range(len(plan.units))]
        operators[index] = LowRank(1.0, multiple=1)
        (mismatch,) = exporter.verify(make_plan(model, in_turn(*operators)), tmp_path)
        assert mismatch.unit == plan.units[index].name
        assert mismatch.expected != mismatch.got


@pytest.mark.parametrize("name", NAMES)
def test_finds_modules_that_should_be_dense(name, tmp_path):
    exporter, model = EXPORTERS[name](), tiny_llama()
    fixed = "model.layers.1.self_attn.q_proj"
    exporter.write(make_plan(model, lambda unit: LowRank(0.5)), tmp_path)
    plan = make_plan(model, lambda unit: LowRank(0.5), exclude=[fixed])
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert (mismatch.unit, mismatch.expected) == (fixed, "keep")
    smaller = make_plan(tiny_llama(layers=1), lambda unit: LowRank(0.5))
    strangers = exporter.verify(smaller, tmp_path)
    assert len(strangers) == 7
    assert {mismatch.expected for mismatch in strangers} == {"not in the plan"}


@pytest.mark.parametrize("name", NAMES)
def test_refuses_plans_without_ranks_and_stacks_of_experts(name, tmp_path):
    exporter = EXPORTERS[name]()
    with pytest.raises(ValueError, match="no unit of the plan is under low_rank"):
        exporter.write(make_plan(tiny_llama(), lambda unit: Keep()), tmp_path)
    plan = make_plan(tiny_mixtral(), lambda unit: LowRank(0.5))
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj"):
        exporter.write(plan, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_cannot_write_or_read(name, tmp_path):
    exporter = EXPORTERS[name]()
    plan = make_plan(tiny_llama(), in_turn(*RANKS))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        exporter.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)


# Factorised


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_loads_the_factors_and_computes_the_plan(kind, tmp_path, home):
    dense, applied = MODELS[kind](), MODELS[kind]()
    plan = make_plan(dense, in_turn(*RANKS))
    exporter = EXPORTERS["factorised"]()
    assert isinstance(exporter, ModelExporter)
    receipt = exporter.write_model(plan, loaded(dense), tmp_path / "out", {})
    assert exporter.verify(plan, receipt.files[0]) == []
    assert load_plan(tmp_path / "out" / "plan.json") == plan
    model = reload(tmp_path / "out", dtype=torch.float32).eval()
    apply_plan(applied, plan)
    found = 0
    for entry in plan.units:
        module = model.get_submodule(entry.members[0].module)
        if isinstance(entry.choice, LowRank):
            (rows, columns), rank = (
                entry.members[0].shape,
                entry.choice.rank(entry.members[0].shape),
            )
            assert module.left.weight.shape == (rows, rank)
            assert module.right.weight.shape == (rank, columns)
            found += 1
        else:
            assert isinstance(module, type(applied.get_submodule(entry.members[0].module)))
    assert found == sum(isinstance(entry.choice, LowRank) for entry in plan.units) > 0
    torch.testing.assert_close(logits(model), logits(applied), rtol=0, atol=1e-4)
    assert (logits(model) - logits(MODELS[kind]())).abs().max() > 1e-2


def test_the_checkpoint_is_as_small_as_the_plan(tmp_path, home):
    plan = make_plan(tiny_llama(), in_turn(*RANKS))
    EXPORTERS["factorised"]().write_model(plan, loaded(tiny_llama()), tmp_path / "out", {})
    path = tmp_path / "out" / "model.safetensors"
    payload = sum(tensor.bytes for tensor in plan.stored_tensors())
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    assert {one.get_dtype() for one in shapes} == {"BF16"}
    header = path.stat().st_size - payload
    assert 0 < header < 200 * len(shapes)
    assert payload < 0.7 * plan.dense_bytes
    half = reload(tmp_path / "out", dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.q_proj.left.weight.dtype == torch.bfloat16


def test_other_operators_are_written_as_what_they_decompress_to(tmp_path, home):
    """Also factors that are themselves rounded, and weightings by calibration text."""
    operators = (
        LowRank(0.5, "whitened"),
        RoundToNearest(4, 16),
        LowRank(0.5, factors=RoundToNearest(8, 0)),
    )
    dense, applied = tiny_llama(), tiny_llama()
    plan = make_plan(dense, in_turn(*operators), ties="vllm")
    stats = statistics_of(plan)
    exporter = EXPORTERS["factorised"]()
    receipt = exporter.write_model(plan, loaded(dense), tmp_path / "out", stats)
    assert receipt.notes[1:] == (
        "Matrices under int4-g16 are written dense.",
        "Factors under rank0.5(int8-row) are written decompressed.",
    )
    assert exporter.verify(plan, tmp_path / "out") == []
    apply_plan(applied, plan, stats)
    model = reload(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(applied), rtol=0, atol=1e-4)


def test_biases_stay(tmp_path, home):
    def with_biases():
        model = tiny_gpt2()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        return model

    applied = with_biases()
    plan = make_plan(applied, in_turn(LowRank(0.5)))
    EXPORTERS["factorised"]().write_model(plan, loaded(with_biases()), tmp_path / "out", {})
    apply_plan(applied, plan)
    model = reload(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(applied), rtol=0, atol=1e-4)


def test_transformers_refuses_the_folder_without_trust(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*RANKS))
    EXPORTERS["factorised"]().write_model(plan, loaded(tiny_llama()), tmp_path / "out", {})
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_loaded_checkpoint_can_be_saved_and_loaded_again(tmp_path, home):
    plan = make_plan(tiny_llama(), in_turn(*RANKS))
    EXPORTERS["factorised"]().write_model(plan, loaded(tiny_llama()), tmp_path / "a", {})
    model = reload(tmp_path / "a", dtype=torch.float32)
    model.save_pretrained(tmp_path / "b")
    again = reload(tmp_path / "b", dtype=torch.float32)
    assert torch.equal(logits(model), logits(again))


def test_verify_looks_into_the_checkpoint(tmp_path):
    exporter = EXPORTERS["factorised"]()
    plan = make_plan(tiny_llama(), lambda unit: LowRank(0.5))
    folder = tmp_path / "out"
    exporter.write_model(plan, loaded(tiny_llama()), folder, {})
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.left.weight"] = tensors[f"{name}.left.weight"][:, :8].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert exporter.verify(plan, folder) == [Mismatch(name, "96 x 16 x 64", "keep")]
    tensors[f"{name}.right.weight"] = tensors[f"{name}.right.weight"][:8].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert exporter.verify(plan, folder) == [Mismatch(name, "96 x 16 x 64", "96 x 8 x 64")]
    config = json.loads((folder / "config.json").read_text())
    del config["factorised"][name]
    (folder / "config.json").write_text(json.dumps(config))
    assert exporter.verify(plan, folder) == [Mismatch(name, "96 x 16 x 64", "keep")]


def test_factorised_refuses_other_models_and_folders_in_use(tmp_path):
    exporter = EXPORTERS["factorised"]()
    plan = make_plan(tiny_llama(), in_turn(*RANKS))
    with pytest.raises(ValueError, match=r"layers\.2"):
        exporter.write_model(plan, loaded(tiny_llama(layers=3)), tmp_path / "out", {})
    other = loaded(tiny_llama())
    other.weights_sha256 = "0" * 64
    with pytest.raises(ValueError, match="other weights"):
        exporter.write_model(plan, other, tmp_path / "out", {})
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not an empty folder"):
        exporter.write_model(plan, loaded(tiny_llama()), tmp_path, {})
    whitened = make_plan(tiny_llama(), in_turn(LowRank(0.5, "whitened")))
    with pytest.raises(ValueError, match="hessian"):
        exporter.write_model(whitened, loaded(tiny_llama()), tmp_path / "out", {})
    stranger = type("MyForCausalLM", (type(tiny_llama()),), {})
    model = tiny_llama()
    model.__class__ = stranger
    with pytest.raises(ValueError, match="MyForCausalLM"):
        exporter.write_model(plan, loaded(model), tmp_path / "out", {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


# PEFT


def peft_config(plan, folder):
    return json.loads(EXPORTERS["peft"]().write(plan, folder).files[0].read_text())


def test_peft_names_one_module_per_pattern(tmp_path):
    model = tiny_llama(layers=12)  # layers.1 is a prefix of layers.10 and layers.11
    plan = make_plan(model, in_turn(*RANKS))
    config = peft_config(plan, tmp_path)
    modules = [name for name, _ in model.named_modules()]
    for pattern, rank in config["rank_pattern"].items():
        (hit,) = [name for name in modules if re.match(rf"(.*\.)?({pattern})$", name)]
        assert hit in config["target_modules"]
        assert type(rank) is int
    kept = {unit.name for unit in plan.units if unit.operator["name"] == "keep"}
    assert kept
    assert not kept & set(config["target_modules"])
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"^model\.layers\.0\.self_attn\.q_proj"] == 16
    assert config["r"] == 8


def test_peft_patterns_are_first_come(tmp_path):
    """The traps of its rule are found: a general pattern ahead, an open one, a suffix target."""
    exporter = EXPORTERS["peft"]()
    plan = make_plan(tiny_llama(layers=12), in_turn(*RANKS[:2]))
    (path,) = exporter.write(plan, tmp_path).files
    config = json.loads(path.read_text())

    def hit(**changes):
        path.write_text(json.dumps({**config, **changes}))
        return {m.unit.split(".", 2)[-1] for m in exporter.verify(plan, tmp_path)}

    ranks = config["rank_pattern"]
    assert hit(rank_pattern={r"layers.1.*down_proj": 5, **ranks}) == {
        f"{layer}.mlp.down_proj" for layer in (1, 10, 11)
    }
    assert hit(rank_pattern={"up_proj": 5, **ranks}) == {f"{i}.mlp.up_proj" for i in range(12)}
    others = [rank for rank in ranks.values() if rank != config["r"]]
    assert len(hit(rank_pattern={})) == len(others) > 0
    targets = [target for target in config["target_modules"] if "layers.3.mlp.up" not in target]
    assert hit(target_modules=targets) == {"3.mlp.up_proj"}
    assert hit(target_modules=[*config["target_modules"], "nowhere"]) == {"nowhere"}
    assert len(hit(target_modules=r".*\.up_proj")) == 12 * 6
    with pytest.raises(ValueError, match="no expression"):
        hit(rank_pattern={"x[": 3})
    with pytest.raises(ValueError, match="target_modules"):
        hit(target_modules=None)
    with pytest.raises(ValueError, match="alpha_pattern must be a mapping"):
        hit(alpha_pattern=[])


def test_peft_refuses_other_operators(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(LowRank(0.5), RoundToNearest(4, 32)))
    with pytest.raises(ValueError, match="peft cannot say 'int4-g32'"):
        EXPORTERS["peft"]().write(plan, tmp_path)


@pytest.mark.filterwarnings("default")  # those of an optional package are its own affair
@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=12), tiny_gpt2])
def test_peft_itself_gives_these_ranks(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    plan = make_plan(model, in_turn(*RANKS))
    EXPORTERS["peft"]().write(plan, tmp_path)
    adapted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(tmp_path))
    layers = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert layers == {
        entry.name: (entry.choice.rank(entry.members[0].shape), 1.0)
        for entry in plan.units
        if isinstance(entry.choice, LowRank)
    }


def test_exporters_of_ranks_import_no_toolkit():
    code = (
        "import sys; from allocator.exporters import EXPORTERS; list(EXPORTERS.values())\n"
        "heavy = {'torch', 'peft', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Every exporter against the plan: what it writes, what its toolkit makes of it, what it refuses.

The conformance tests run on every entry of the table.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plan_factory import MIXED, as_loaded, in_turn, make_plan, tiny_gpt2, tiny_llama, tiny_mixtral

from allocator.apply import apply_plan
from allocator.exporters import EXPORTERS, Exporter, Mismatch
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.operators.prune import Prune

# One setting per bit width, so that every format can say it; groups that all toolkits have.
PLAIN = (RoundToNearest(4, 32), RoundToNearest(2, 16), Keep(), RoundToNearest(8, 0))


@pytest.fixture
def llama():
    return tiny_llama(layers=12)  # layers.1 is a prefix of layers.10 and layers.11


@pytest.fixture(params=["none", "vllm"])
def plan(llama, request):
    return make_plan(llama, in_turn(*PLAIN), ties=request.param)


# The suite below runs on exporters of rounded matrices; others have suites of their own.
ROUNDING = ("evopress", "gptqmodel", "torchao")
OWN_SUITES = {
    "bitstack": "test_exporters_bitstack.py",
    "factorised": "test_exporters_rank.py",
    "llama-cpp": "test_exporters_llama_cpp.py",
    "llm-compressor": "test_exporters_sparsity.py",
    "peft": "test_exporters_rank.py",
    "torch-prune": "test_exporters_sparsity.py",
    "transformers-cache": "test_exporters_transformers_cache.py",
}


@pytest.fixture(params=ROUNDING)
def exporter(request):
    return EXPORTERS[request.param]()


def test_every_exporter_has_a_suite():
    assert set(EXPORTERS) <= {*ROUNDING, *OWN_SUITES}
    for name in set(EXPORTERS) & set(OWN_SUITES):
        assert name in (Path(__file__).parent / OWN_SUITES[name]).read_text(), name


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# Conformance


def test_is_an_exporter(exporter):
    assert isinstance(exporter, Exporter)
    assert EXPORTERS[exporter.name] is type(exporter)


def test_reads_back_what_it_wrote(exporter, plan, tmp_path):
    receipt = exporter.write(plan, tmp_path / "new" / "folder")
    assert receipt.num_units == len(plan.units)
    assert all(path.is_file() for path in receipt.files)
    assert all(note.endswith(".") for note in receipt.notes)
    assert exporter.verify(plan, tmp_path / "new" / "folder") == []
    assert exporter.verify(plan, receipt.files[0]) == []
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        receipt.files[0].name
    ]


def test_writes_the_same_file_again(exporter, plan, tmp_path):
    (path, *_) = exporter.write(plan, tmp_path).files
    first = path.read_bytes()
    exporter.write(plan, tmp_path)
    assert path.read_bytes() == first


def test_finds_every_unit_that_differs(exporter, llama, tmp_path):
    """Verifying against a plan that differs in one unit reports this unit and no other."""
    plan = make_plan(llama, in_turn(*PLAIN))
    exporter.write(plan, tmp_path)
    for index in range(0, len(plan.units), 5):
        other = iter(range(len(plan.units)))
        operators = [PLAIN[i % 4] if i != index else RoundToNearest(3, 32) for i in other]
        changed = make_plan(llama, in_turn(*operators))
        (mismatch,) = exporter.verify(changed, tmp_path)
        assert mismatch.unit == plan.units[index].name
        assert mismatch.expected != mismatch.got


def test_finds_a_compressed_matrix_that_should_be_fixed(exporter, llama, tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    exporter.write(make_plan(llama, lambda unit: RoundToNearest(4, 32)), tmp_path)
    plan = make_plan(llama, lambda unit: RoundToNearest(4, 32), exclude=[name])
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert (mismatch.unit, mismatch.expected) == (name, "keep")
    exporter.write(plan, tmp_path)
    assert exporter.verify(plan, tmp_path) == []


@pytest.mark.parametrize("name", sorted(set(ROUNDING) - {"evopress"}))
def test_refuses_operators_it_cannot_say(name, llama, tmp_path):
    plan = make_plan(llama, in_turn(PLAIN[0], Prune(0.5)))
    with pytest.raises(ValueError, match=re.escape(Prune(0.5).label)):
        EXPORTERS[name]().write(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_compressed_stacks_of_experts(exporter, tmp_path):
    model = tiny_mixtral()
    plan = make_plan(model, lambda unit: RoundToNearest(4, 32))
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj"):
        exporter.write(plan, tmp_path)
    dense_experts = make_plan(
        model, lambda unit: Keep() if "experts" in unit.name else RoundToNearest(4, 32)
    )
    if exporter.name == "gptqmodel":  # splits the stack into Linears, which it would quantize
        with pytest.raises(ValueError, match="splits fused experts"):
            exporter.write(dense_experts, tmp_path)
    else:
        exporter.write(dense_experts, tmp_path)
        assert exporter.verify(dense_experts, tmp_path) == []


def test_says_what_it_cannot_write_or_read(exporter, plan, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        exporter.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path / "none")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        exporter.verify(plan, tmp_path / "binary")


def test_imports_no_toolkit():
    code = (
        "import sys; from allocator.exporters import EXPORTERS; list(EXPORTERS.values())\n"
        "heavy = {'torch', 'torchao', 'gptqmodel', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_exporter_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'gptqmodel'"):
        EXPORTERS["gptq-model"]


# gptqmodel


@pytest.fixture
def gptqmodel():
    return EXPORTERS["gptqmodel"]()


def gptqmodel_config(plan, folder):
    return json.loads(EXPORTERS["gptqmodel"]().write(plan, folder).files[0].read_text())


def test_gptqmodel_rules_name_one_module_each(llama, tmp_path):
    plan = make_plan(llama, in_turn(*PLAIN))
    dynamic = gptqmodel_config(plan, tmp_path)["dynamic"]
    assert dynamic[r"+:^model\.layers\.1\.self_attn\.q_proj$"].keys() == {
        "bits",
        "group_size",
        "sym",
    }
    modules = [name for name, _ in llama.named_modules()]
    for rule in dynamic:
        assert len([name for name in modules if re.match(rule[2:], name)]) == 1, rule
    quantized = {rule for rule in dynamic if rule.startswith("+:")}
    assert len(quantized) == sum(unit.operator["name"] != "keep" for unit in plan.units)
    # What is not searched is taken out: a Linear without a rule would get the base settings.
    assert r"-:^model\.embed_tokens$" in dynamic
    signs = [rule[0] for rule in dynamic]
    assert signs == sorted(signs, reverse=True)  # "-" after "+" in ASCII: those out come first


def test_gptqmodel_names_fused_layers_for_vllm(llama, tmp_path):
    plan = make_plan(llama, in_turn(RoundToNearest(4, 32), RoundToNearest(8, 32)), ties="vllm")
    dynamic = gptqmodel_config(plan, tmp_path)["dynamic"]
    rule = r"+:^model\.layers\.3\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$"
    assert dynamic[rule]["bits"] in (4, 8)
    assert r"+:^model\.layers\.3\.mlp\.(gate_proj|up_proj|gate_up_proj)$" in dynamic
    assert not any(
        "qkv_proj" in rule
        for rule in gptqmodel_config(make_plan(llama, in_turn(*PLAIN)), tmp_path)["dynamic"]
    )


def test_gptqmodel_checks_the_fused_names(gptqmodel, llama, tmp_path):
    plan = make_plan(llama, in_turn(RoundToNearest(4, 32), RoundToNearest(8, 32)), ties="vllm")
    (path,) = gptqmodel.write(plan, tmp_path).files
    replace_in(
        path,
        "11\\\\.self_attn\\\\.(q_proj|k_proj|v_proj|qkv_proj)",
        "11\\\\.self_attn\\\\.(q_proj|k_proj|v_proj)",
    )
    changed = gptqmodel.verify(plan, path)
    expected = [m for m in changed if "layers.11" in m.unit]
    assert changed == expected
    assert all("qkv_proj" in m.unit for m in changed)


def test_gptqmodel_first_rule_wins_and_is_open_at_its_end(gptqmodel, llama, tmp_path):
    """The traps of its matching rule are found: a prefix of one layer also hits eleven and ten."""
    plan = make_plan(llama, in_turn(*PLAIN))
    (path,) = gptqmodel.write(plan, tmp_path).files
    config = json.loads(path.read_text())
    loose = {r"+:model\.layers\.1": {"bits": 3, "group_size": 32, "sym": True}}
    path.write_text(json.dumps({**config, "dynamic": {**loose, **config["dynamic"]}}))
    hit = {mismatch.unit.split(".")[2] for mismatch in gptqmodel.verify(plan, path)}
    assert hit == {"1", "10", "11"}


def test_gptqmodel_base_is_the_most_common_choice(tmp_path):
    model = tiny_llama()
    often, once = RoundToNearest(3, 16, symmetric=False), RoundToNearest(8, 0)
    plan = make_plan(model, lambda unit: once if unit.kind == "down_proj" else often)
    config = gptqmodel_config(plan, tmp_path)
    assert (config["bits"], config["group_size"], config["sym"]) == (3, 16, False)
    rule = config["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"]
    assert rule == {"bits": 8, "group_size": -1, "sym": True}
    assert config["desc_act"] is False
    assert config["lm_head"] is False


def test_gptqmodel_opens_the_head_by_its_flag(gptqmodel, tmp_path):
    model = tiny_llama(tied=False)
    plan = make_plan(model, in_turn(RoundToNearest(4, 32)), open_units=["head"])
    config = gptqmodel_config(plan, tmp_path)
    assert config["lm_head"] is True
    assert r"+:^lm_head$" in config["dynamic"]
    tied = make_plan(tiny_llama(), in_turn(RoundToNearest(4, 32)), open_units=["head"])
    with pytest.raises(ValueError, match=r"'model\.embed_tokens'"):
        gptqmodel.write(tied, tmp_path)


def test_gptqmodel_takes_transposed_matrices(gptqmodel, tmp_path):
    plan = make_plan(tiny_gpt2(), in_turn(*PLAIN))
    gptqmodel.write(plan, tmp_path)
    assert gptqmodel.verify(plan, tmp_path) == []


def test_gptqmodel_notes_bits_that_vllm_lacks(gptqmodel, tmp_path):
    five = gptqmodel.write(make_plan(tiny_llama(), in_turn(RoundToNearest(5, 32))), tmp_path)
    four = gptqmodel.write(make_plan(tiny_llama(), in_turn(RoundToNearest(4, 32))), tmp_path)
    assert any(note.startswith("5 bits") for note in five.notes)
    assert not any("planar" in note for note in four.notes)


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (RoundToNearest(4, 48), "groups of 48"),
        (RoundToNearest(4, 128), "64 columns"),
        (RoundToNearest(4, 8), "kernels for groups"),
        (RoundToNearest(1, 32, symmetric=False), "2 to 8 bits"),
        (Keep(), "nothing to do"),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_gptqmodel_refuses(gptqmodel, tmp_path, operator, says):
    with pytest.raises(ValueError, match=says):
        gptqmodel.write(make_plan(tiny_llama(), in_turn(operator)), tmp_path)


@pytest.mark.parametrize("dynamic", [{"+:x[": {}}, ["x"], {"+:x": None}])
def test_gptqmodel_refuses_to_verify_nonsense(gptqmodel, plan, tmp_path, dynamic):
    path = tmp_path / "quantize_config.json"
    path.write_text(json.dumps({"bits": 4, "dynamic": dynamic}))
    with pytest.raises(ValueError, match="rule"):
        gptqmodel.verify(plan, tmp_path)


# EvoPress


def evopress_load(model, database):
    """What EvoPress does with a plan: swap in the named file of every line."""
    for line in (database / "plan.txt").read_text().splitlines():
        name, level = line.split(":")
        layer = model.get_submodule(name.strip(" "))
        weight = torch.load(database / name / f"{int(level)}.pth", weights_only=True)
        layer.weight.data = weight.to(layer.weight.dtype)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_evopress_loads_the_database(make, tmp_path):
    dense = make()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    plan = make_plan(dense, in_turn(*MIXED), dense_dtype="F32")
    receipt = EXPORTERS["evopress"]().write_model(plan, as_loaded(dense), tmp_path, {})
    assert len(receipt.files) == 1 + sum(len(unit.members) for unit in plan.units)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    loaded, applied = make(), make()
    evopress_load(loaded, tmp_path)
    apply_plan(applied, plan)
    for name, tensor in applied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    exporter = EXPORTERS["evopress"]()
    assert exporter.verify(plan, tmp_path) == []
    receipt.files[1].unlink()
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert mismatch.got == "no such file"


def test_evopress_levels_are_bits(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*PLAIN))
    (path,) = EXPORTERS["evopress"]().write(plan, tmp_path).files
    lines = path.read_text().splitlines()
    assert lines[:4] == [
        "model.layers.0.self_attn.q_proj: 4",
        "model.layers.0.self_attn.k_proj: 2",
        "model.layers.0.self_attn.v_proj: 16",
        "model.layers.0.self_attn.o_proj: 8",
    ]
    assert len(lines) == sum(len(unit.members) for unit in plan.units)


def test_evopress_numbers_levels_that_bits_do_not_name(tmp_path):
    exporter = EXPORTERS["evopress"]()
    dense = tiny_llama()
    plan = make_plan(
        dense, in_turn(RoundToNearest(4, 32), Keep(), RoundToNearest(4, 16)), dense_dtype="F32"
    )
    receipt = exporter.write_model(plan, as_loaded(dense), tmp_path, {})
    levels = {line.split(": ")[1] for line in receipt.files[0].read_text().splitlines()}
    assert levels == {"100", "101", "16"}
    assert exporter.verify(plan, tmp_path) == []
    loaded, applied = tiny_llama(), tiny_llama()
    evopress_load(loaded, tmp_path)
    apply_plan(applied, plan)
    for name, tensor in applied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    named = tmp_path / "levels.json"
    replace_in(named, '"group_size": 16', '"group_size": 8')
    assert [m.expected for m in exporter.verify(plan, tmp_path)] == ["int4-g16"]


@pytest.mark.parametrize("line", ["", "model.layers.0.self_attn.q_proj", "x: 2.5", "x: y: 3"])
def test_evopress_refuses_lines_that_its_loader_refuses(tmp_path, line):
    exporter = EXPORTERS["evopress"]()
    plan = make_plan(tiny_llama(), in_turn(*PLAIN))
    (path,) = exporter.write(plan, tmp_path).files
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match="line 15"):
        exporter.verify(plan, path)


def test_evopress_finds_missing_and_unknown_modules(tmp_path):
    exporter = EXPORTERS["evopress"]()
    plan = make_plan(tiny_llama(), in_turn(RoundToNearest(4, 32)))
    (path,) = exporter.write(plan, tmp_path).files
    replace_in(path, "layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj")
    assert exporter.verify(plan, path) == [
        Mismatch("model.layers.0.self_attn.q_proj", "4", "keep"),
        Mismatch("model.layers.7.self_attn.q_proj", "not in the plan", "4"),
    ]


def test_database_refuses_another_model(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*PLAIN))
    with pytest.raises(ValueError, match=r"layers\.2"):
        EXPORTERS["evopress"]().write_model(plan, as_loaded(tiny_llama(layers=3)), tmp_path, {})
    assert not list(tmp_path.iterdir())

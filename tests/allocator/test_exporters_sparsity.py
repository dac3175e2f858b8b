"""Sparse plans as torch-prune, llm-compressor and the packed file write them, and what they refuse.

The run of llm-compressor itself needs that package, whose pins exclude ours; it is skipped without.
"""

from pathlib import Path

import pytest
import torch
import yaml
from plan_factory import as_loaded, in_turn, make_plan, tiny_gpt2, tiny_llama, tiny_mixtral
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from allocator.apply import apply_plan, read_packed, write_packed
from allocator.exporters import EXPORTERS, Exporter, Mismatch
from allocator.exporters.base import ModelExporter
from search_spaces.operators import Keep, Prune, PruneNM, RoundToNearest, SparseGPT, Statistics

SPARSE = (Prune(0.5, "wanda"), PruneNM(1, 4, "wanda"), Keep(), SparseGPT(0.3))
NAMES = ("llm-compressor", "torch-prune")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=NAMES)
def exporter(request):
    return EXPORTERS[request.param]()


@pytest.fixture
def llama():
    return tiny_llama(layers=12)  # layers.1 is a prefix of layers.10 and layers.11


def by_layer(operators, dense=()):
    """One operator for each layer, from the first again; whole layers kept in between."""
    return lambda u: Keep() if u.depth in dense else operators[u.depth % len(operators)]


def statistics(model, plan):
    """What random inputs tell, by member name."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for member in (member for entry in plan.units for member in entry.unit.members):
        rows, columns = member.matrix_shape
        inputs = torch.randn(300, columns, generator=generator) @ torch.randn(
            columns, columns, generator=generator
        )
        found[member.name] = Statistics(
            second_moment=inputs.square().mean(0),
            hessian=inputs.T @ inputs / 300,
            fisher=torch.rand(rows, columns, generator=generator),
        )
    return found


# Both


def test_is_an_exporter(exporter):
    assert isinstance(exporter, Exporter)
    assert EXPORTERS[exporter.name] is type(exporter)


@pytest.mark.parametrize("ties", ["none", "vllm"])
def test_reads_back_what_it_wrote(exporter, llama, ties, tmp_path):
    plan = make_plan(llama, in_turn(*SPARSE), ties=ties)
    receipt = exporter.write(plan, tmp_path / "new" / "folder")
    assert receipt.num_units == len(plan.units)
    assert all(note.endswith(".") for note in receipt.notes)
    assert exporter.verify(plan, tmp_path / "new" / "folder") == []
    (path,) = receipt.files
    assert exporter.verify(plan, path) == []
    assert list(path.parent.iterdir()) == [path]
    first = path.read_bytes()
    exporter.write(plan, path.parent)
    assert path.read_bytes() == first


def test_finds_every_unit_that_differs(exporter, llama, tmp_path):
    plan = make_plan(llama, in_turn(*SPARSE))
    exporter.write(plan, tmp_path)
    for index in range(0, len(plan.units), 5):
        operators = [SPARSE[i % 4] for i in range(len(plan.units))]
        operators[index] = Prune(0.75, "wanda")
        (mismatch,) = exporter.verify(make_plan(llama, in_turn(*operators)), tmp_path)
        assert mismatch.unit == plan.units[index].name
        assert mismatch.expected != mismatch.got


def test_finds_a_pruned_matrix_that_should_be_fixed(exporter, llama, tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    exporter.write(make_plan(llama, lambda unit: SPARSE[0]), tmp_path)
    plan = make_plan(llama, lambda unit: SPARSE[0], exclude=[name])
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert (mismatch.unit, mismatch.expected) == (name, "keep")
    exporter.write(plan, tmp_path)
    assert exporter.verify(plan, tmp_path) == []


def test_finds_names_that_are_not_in_the_plan(exporter, tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*SPARSE))
    (path,) = exporter.write(plan, tmp_path).files
    path.write_text(path.read_text().replace("layers.0.self_attn.q_", "layers.7.self_attn.q_"))
    missing, unknown = exporter.verify(plan, path)
    assert (missing.unit, missing.got) == (Q_PROJ, "keep")
    assert "layers.7" in unknown.unit
    assert unknown.expected == "not in the plan"


def test_refuses_quantization(exporter, llama, tmp_path):
    plan = make_plan(llama, in_turn(RoundToNearest(4, 32)))
    with pytest.raises(ValueError, match="cannot say 'int4-g32'"):
        exporter.write(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_says_what_it_cannot_write_or_read(exporter, llama, tmp_path):
    plan = make_plan(llama, in_turn(*SPARSE))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        exporter.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        exporter.verify(plan, tmp_path / "binary")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(ValueError, match="expected a"):
        exporter.verify(plan, tmp_path / "list")


def experts(operator):
    model = tiny_mixtral()
    return model, make_plan(model, lambda unit: operator, dense_dtype="F32")


def test_a_packed_file_holds_indices_and_reads_back(tmp_path):
    few, fewer = Prune(0.97), Prune(0.97, pattern="matrix")  # column indices and row pointers
    dense, loaded, applied = (tiny_llama(seed=seed) for seed in (0, 1, 0))
    plan = make_plan(dense, in_turn(few, fewer, PruneNM(1, 8), Prune(1.0)), dense_dtype="F32")
    assert {"U16", "U32"} <= {tensor.dtype for tensor in plan.stored_tensors()}
    path = tmp_path / "packed.safetensors"
    write_packed(dense, plan, path)
    read_packed(path, plan, loaded)
    apply_plan(applied, plan)
    for name, tensor in applied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# torch-prune

MASKED = (
    Prune(0.5),
    Prune(0.3, "wanda", "matrix"),
    Keep(),
    SparseGPT(0.6),
    PruneNM(1, 4, "fisher", RoundToNearest(4, 16)),
)


def prune_with(model, path):
    """What a user of torch.nn.utils.prune does with the file."""
    found = load_file(path)
    for key in [key for key in found if key.endswith("_mask")]:
        module, _, name = key.removesuffix("_mask").rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), name, found[key])
    loaded = model.load_state_dict(found, strict=False)
    assert not loaded.unexpected_keys
    return [key.removesuffix("_mask") for key in found if key.endswith("_mask")]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_torch_prunes_with_the_masks(make, tmp_path):
    exporter = EXPORTERS["torch-prune"]()
    assert isinstance(exporter, ModelExporter)
    # What is kept is stored in bfloat16, which is not the exporter's to hand over.
    dense, pruned, applied = (make().bfloat16().float() for _ in range(3))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    plan = make_plan(dense, in_turn(*MASKED), dense_dtype="F32")
    stats = statistics(dense, plan)
    receipt = exporter.write_model(plan, as_loaded(dense), tmp_path, stats)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert exporter.verify(plan, tmp_path) == []

    names = prune_with(pruned, receipt.files[1])
    apply_plan(applied, plan, stats)
    inputs = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(pruned(inputs).logits, applied(inputs).logits)
    counts = {}
    for entry in plan.units:
        for member in entry.unit.members:
            module = pruned.get_submodule(member.module)
            expected = getattr(applied.get_submodule(member.module), member.parameter)
            assert torch.equal(getattr(module, member.parameter), expected), member.name
            if member.name in names:
                counts[member.name] = int((module.weight_mask == 0).sum())
    kept = {m.name: o.choice for o in plan.units for m in o.unit.members if o.choice != Keep()}
    shapes = {m.name: m.matrix_shape for entry in plan.units for m in entry.unit.members}
    assert counts == {
        name: shapes[name][0] * shapes[name][1] - operator.num_kept(shapes[name])
        for name, operator in kept.items()
    }


def test_masks_alone_where_pruning_changes_no_weight(tmp_path):
    dense = tiny_llama().bfloat16()
    plan = make_plan(dense, in_turn(Prune(0.5), Keep()))
    exporter = EXPORTERS["torch-prune"]()
    _, path = exporter.write_model(plan, as_loaded(dense), tmp_path, {}).files
    assert {name.rpartition("_")[2] for name in load_file(path)} == {"mask"}


def test_verifying_counts_the_masks(tmp_path):
    dense = tiny_llama()
    plan = make_plan(dense, in_turn(Prune(0.5), Keep()))
    exporter = EXPORTERS["torch-prune"]()
    _, path = exporter.write_model(plan, as_loaded(dense), tmp_path, {}).files
    found = load_file(path)
    mask = found[f"{Q_PROJ}.weight_mask"]
    mask[0, mask[0].nonzero()[0]] = False
    save_file(found, path)
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert mismatch == Mismatch(
        Q_PROJ, "2048 of 4096 pruned by magnitude0.5", "a mask [64, 64] of 2049"
    )
    del found[f"{Q_PROJ}.weight_mask"]
    found["model.layers.0.self_attn.k_proj.weight_mask"] = torch.ones(32, 64, dtype=torch.bool)
    save_file(found, path)
    missing, surplus = exporter.verify(plan, tmp_path)
    assert (missing.unit, surplus.unit) == (Q_PROJ, "model.layers.0.self_attn.k_proj")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)


def test_torch_prunes_stacks_of_experts(tmp_path):
    model, plan = experts(Prune(0.5))
    exporter = EXPORTERS["torch-prune"]()
    _, path = exporter.write_model(plan, as_loaded(model), tmp_path, {}).files
    assert exporter.verify(plan, tmp_path) == []
    assert "model.layers.0.mlp.experts.gate_up_proj" in prune_with(model, path)
    stack = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj
    assert (stack == 0).sum() == stack.numel() // 2


def test_masks_need_the_plans_model_and_statistics(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*MASKED))
    exporter = EXPORTERS["torch-prune"]()
    with pytest.raises(ValueError, match=r"layers\.2"):
        exporter.write_model(plan, as_loaded(tiny_llama(layers=3)), tmp_path, {})
    with pytest.raises(ValueError, match="second_moment"):
        exporter.write_model(plan, as_loaded(tiny_llama()), tmp_path, {})


# llm-compressor


def recipe_of(plan, folder):
    return yaml.safe_load(EXPORTERS["llm-compressor"]().write(plan, folder).files[0].read_text())


def test_layers_of_one_sparsity_become_a_list(llama, tmp_path):
    operators = [SparseGPT(sparsity) for sparsity in (0.2, 0.5, 0.8)]
    plan = make_plan(llama, by_layer(operators, dense=(4,)))
    recipe = recipe_of(plan, tmp_path)
    ((stage, groups),) = recipe.items()
    assert stage.endswith("_stage")
    arguments = groups["sparsity_modifiers"]["SparseGPTModifier"]
    layers = [index for index in range(12) if index != 4]
    assert arguments["targets"] == [f"model.layers.{index}" for index in layers]
    assert arguments["sparsity"] == [(0.2, 0.5, 0.8)[index % 3] for index in layers]
    assert (arguments["block_size"], arguments["dampening_frac"]) == (128, 0.01)
    assert EXPORTERS["llm-compressor"]().verify(plan, tmp_path) == []


def test_a_layer_with_a_fixed_matrix_is_not_pruned_whole(llama, tmp_path):
    """A target that is a layer takes every Linear in it, searched or not."""
    name = "model.layers.3.mlp.up_proj"
    plan = make_plan(llama, by_layer([SparseGPT(0.2), SparseGPT(0.5)]), exclude=[name])
    stages = recipe_of(plan, tmp_path).values()
    targets = [
        target
        for stage in stages
        for arguments in stage["sparsity_modifiers"].values()
        for target in arguments["targets"]
    ]
    assert len(targets) == len(set(targets)) == len(plan.units)
    assert name not in targets
    assert len(stages) == 2


def test_wanda_is_told_a_number_that_it_cuts_to_the_plans(tmp_path):
    # 64 and 96 columns: 0.58 of them are 37.12 and 55.68, of which the toolkit drops 37 and 55.
    plan = make_plan(tiny_llama(), lambda unit: Prune(0.58, "wanda"))
    settings = {
        target: arguments["sparsity"]
        for stage in recipe_of(plan, tmp_path).values()
        for arguments in stage["sparsity_modifiers"].values()
        for target in arguments["targets"]
    }
    assert settings[Q_PROJ] == 0.58
    assert int(96 * settings["model.layers.0.mlp.down_proj"]) == 56


def test_mask_structure_counts_what_goes(tmp_path):
    plan = make_plan(tiny_llama(), lambda unit: PruneNM(1, 4, "wanda"))
    (stage,) = recipe_of(plan, tmp_path).values()
    assert stage["sparsity_modifiers"]["WandaPruningModifier"]["mask_structure"] == "3:4"


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (Keep(), "nothing to do"),
        (Prune(0.5), "cannot say 'magnitude0.5'"),
        (Prune(0.5, "wanda", "matrix"), "cannot say"),
        (Prune(0.5, "wanda", values=RoundToNearest(4, 32)), "cannot say"),
        (PruneNM(2, 4, "fisher"), "cannot say"),
        (SparseGPT(0.5, values=RoundToNearest(4, 32)), "cannot say"),
        (SparseGPT(1.0), "between 0 and 1"),
        (Prune(0.0, "wanda"), "between 0 and 1"),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_llm_compressor_refuses(tmp_path, operator, says):
    with pytest.raises(ValueError, match=says):
        EXPORTERS["llm-compressor"]().write(make_plan(tiny_llama(), in_turn(operator)), tmp_path)


def test_llm_compressor_refuses_what_is_no_linear(tmp_path):
    exporter = EXPORTERS["llm-compressor"]()
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn"):
        exporter.write(make_plan(tiny_gpt2(), in_turn(Prune(0.5, "wanda"))), tmp_path)
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj"):
        exporter.write(experts(Prune(0.5, "wanda"))[1], tmp_path)


def test_verifying_reads_a_recipe_as_llm_compressor_does(tmp_path):
    exporter = EXPORTERS["llm-compressor"]()
    plan = make_plan(tiny_llama(), lambda unit: SparseGPT(0.5) if unit.depth else SparseGPT(0.25))
    (path,) = exporter.write(plan, tmp_path).files
    recipe = yaml.safe_load(path.read_text())
    ((stage, groups),) = recipe.items()
    arguments = groups["sparsity_modifiers"]["SparseGPTModifier"]

    def verify(stage=stage, **changes):
        changed = {"sparsity_modifiers": {"SparseGPTModifier": arguments | changes}}
        path.write_text(yaml.safe_dump({stage: changed}))
        return exporter.verify(plan, path)

    assert verify() == []
    assert verify(targets=[r"re:model\.layers\.\d+$"]) == []
    assert verify(targets=arguments["targets"][::-1]) == []  # the model's order counts
    assert len(verify(sparsity=arguments["sparsity"][::-1])) == len(plan.units)
    assert {m.got for m in verify(stage="sparsity")} == {"keep"}  # not a stage to it
    with pytest.raises(ValueError, match="1 sparsities for 2 targets"):
        verify(sparsity=[0.5])
    with pytest.raises(ValueError, match="must be a number"):
        verify(sparsity="half")
    path.write_text("a_stage: {b_modifiers: {GPTQModifier: {}}}")
    with pytest.raises(ValueError, match="not a pruning modifier"):
        exporter.verify(plan, path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="YAML"):
        exporter.verify(plan, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choose",
    [
        in_turn(Prune(0.58, "wanda"), PruneNM(1, 4, "wanda"), Keep(), Prune(0.31, "wanda")),
        in_turn(SparseGPT(0.3), SparseGPT(0.75, n=1, m=4), Keep()),
        by_layer([Prune(sparsity, "wanda") for sparsity in (0.25, 0.5, 0.75)], dense=(4,)),
    ],
    ids=["wanda", "sparsegpt", "layers"],
)
@pytest.mark.filterwarnings("ignore")  # of the toolkit's own
def test_llm_compressor_executes_the_recipe(llama, choose, tmp_path):
    toolkit = pytest.importorskip("llmcompressor")
    from datasets import Dataset

    plan = make_plan(llama, choose)
    (path,) = EXPORTERS["llm-compressor"]().write(plan, tmp_path).files
    llama.save_pretrained(tmp_path / "model")
    model = type(llama).from_pretrained(tmp_path / "model")  # it asks where a model came from
    tokens = torch.randint(80, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": tokens, "attention_mask": [[1] * 32] * 16}
    toolkit.oneshot(
        model=model,
        processor=str(Path(__file__).parents[1] / "assets" / "tiny_llama"),  # wanted, not used
        recipe=str(path),
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=16,
        max_seq_length=32,
    )
    for entry in plan.units:
        for member in entry.unit.members:
            weight = model.get_submodule(member.module).weight
            zeros, operator = int((weight == 0).sum()), entry.choice
            if operator == Keep():
                assert zeros == 0
                continue
            exact = weight.numel() - operator.num_kept(member.matrix_shape)
            # Its SparseGPT rounds once for all rows, and drops the weight at the threshold too.
            slack = len(weight) // 2 + 1 if operator == SparseGPT(0.3) else 0
            assert exact - slack <= zeros <= exact + slack, member.name

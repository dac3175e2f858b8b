"""What a user asks for becomes a space; a wish that touches nothing is an error."""

import pytest
from tiny_models import FAMILIES, tiny

from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest
from search_spaces.presets import PRESETS
from search_spaces.space import SearchSpace


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return str(path)

    return writer


def offered(space):
    """Operators by unit name."""
    return {
        unit.name: {option.operator for option in menu}
        for unit, menu in zip(space.units, space.menus, strict=True)
    }


def total_elements(space):
    fixed = sum(tensor.bytes // 2 for tensor in space.fixed)
    return space.num_weights + fixed


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("ties", ["none", "vllm"])
def test_space_of_every_family(model_type, ties):
    model = tiny(model_type)
    space = build_space(model, SpaceRequest(ties=ties, open_units=("embeddings",)))
    assert total_elements(space) == sum(p.numel() for p in model.parameters())
    assert SearchSpace.from_json(space.to_json()) == space
    assert (space.name, space.ties) == ("bits", ties)
    assert all(operators == set(PRESETS["bits"].operators) for operators in offered(space).values())


def test_keep_can_be_barred(llama):
    space = build_space(llama, SpaceRequest(bar_keep=True))
    assert all(Keep() not in operators for operators in offered(space).values())
    assert all(len(operators) == 6 for operators in offered(space).values())


def test_pins_leave_one_option(llama):
    request = SpaceRequest(pins=(("*.layers.0.*", "int8-g64"), ("*.1.*.q_proj", "keep")))
    for name, operators in offered(build_space(llama, request)).items():
        if ".layers.0." in name:
            assert operators == {RoundToNearest(8)}
        elif name.endswith("q_proj"):
            assert operators == {Keep()}
        else:
            assert len(operators) == 7


def test_a_pin_may_keep_though_keep_is_barred(llama):
    space = build_space(llama, SpaceRequest(pins=(("*.q_proj", "keep"),), bar_keep=True))
    assert offered(space)["model.layers.0.self_attn.q_proj"] == {Keep()}
    assert Keep() not in offered(space)["model.layers.0.self_attn.k_proj"]


@pytest.mark.parametrize(
    "pattern", ["*.self_attn.{q,k,v}_proj", "*.k_proj", "model.layers.?.self_attn.v_proj.weight"]
)
def test_tied_units_answer_to_their_members_names(llama, pattern):
    space = build_space(llama, SpaceRequest(ties="vllm", pins=((pattern, "int3-g64"),)))
    pinned = {name for name, operators in offered(space).items() if len(operators) == 1}
    assert pinned == {f"model.layers.{i}.self_attn.{{q,k,v}}_proj" for i in (0, 1)}


def test_excluded_units_are_stored_dense():
    model = tiny("gpt2")
    whole, part = (
        build_space(model, SpaceRequest(exclude=exclude)) for exclude in ((), ("*.attn.*",))
    )
    assert {unit.kind for unit in part.units} == {"c_fc", "mlp.c_proj"}
    assert total_elements(part) == total_elements(whole)
    dense = {tensor.name: tensor.shape for tensor in part.fixed}
    assert dense["transformer.h.0.attn.c_attn.weight"] == (32, 96)  # as it lies in the model


CONTRADICTIONS = {
    "pin nothing": (SpaceRequest(pins=(("*.q_pro", "keep"),)), r"pin: .*mean '\*.q_proj'"),
    "exclude nothing": (SpaceRequest(exclude=("lm_head",)), "exclude: 'lm_head' matches none"),
    "unknown label": (SpaceRequest(pins=(("*", "int7-g64"),)), "label 'int7-g64' .did you"),
    "pinned and excluded": (
        SpaceRequest(pins=(("*.q_proj", "keep"),), exclude=("*.layers.1.*",)),
        "'model.layers.1.self_attn.q_proj' is both pinned and excluded",
    ),
    "two pins": (
        SpaceRequest(pins=(("*.q_proj", "keep"), ("*.layers.1.*", "int3-g64"))),
        r"pinned to keep by '\*.q_proj' and to int3-g64 by '\*.layers.1.\*'",
    ),
    "two pins on a tied unit": (
        SpaceRequest(ties="vllm", pins=(("*.q_proj", "keep"), ("*.k_proj", "int3-g64"))),
        "pinned to keep by .* and to int3-g64",
    ),
    "nothing left": (SpaceRequest(exclude=("*",)), "every matrix is excluded"),
    "unknown preset": (SpaceRequest("bitts"), "unknown space 'bitts' .did you mean 'bits'.*yaml"),
    "unknown runtime": (SpaceRequest(ties="vlm"), "unknown runtime 'vlm'"),
    "no such file": (SpaceRequest("none.yaml"), "cannot read the space file none.yaml"),
}


@pytest.mark.parametrize(("request_", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(llama, request_, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_space(llama, request_)
    assert "\n" not in str(caught.value)


def test_unmatched_pattern_shows_names(llama):
    with pytest.raises(ValueError, match="they are named like model"):
        build_space(llama, SpaceRequest(exclude=("zzz",)))


FILE = """
name: mine
menu: [{name: round_to_nearest, bits: 3}, {name: round_to_nearest, bits: 3}]
menus:
  - {units: "*.mlp.*", menu: bits-g128}
  - {units: "*.down_proj", menu: [{name: keep, dtype: float16}]}
pins: {"*.layers.0.*": int3-g64}
exclude: ["*.o_proj"]
open: [head]
ties: vllm
"""


def test_file_decides(llama, write):
    text = FILE.replace("layers.0.*", "layers.0.self_attn.*").replace("o_proj", "layers.1.*o_proj")
    space = build_space(llama, SpaceRequest(write(text)))
    menus = offered(space)
    assert (space.name, space.ties) == ("mine", "vllm")
    assert menus["model.layers.0.self_attn.{q,k,v}_proj"] == {RoundToNearest(3)}
    assert menus["model.layers.1.self_attn.{q,k,v}_proj"] == {RoundToNearest(3), Keep()}
    assert menus["model.layers.0.mlp.{gate,up}_proj"] == set(PRESETS["bits-g128"].operators)
    assert menus["model.layers.0.mlp.down_proj"] == {Keep("float16")}, "later entries win"
    assert "lm_head" in menus
    assert "model.layers.1.self_attn.o_proj" not in menus


def test_command_line_overrides_the_files_pins_and_ties(llama, write):
    text = FILE.replace("layers.0.*", "layers.0.self_attn.*").replace("o_proj", "layers.1.*o_proj")
    request = SpaceRequest(write(text), ties="none", pins=(("*.0.*.q_proj", "int4-g128"),))
    menus = offered(build_space(llama, request))
    assert menus["model.layers.0.self_attn.q_proj"] == {RoundToNearest(4, 128)}
    assert menus["model.layers.0.self_attn.k_proj"] == {RoundToNearest(3)}


def test_a_file_cannot_pin_what_it_excludes(llama, write):
    with pytest.raises(ValueError, match="o_proj' is both pinned and excluded"):
        build_space(llama, SpaceRequest(write(FILE)))


def test_a_menu_of_nothing_but_a_barred_keep_is_refused(llama, write):
    path = write("{name: a, menu: [{name: keep}], keep: false}")
    with pytest.raises(ValueError, match="offers nothing but keep, which is barred"):
        build_space(llama, SpaceRequest(path))


def test_a_menu_for_no_unit_is_refused(llama, write):
    path = write("{name: a, menu: bits, menus: [{units: '*.dwn_proj', menu: bits}]}")
    with pytest.raises(ValueError, match=r"menus: .*did you mean '\*.down_proj'"):
        build_space(llama, SpaceRequest(path))


def test_modegpt_is_not_offered_where_heads_have_norms():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    space = build_space(Qwen3ForCausalLM(config), SpaceRequest(space="structured"))
    labels = {
        unit.kind: {option.operator.name for option in menu}
        for unit, menu in zip(space.units, space.menus, strict=True)
    }
    assert labels == {"attention": {"keep"}, "mlp": {"modegpt", "keep"}}


def test_options_as_large_as_the_dense_matrix_are_left_out(caplog):
    space = build_space(tiny("llama"), SpaceRequest(space="rows"))
    for unit, menu in zip(space.units, space.menus, strict=True):
        dense = [option.bytes for option in menu if option.operator.name == "keep"]
        assert all(o.bytes < dense[0] for o in menu if o.operator.name != "keep"), unit.name


def test_a_space_of_caches_needs_a_context():
    with pytest.raises(ValueError, match="say for how many tokens"):
        build_space(tiny("llama"), SpaceRequest(space="kv"))
    assert not any(
        unit.is_cache for unit in build_space(tiny("llama"), SpaceRequest(space="joint")).units
    )
    joint = build_space(tiny("llama"), SpaceRequest(space="joint", context=64))
    assert sum(unit.is_cache for unit in joint.units) == joint.depths

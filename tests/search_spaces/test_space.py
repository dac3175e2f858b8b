"""The bytes of a whole space: bounds for every assignment, and a file that proves them."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import matrix, tiny

from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Statistics
from search_spaces.storage import header_bytes

SETTINGS = settings(derandomize=True, max_examples=40, deadline=None)
SPACES = [
    ("llama", "bits-asymmetric", "vllm"),
    ("mixtral", "bits", "none"),
    ("gpt2", "bits", "none"),
]
every_space = pytest.mark.parametrize("which", SPACES, ids="-".join)


@cache
def space_of(which):
    model_type, preset, ties = which
    request = SpaceRequest(preset, ties=ties, open_units=("embeddings",))
    return build_space(tiny(model_type), request)


def assignments(space):
    """Random ones, and often an extreme."""
    extremes = [tuple(0 for _ in space.menus), tuple(len(menu) - 1 for menu in space.menus)]
    anything = st.tuples(*(st.integers(0, len(menu) - 1) for menu in space.menus))
    return st.one_of(st.sampled_from(extremes), anything)


def slack_bytes(space, assignment):
    return space.bytes(assignment) + space.overhead_bytes - space.stored_bytes(assignment)


@every_space
@SETTINGS
@given(st.data())
def test_priced_bytes_bound_the_file(which, data):
    space = space_of(which)
    assignment = data.draw(assignments(space))
    # What the bound gives away is header text alone: payload is exact.
    header = header_bytes(space.stored_tensors(assignment), space.metadata)
    assert slack_bytes(space, assignment) == space.container_bytes - header
    assert slack_bytes(space, assignment) >= 0


@every_space
@SETTINGS
@given(st.data())
def test_bytes_lie_between_least_and_most(which, data):
    space = space_of(which)
    assignment = data.draw(assignments(space))
    assert space.least_bytes <= space.bytes(assignment) <= space.most_bytes


@pytest.mark.parametrize("preset", ["bits", "bits-asymmetric"])
def test_the_bound_is_tight_at_real_sizes(preset):
    """A 135M model: 0.002 % of the file at the cheapest options, 0.02 % when all stays dense.

    The bound takes each unit's longest header entry, and a dense unit has one entry, not three.
    """
    model = tiny(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    space = build_space(model, SpaceRequest(preset))
    assert space.num_weights == 106_168_320
    cheapest = tuple(0 for _ in space.menus)
    dense = tuple(len(menu) - 1 for menu in space.menus)
    assert slack_bytes(space, cheapest) < 2e-5 * space.stored_bytes(cheapest)
    assert slack_bytes(space, dense) < 2e-4 * space.stored_bytes(dense)


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [("llama", "*.0.*o_proj"), ("gpt2", "*.0.attn.c_proj"), ("mixtral", "*.1.*o_proj")],
)
@pytest.mark.parametrize("preset", ["bits", "bits-asymmetric"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_packed_model_has_exactly_the_stored_bytes(model_type, dense, preset, seed, tmp_path):
    model = tiny(model_type, device="cpu")
    space = build_space(model, SpaceRequest(preset, ties="vllm", exclude=(dense,)))
    generator = torch.Generator().manual_seed(seed)
    assignment = tuple(
        int(torch.randint(len(menu), (), generator=generator)) for menu in space.menus
    )
    parameters = dict(model.named_parameters())
    stored = {tensor.name: parameters[tensor.name].detach().bfloat16() for tensor in space.fixed}
    for unit, operator in zip(space.units, space.operators(assignment), strict=True):
        for member in unit.members:
            weight = matrix(model, member)
            matrices = weight if weight.dim() == 3 else weight[None]
            packed = [operator.pack(one, Statistics()) for one in matrices]
            names = [tensor.name for tensor in operator.layout(member.matrix_shape)]
            for tensor, name in zip(member.layout(operator), names, strict=True):
                parts = torch.stack([one[name] for one in packed])
                stored[tensor.name] = parts.reshape(tensor.shape).contiguous()
    path = tmp_path / "packed.safetensors"
    save_file(stored, path, space.metadata)
    assert path.stat().st_size == space.stored_bytes(assignment)


def test_uniform_is_the_dearest_shared_operator_within_a_budget():
    space = build_space(tiny("llama"), SpaceRequest(pins=(("*.0.*.q_proj", "keep"),)))
    prices = {}
    for label in ("int2-g64", "int3-g64", "int4-g64"):
        choice = tuple(
            0 if len(menu) == 1 else [o.operator.label for o in menu].index(label)
            for menu in space.menus
        )
        prices[label] = (space.bytes(choice), choice)
    three, four = prices["int3-g64"], prices["int4-g64"]
    assert space.uniform(three[0]) == three[1]
    assert space.uniform(four[0] - 1) == three[1]
    assert space.uniform(four[0]) == four[1]
    assert space.uniform(prices["int2-g64"][0] - 1) is None


def test_dropping_every_unit_is_no_uniform_assignment():
    space = build_space(tiny("llama"), SpaceRequest(space="depth"))
    assert space.least_bytes == 0
    assert space.uniform(space.most_bytes - 1) is None
    assert space.bytes(space.uniform(space.most_bytes)) == space.most_bytes


def test_wrong_assignments_are_refused():
    space = space_of(SPACES[0])
    with pytest.raises(ValueError, match=f"expected {len(space.units)} choices, got 1"):
        space.bytes((0,))
    with pytest.raises(ValueError, match="has 7 options, got index 7"):
        space.bytes((7,) * len(space.units))

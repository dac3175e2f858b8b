"""What is particular to caches: which numbers share a scale, what they weigh, what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from search_spaces.operators import Keep, KVQuantize, RoundToNearest
from search_spaces.space import Member, Unit
from search_spaces.storage import safetensors_bytes


def cache(batch=2, tokens=100, channels=24, parts=("keys", "values")):
    shape = (batch, tokens, channels)
    return Unit("a.cache", tuple(Member("a", p, shape, cache=True) for p in parts), 0, "cache")


def states(unit, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    return [scale * torch.randn(m.shape, generator=generator) for m in unit.members]


def read_back(operator, unit, tensors):
    packed = operator.pack_unit(tensors, unit.members, [])
    return operator.unpack_unit(packed, unit.members)


def slow(values, bits):
    """One group by its definition, number by number: the grid from its least to its largest."""
    low = torch.tensor(min(values)).half().float().item()
    step = torch.tensor(max((max(values) - low) / (2**bits - 1), 2.0**-24)).half().float().item()
    return [low + step * min(max(round((v - low) / step), 0), 2**bits - 1) for v in values]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_keys_share_a_scale_along_tokens_and_values_along_channels(part, bits):
    unit = cache(2, 21, 10, (part,))
    (tensor,) = states(unit)
    (read,) = read_back(KVQuantize(bits, bits, 8), unit, [tensor])
    expected = torch.empty_like(tensor)
    for sequence in range(2):
        rows = tensor[sequence].T if part == "keys" else tensor[sequence]
        made = [
            [x for start in range(0, len(row), 8) for x in slow(row[start : start + 8], bits)]
            for row in rows.tolist()
        ]
        made = torch.tensor(made)
        expected[sequence] = made.T if part == "keys" else made
    assert torch.allclose(read, expected, atol=1e-6)
    assert not torch.allclose(read, tensor, atol=1e-3)


def test_a_large_channel_of_keys_does_not_hurt_the_others():
    """The reason for scales per channel (KIVI, section 3.2): a few key channels are large."""
    unit = cache(1, 128, 16, ("keys",))
    (tensor,) = states(unit)
    tensor[..., 3] *= 100
    others = [i for i in range(16) if i != 3]
    operator = KVQuantize(4, 4, 128)
    (as_keys,) = read_back(operator, unit, [tensor])
    (as_values,) = read_back(operator, cache(1, 128, 16, ("values",)), [tensor])
    errors = [(made - tensor)[..., others].square().mean() for made in (as_keys, as_values)]
    assert 100 * errors[0] < errors[1]


@given(
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 70),
    st.integers(0, 160),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_stored_has_the_priced_types_and_shapes(
    batch, tokens, channels, key_bits, value_bits, group_size, residual
):
    unit = cache(batch, tokens, channels)
    operator = KVQuantize(key_bits, value_bits, group_size, residual)
    packed = operator.pack_unit(states(unit), unit.members, [])
    names = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16"}
    found = {name: (names[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    assert found == {t.name: (t.dtype, t.shape) for t in operator.layout_unit(unit.members)}
    assert unit.bytes(operator) == sum(t.nbytes for t in packed.values())


def test_bytes_are_those_of_a_file_and_of_the_formula(tmp_path):
    unit = cache(2, 512, 128)
    operator = KVQuantize(3, 3, 64)
    codes = 2 * 2 * 512 * 128 * 3 // 8
    assert unit.bytes(operator) == codes + 2 * (2 * 512 * 128 // 64) * 4
    assert unit.bytes(Keep()) == 2 * 2 * 512 * 128 * 2
    path = tmp_path / "cache.safetensors"
    save_file(operator.pack_unit(states(unit), unit.members, []), path)
    assert path.stat().st_size == safetensors_bytes(operator.layout_unit(unit.members))


def test_latest_tokens_stay_at_sixteen_bits():
    unit = cache(2, 50, 8)
    tensors = states(unit)
    read = read_back(KVQuantize(2, 2, 16, 10), unit, tensors)
    for made, tensor in zip(read, tensors, strict=True):
        assert torch.equal(made[:, -10:], tensor[:, -10:].bfloat16().float())
        assert not torch.equal(made[:, :-10], tensor[:, :-10].bfloat16().float())
    shorter = cache(2, 40, 8)
    cut = read_back(KVQuantize(2, 2, 16), shorter, [t[:, :40] for t in tensors])
    for made, alone in zip(read, cut, strict=True):
        assert torch.equal(made[:, :40], alone)


@pytest.mark.parametrize("scale", [1e-8, 1e7])
def test_numbers_that_float16_cannot_hold_stay_finite(scale):
    unit = cache()
    for made in read_back(KVQuantize(4, 4), unit, states(unit, scale)):
        assert torch.isfinite(made).all()


@pytest.mark.parametrize(
    ("operator", "label"),
    [
        (KVQuantize(4, 4), "kv4-g64"),
        (KVQuantize(4, 2), "k4v2-g64"),
        (KVQuantize(2, 2, 32, 128), "kv2-g32-r128"),
    ],
)
def test_labels(operator, label):
    assert operator.label == label


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 4), "key_bits must be 1 to 8, got 0"),
        ((4, 16), "value_bits must be 1 to 8, got 16"),
        ((4, 4, 0), "group_size must be >= 1, got 0"),
        ((4, 4, 64, -1), "residual must be >= 0, got -1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        KVQuantize(*fields)


def test_caches_and_weights_take_each_their_own():
    weights = Unit("a.q_proj", (Member("a.q_proj", "weight", (8, 8)),), 0, "q_proj")
    assert weights.unfit(KVQuantize(4, 4)) == "it stores caches, and a.q_proj.weight is a parameter"
    assert cache().unfit(KVQuantize(4, 4)) == cache().unfit(Keep()) == weights.unfit(Keep()) == ""
    assert "takes kv_quantize or keep" in cache().unfit(RoundToNearest(4))

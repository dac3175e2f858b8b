"""GGUF blocks against the gguf package, ggml's reference quantizer and plain rounding."""

import hashlib

import numpy as np
import pytest
import torch

from search_spaces.operators import GGUFBlock, Statistics
from search_spaces.operators.gguf_block import BLOCKS, FALLBACK, gguf_menu

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ENCODED_BY_PACKAGE = tuple(kind for kind in BLOCKS if kind not in K_QUANTS)
NONE = Statistics()


@pytest.fixture(scope="module")
def gguf():
    package = pytest.importorskip("gguf")
    return package


def awkward_rows():
    """(16, 1024) weights: usual ones, outliers, zeros, constants, tiny and huge scales, ties."""
    rows = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
    rows[1, ::97] *= 200.0
    rows[2] = 0.0
    rows[3] = 0.25
    rows[4] = -0.5
    rows[5] *= 1e-6  # scales below the least normal float16
    rows[6] *= 1e-9  # scales that vanish in float16
    rows[7] = rows[7].abs()
    rows[8] = -rows[8].abs()
    rows[9] *= 1000.0
    rows[10, :256] = 0.0
    rows[11] = (rows[11] * 64).round() / 64  # many ties
    rows[12] = torch.arange(1024) % 16 - 8.0
    rows[13] = rows[13].exp().square()
    rows[14] = torch.nextafter(2.0 ** (torch.arange(1024) // 32 - 16), torch.zeros(()))
    rows[15] = 2.0 ** (torch.arange(1024) // 32 - 16)
    return rows


def package_type(gguf, kind):
    return gguf.GGMLQuantizationType[kind.upper()]


@pytest.mark.parametrize("kind", ENCODED_BY_PACKAGE)
def test_bytes_are_those_of_the_package(gguf, kind):
    rows = awkward_rows()
    expected = gguf.quants.quantize(rows.numpy(), package_type(gguf, kind))
    assert np.array_equal(GGUFBlock(kind).pack(rows, NONE)["blocks"].numpy(), expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_sizes_are_those_of_the_package(gguf, kind):
    assert BLOCKS[kind] == gguf.GGML_QUANT_SIZES[package_type(gguf, kind)]


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_block_is_read_as_the_package_reads_it(gguf, kind):
    width, size = BLOCKS[kind]
    blocks = torch.randint(0, 256, (500, size), generator=torch.Generator().manual_seed(1))
    blocks = blocks.to(torch.uint8)
    with np.errstate(all="ignore"):  # random scales are infinite now and then
        expected = gguf.quants.dequantize(blocks.numpy(), package_type(gguf, kind))
    ours = GGUFBlock(kind).unpack({"blocks": blocks}, (500, width)).numpy()
    assert np.array_equal(ours, expected, equal_nan=True)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8
    assert np.array_equal(ours[finite].view(np.uint32), expected[finite].view(np.uint32))


# What ggml's reference quantizer in C (quantize_q2_K ..., built without fused multiply-add) makes
# of the row in `ramp`: the start of the SHA-256 of its bytes, without and with an importance
# matrix.
REFERENCE = (
    ("q2_k", False, "51b5fcfca3930c84"),
    ("q2_k", True, "1dba27d4592bc9ef"),
    ("q3_k", False, "d12d2dd3c10a1de9"),
    ("q3_k", True, "fb6c8e7304ce14a7"),
    ("q4_k", False, "65631364f0f2dec2"),
    ("q4_k", True, "3910ba259375d769"),
    ("q5_k", False, "98c96294d82a03da"),
    ("q5_k", True, "41427f63e6cf3e5e"),
    ("q6_k", False, "39b3c7e41708cfea"),
    ("q6_k", True, "8aab0ceed6074e15"),
)


@pytest.mark.parametrize(("kind", "weighted", "sha256"), REFERENCE)
def test_k_quants_are_those_of_the_reference_quantizer(kind, weighted, sha256):
    index = torch.arange(256)
    ramp = ((index * 37 % 101 - 50).float() / 64)[None]
    stats = Statistics(second_moment=(1 + index * 13 % 7).float())
    packed = GGUFBlock(kind, weighted).pack(ramp, stats)["blocks"]
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16] == sha256


def test_a_block_by_hand():
    """Half steps from -4 to 3.5, twice: scale 0.5, codes 0 to 15, first half in low nibbles."""
    row = (torch.arange(32) % 16 - 8.0)[None] / 2
    packed = GGUFBlock("q4_0").pack(row, NONE)["blocks"][0].tolist()
    assert packed == [0x00, 0x38, *(code | code << 4 for code in range(16))]


def rounded(blocks, bits, *, offset):
    """Plain rounding of (blocks, width) with scales and minima in full precision."""
    if offset:
        low = blocks.amin(1, keepdim=True)
        step = (blocks.amax(1, keepdim=True) - low) / (2**bits - 1)
        return ((blocks - low) / step).round() * step + low
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (blocks / step).round().clamp(low, high) * step


@pytest.mark.parametrize(
    ("kind", "bits", "width", "offset"),
    [
        ("q2_k", 2, 16, True),
        ("q3_k", 3, 16, False),
        ("q4_k", 4, 32, True),
        ("q5_k", 5, 32, True),
        ("q6_k", 6, 16, False),
    ],
)
def test_k_quants_beat_plain_rounding_with_exact_scales(kind, bits, width, offset):
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    plain = rounded(weight.reshape(-1, width), bits, offset=offset).reshape(weight.shape)
    ours = GGUFBlock(kind).apply(weight, NONE)
    assert (ours - weight).square().sum() < (plain - weight).square().sum()


@pytest.mark.parametrize("kind", K_QUANTS)
def test_importance_lowers_the_weighted_error(kind):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 1024, generator=generator)
    moment = torch.rand(1024, generator=generator).pow(4) + 0.01
    moment[7] = 0.0
    moment[256:512] = 0.0  # a whole block that no input reaches
    stats = Statistics(second_moment=moment)
    losses = {
        weighted: (
            (GGUFBlock(kind, weighted).apply(weight, stats) - weight).square() * moment
        ).sum()
        for weighted in (False, True)
    }
    assert losses[True] < 0.9 * losses[False]
    assert torch.isfinite(GGUFBlock(kind, weighted=True).apply(weight, stats)).all()
    with pytest.raises(ValueError, match=r"q\d_k-imatrix needs the second_moment"):
        GGUFBlock(kind, weighted=True).pack(weight, NONE)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e6, 1e20])
def test_extreme_weights_stay_finite(kind, scale):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(6)) * scale
    applied = GGUFBlock(kind).apply(weight, NONE)
    assert torch.isfinite(applied).all()
    if scale < 1e-20 and kind != "mxfp4":  # whose scales reach down to 2**-128
        assert torch.equal(applied, torch.zeros_like(applied))


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_independent(kind):
    """Chunks of a large matrix meet no seams, and a row does not know its neighbours."""
    weight = torch.randn(600, 512, generator=torch.Generator().manual_seed(8))
    whole = GGUFBlock(kind).pack(weight, NONE)["blocks"]
    alone = GGUFBlock(kind).pack(weight[511:513], NONE)["blocks"]
    assert torch.equal(whole[511:513], alone)


@pytest.mark.parametrize("kind", BLOCKS)
def test_says_what_llama_cpp_would_store_instead(kind):
    operator = GGUFBlock(kind)
    assert operator.unfit((7, 512)) == ""
    reason = operator.unfit((576, 576))
    if BLOCKS[kind][0] == 32:
        assert reason == ""
    else:
        assert f"multiples of 256, got 576; llama.cpp would store {FALLBACK[kind]}" in reason
        assert operator.unfit((576, 100)) == f"{kind} needs columns in multiples of 256, got 100"


def test_menu_for_a_small_model_has_blocks_of_32_only():
    fits = [operator.label for operator in gguf_menu() if not operator.unfit((1536, 576))]
    assert fits == ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


@pytest.mark.parametrize("weighted", [False, True])
def test_menu_goes_from_cheap_to_dear(weighted):
    menu = gguf_menu(weighted=weighted)
    sizes = [operator.bytes((4096, 4096)) for operator in menu]
    assert sizes == sorted(sizes)
    assert {o.type for o in menu if o.weighted} == (set(K_QUANTS) if weighted else set())
    assert len({operator.label for operator in menu}) == len(menu)


def test_refuses_what_is_no_type():
    with pytest.raises(ValueError, match=r"type must be one of .*q4_k.*, got 'Q4_K'"):
        GGUFBlock("Q4_K")
    with pytest.raises(ValueError, match=r"weighted must be false unless .* for q4_0"):
        GGUFBlock("q4_0", weighted=True)

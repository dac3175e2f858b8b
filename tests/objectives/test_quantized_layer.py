"""A cache layer that stores codes: what attention reads back, in one pass and token by token."""

from dataclasses import replace

import pytest
import torch
from language import random_model
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from objectives.quantized_layer import QuantizedLayer, quantized_cache
from search_spaces.operators import KVQuantize
from search_spaces.space import Member, Unit

BATCH, HEADS, WIDTH = 2, 3, 8
OPERATORS = (
    {"keys": KVQuantize(3, 3, 8), "values": KVQuantize(2, 2, 16)},
    {"keys": KVQuantize(4, 4, 8, 5), "values": KVQuantize(4, 4, 8, 5)},
    {"values": KVQuantize(2, 2, 5)},
)
every_choice = pytest.mark.parametrize("choice", OPERATORS, ids=["two", "residual", "values"])


def states(tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    shape = (2, BATCH, HEADS, tokens, WIDTH)
    return torch.randn(shape, generator=generator).to(dtype)


def stored(choice, part, dense):
    """What the operator makes of all (batch, heads, tokens, width) states at once."""
    flat = dense.transpose(1, 2).flatten(2)
    if part in choice:
        recent = min(choice[part].residual, flat.shape[1])
        operator = replace(choice[part], residual=0)
        coded = flat[:, : flat.shape[1] - recent]
        if coded.shape[1]:
            packed = operator.pack_part(part, coded)
            read = operator.unpack_part(part, packed, tuple(coded.shape)).to(flat)
            flat = torch.cat([read, flat[:, coded.shape[1] :]], 1)
    return flat.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_choice
def test_one_pass_reads_what_the_operator_stores(choice, dtype):
    keys, values = states(43, dtype)
    read = QuantizedLayer(choice).update(keys, values)
    for part, dense, made in zip(("keys", "values"), (keys, values), read, strict=True):
        assert made.dtype == dtype
        assert torch.equal(made, stored(choice, part, dense))
        assert torch.equal(made, dense) is (part not in choice)


@pytest.mark.parametrize("steps", [[1] * 43, [30, 1, 1, 1, 10], [43]], ids=len)
@every_choice
def test_however_tokens_come_the_same_is_read_in_the_end(choice, steps):
    keys, values = states(43)
    layer, end = QuantizedLayer(choice), 0
    for step in steps:
        assert layer.get_mask_sizes(step) == (end + step, 0)
        read = layer.update(keys[:, :, end : end + step], values[:, :, end : end + step])
        end += step
        assert layer.get_seq_length() == end
        # The rest of the text has no part in what is read so far.
        assert torch.equal(read[0], stored(choice, "keys", keys[:, :, :end]))
    for part, dense, made in zip(("keys", "values"), (keys, values), read, strict=True):
        assert torch.equal(made, stored(choice, part, dense))


@pytest.mark.parametrize("steps", [[1] * 30, [20, 1, 1, 8], [3, 27], [30]], ids=len)
@pytest.mark.parametrize("window", [4, 9])
def test_a_sliding_window_sees_as_many_tokens_as_a_dense_one(window, steps):
    keys, values = states(30)
    choice = {"keys": KVQuantize(8, 8, 4), "values": KVQuantize(8, 8, 4)}
    layers = [QuantizedLayer(c, window=window) for c in (choice, {})]
    dense, end = DynamicSlidingWindowLayer(window), 0
    for step in steps:
        new = keys[:, :, end : end + step], values[:, :, end : end + step]
        sizes = dense.get_mask_sizes(step)
        expected = dense.update(*new)
        for layer in layers:
            assert layer.is_sliding
            assert layer.get_mask_sizes(step) == sizes
            for made, wanted in zip(layer.update(*new), expected, strict=True):
                assert made.shape == wanted.shape
                assert torch.allclose(made, wanted, atol=0.02)
                assert layer is layers[0] or torch.equal(made, wanted)
        end += step
    most_tokens = window + 2 * 4
    assert layers[0].nbytes < 2 * BATCH * most_tokens * HEADS * WIDTH * 4


def test_it_holds_the_priced_bytes_once_its_groups_are_closed():
    shape = (BATCH, 128, HEADS * WIDTH)
    members = tuple(Member("a", part, shape, cache=True) for part in ("keys", "values"))
    operator = KVQuantize(4, 2, 32)
    layer = QuantizedLayer(dict.fromkeys(("keys", "values"), operator))
    keys, values = states(128)
    for token in range(0, 128):
        layer.update(keys[:, :, token, None], values[:, :, token, None])
    assert layer.nbytes == Unit("a.cache", members, 0, "cache").bytes(operator)
    assert layer.nbytes < (keys.nbytes + values.nbytes) / 6


def test_the_sequences_of_a_batch_can_be_chosen_and_repeated():
    keys, values = states(21)
    choice, order = OPERATORS[0], torch.tensor([1, 1, 0])
    changed, direct = QuantizedLayer(choice), QuantizedLayer(choice)
    changed.update(keys[:, :, :20], values[:, :, :20])
    direct.update(keys[order][:, :, :20], values[order][:, :, :20])
    changed.reorder_cache(order)
    last = [tensor[order][:, :, 20:] for tensor in (keys, values)]
    for made, wanted in zip(changed.update(*last), direct.update(*last), strict=True):
        assert torch.equal(made, wanted)
    changed.batch_select_indices(torch.tensor([0]))
    changed.batch_repeat_interleave(2)
    (read, _) = changed.update(keys[[1, 1], :, 20:], values[[1, 1], :, 20:])
    assert torch.equal(read[0], read[1])


def test_reset_forgets_and_crop_is_refused():
    keys, values = states(20)
    layer = QuantizedLayer(OPERATORS[0])
    first = layer.update(keys, values)
    layer.crop(0)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        layer.crop(-1)
    assert not layer.is_croppable
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0
    for made, wanted in zip(layer.update(keys, values), first, strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_a_cache_of_dense_layers_changes_nothing_in_a_model(name):
    overrides = {"sliding_window": 6} if name == "gemma2" else {}
    model = random_model(name, **overrides)
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = (
        DynamicCache(config=model.config),
        quantized_cache(model.config, {0: {}, 1: {}}),
    )
    with torch.inference_mode():
        whole = model(input_ids=tokens, use_cache=False).logits
        found = []
        for cache in caches:
            parts = [
                model(input_ids=part, use_cache=True, past_key_values=cache).logits
                for part in (tokens[:, :8], tokens[:, 8:9], tokens[:, 9:])
            ]
            found.append(torch.cat(parts, 1))
    assert torch.equal(*found)
    assert torch.allclose(found[1], whole, atol=1e-4)


def test_quantized_cache_leaves_the_other_layers_and_refuses_strange_ones():
    config = random_model("gemma2", sliding_window=6).config
    cache = quantized_cache(config, {0: OPERATORS[0]})
    assert type(cache.layers[0]) is QuantizedLayer
    assert cache.layers[0].get_max_length() == 6
    assert type(cache.layers[1]) is DynamicLayer
    with pytest.raises(ValueError, match="has 2 layers, none of index 2"):
        quantized_cache(config, {2: OPERATORS[0]})
    recurrent = AutoConfig.for_model("mamba", num_hidden_layers=1)
    with pytest.raises(ValueError, match="layer 0 keeps a LinearAttentionLayer"):
        quantized_cache(recurrent, {0: OPERATORS[0]})

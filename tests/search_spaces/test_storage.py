"""Bytes as the safetensors library writes them, for any names, types and shapes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from search_spaces.storage import (
    StoredTensor,
    header_base_bound,
    header_bytes,
    header_entry_bound,
    packed_bytes,
    payload_bytes,
    safetensors_bytes,
)

NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64, "BOOL": np.bool_}
# What JSON writers may disagree on: quotes, escapes, control characters, several bytes in UTF-8.
names = st.text('aZ.0_"\\/\n\t\x01\x7fé☃\u2028𝄞', min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
tensors = st.lists(
    st.builds(StoredTensor, names, st.sampled_from(sorted(NUMPY)), shapes),
    min_size=1,
    max_size=12,
    unique_by=lambda tensor: tensor.name,
)
metadata = st.sampled_from([None, {"format": "model-allocator"}])


@settings(derandomize=True, max_examples=150, deadline=None)
@given(tensors, metadata)
def test_size_is_that_of_the_library(stored, notes):
    arrays = {t.name: np.zeros(t.shape, NUMPY[t.dtype]) for t in stored}
    assert safetensors_bytes(stored, notes) == len(save(arrays, notes))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(tensors, metadata)
def test_entry_bounds_really_bound_the_header(stored, notes):
    entries = sum(header_entry_bound(tensor, payload_bytes(stored)) for tensor in stored)
    assert header_bytes(stored, notes) <= header_base_bound(notes) + entries


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_packed_bytes_hold_the_bits_and_waste_less_than_one_byte(num_values, bits):
    size = packed_bytes(num_values, bits)
    assert num_values * bits <= 8 * size < num_values * bits + 8

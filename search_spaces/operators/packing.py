"""Bit packing: codes of 1 to 8 bits without gaps, least significant bit first.

Eight codes of ``bits`` bits fill exactly ``bits`` bytes, so eight at a time go through one 64-bit
word; this stays on whatever device the codes are on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from search_spaces.storage import ceil_div, packed_bytes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes into bytes.

    Args:
        codes: (num_values,) integers in ``[0, 2**bits)``, any dtype.
        bits: Width of a code, 1 to 8.

    Returns:
        (ceil(num_values * bits / 8),) uint8 tensor on the codes' device.
    """
    num_values = codes.numel()
    words = pad(codes.to(torch.int64), (0, -num_values % 8)).reshape(-1, 8)
    words = (words << _places(bits, codes)).sum(-1)
    planes = words.view(torch.uint8).reshape(-1, 8)[:, :bits]
    return planes.reshape(-1)[: packed_bytes(num_values, bits)].clone()


def unpack_bits(packed: Tensor, bits: int, num_values: int) -> Tensor:
    """Invert :func:`pack_bits`.

    Returns:
        (num_values,) float32 tensor on the packed bytes' device.
    """
    num_words = ceil_div(num_values, 8)
    planes = pad(packed, (0, num_words * bits - packed.numel())).reshape(num_words, bits)
    words = pad(planes, (0, 8 - bits)).contiguous().view(torch.int64)
    codes: Tensor = (words >> _places(bits, packed)) & (2**bits - 1)
    return codes.reshape(-1)[:num_values].float()


def _places(bits: int, like: Tensor) -> Tensor:
    """First bit of each of the eight codes of a word."""
    return torch.arange(8, device=like.device) * bits

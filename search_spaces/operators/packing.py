"""Bit packing: codes of 1 to 8 bits without gaps, least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes into bytes.

    Args:
        codes: (num_values,) integers in ``[0, 2**bits)``, any dtype.
        bits: Width of a code, 1 to 8.

    Returns:
        (ceil(num_values * bits / 8),) uint8 tensor on the CPU.
    """
    values = codes.to(torch.uint8).cpu().numpy()
    planes = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, num_values: int) -> Tensor:
    """Invert :func:`pack_bits`.

    Returns:
        (num_values,) float32 tensor on the CPU.
    """
    flat = np.unpackbits(packed.cpu().numpy(), count=num_values * bits, bitorder="little")
    values = np.packbits(flat.reshape(num_values, bits), axis=1, bitorder="little")
    return torch.from_numpy(values[:, 0].astype(np.float32))

"""Matrices to compress, and what compressing them costs."""

import math

import torch

from search_spaces.operators import Statistics

NONE = Statistics()
SQUARE = (4096, 4096)


def draws(*shape, seed=0):
    """Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(operator, matrix, stats=NONE):
    """Summed over the matrix."""
    return (operator.apply(matrix, stats) - matrix).square().sum().item()


def bits_per_weight(operator, shape=SQUARE):
    """All metadata included."""
    return operator.bytes(shape) * 8 / math.prod(shape)

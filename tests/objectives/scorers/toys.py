"""Models of a few bare matrices, whose importances can be worked out by hand."""

from dataclasses import replace

import torch
from language import offering, random_tokens
from scoring import context_of
from torch import nn

from objectives.language_task import LanguageTask
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest, Statistics

MENU = (RoundToNearest(2, 8), RoundToNearest(4, 8), Keep())


class Toy(nn.Module):
    """Blocks of matrices, and perhaps a matrix outside them; it is never run."""

    def __init__(self, blocks, outside=()):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(map(linear, block)) for block in blocks)
        for index, weight in enumerate(outside):
            setattr(self, f"outside{index}", linear(weight))


def linear(weight):
    """A layer with these weights."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = weight.clone()
    return layer


def toy_context(blocks, outside=(), menu=MENU, moments=None):
    """A context of such a model; the inputs of each matrix have its second moment, or ones."""
    model = Toy(blocks, outside)
    space = offering(build_space(model, SpaceRequest()), *menu)
    context = context_of(model, space, LanguageTask(random_tokens()), needs=())
    members = [member for unit in space.units for member in unit.members]
    moments = moments or [torch.ones(member.shape[-1]) for member in members]
    statistics = {
        member.name: Statistics(second_moment=moment)
        for member, moment in zip(members, moments, strict=True)
    }
    return replace(context, statistics=statistics)


def normal(*shape, seed=0):
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(singular, seed=0):
    """A square matrix with these singular values."""
    singular = torch.as_tensor(singular, dtype=torch.float64)
    size = len(singular)
    left, _ = torch.linalg.qr(normal(size, size, seed=seed).double())
    right, _ = torch.linalg.qr(normal(size, size, seed=seed + 1).double())
    return (left * singular @ right).float()

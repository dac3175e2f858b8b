"""Scorers: one file per estimate, and the table that names them."""

from __future__ import annotations

from objectives.sensitivity.base import Cell, CellScorer, Scorer, ScoringContext
from objectives.sensitivity.blend import Blend
from objectives.sensitivity.fisher import Fisher
from objectives.sensitivity.reconstruction import Reconstruction
from objectives.sensitivity.relative_error import RelativeError
from objectives.sensitivity.table import LossTable
from search_spaces.registry import Registry

__all__ = ["SCORERS", "Cell", "CellScorer", "LossTable", "Scorer", "ScoringContext"]

SCORERS: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "blend": Blend,
        "fisher": Fisher,
        "reconstruction": Reconstruction,
        "relative_error": RelativeError,
    },
    entry_point_group="model_allocator.scorers",
)

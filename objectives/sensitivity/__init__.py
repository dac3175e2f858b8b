"""Scorers: one file per estimate, and the table that names them."""

from __future__ import annotations

from objectives.sensitivity.arithmetic_progression import ArithmeticProgression
from objectives.sensitivity.base import Cell, CellScorer, Scorer, ScoringContext
from objectives.sensitivity.blend import Blend
from objectives.sensitivity.block_influence import BlockInfluence
from objectives.sensitivity.block_output import BlockOutput
from objectives.sensitivity.correlated import CorrelatedBlend, CorrelatedFisher
from objectives.sensitivity.erdos_renyi import ErdosRenyi
from objectives.sensitivity.fisher import Fisher
from objectives.sensitivity.full_reconstruction import FullReconstruction
from objectives.sensitivity.gradient_difference import GradientDifference
from objectives.sensitivity.hessian_trace import HessianTrace
from objectives.sensitivity.influence import Influence
from objectives.sensitivity.kl_gradient import KLGradient
from objectives.sensitivity.lamp import Lamp, Magnitude
from objectives.sensitivity.learned_ratios import LearnedRatios
from objectives.sensitivity.learned_thresholds import LearnedThresholds
from objectives.sensitivity.noise_injection import NoiseInjection
from objectives.sensitivity.one_at_a_time import (
    MarginalPerplexity,
    OneAtATime,
    OneAtATimeFromIncumbent,
)
from objectives.sensitivity.outlier_ratio import OutlierRatio
from objectives.sensitivity.output_gradient import OutputGradient
from objectives.sensitivity.reconstruction import Reconstruction
from objectives.sensitivity.relative_error import RelativeError
from objectives.sensitivity.spectral_tail import SpectralTail
from objectives.sensitivity.spectrum_energy import SpectrumEnergy
from objectives.sensitivity.table import LossTable
from search_spaces.registry import Registry

__all__ = ["SCORERS", "Cell", "CellScorer", "LossTable", "Scorer", "ScoringContext"]

SCORERS: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "arithmetic_progression": ArithmeticProgression,
        "blend": Blend,
        "block_influence": BlockInfluence,
        "block_output": BlockOutput,
        "correlated_blend": CorrelatedBlend,
        "correlated_fisher": CorrelatedFisher,
        "erdos_renyi": ErdosRenyi,
        "fisher": Fisher,
        "full_reconstruction": FullReconstruction,
        "gradient_difference": GradientDifference,
        "hessian_trace": HessianTrace,
        "influence": Influence,
        "kl_gradient": KLGradient,
        "lamp": Lamp,
        "learned_ratios": LearnedRatios,
        "learned_thresholds": LearnedThresholds,
        "magnitude": Magnitude,
        "marginal_perplexity": MarginalPerplexity,
        "noise_injection": NoiseInjection,
        "one_at_a_time": OneAtATime,
        "one_at_a_time_incumbent": OneAtATimeFromIncumbent,
        "outlier_ratio": OutlierRatio,
        "output_gradient": OutputGradient,
        "reconstruction": Reconstruction,
        "relative_error": RelativeError,
        "spectral_tail": SpectralTail,
        "spectrum_energy": SpectrumEnergy,
    },
    entry_point_group="model_allocator.scorers",
)

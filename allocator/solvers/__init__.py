"""Solvers: one file per way to answer an additive problem, and the table that names them."""

from __future__ import annotations

from allocator.solvers.base import Solver
from allocator.solvers.brute_force import BruteForce
from allocator.solvers.dynamic import DynamicProgram, Oracle
from allocator.solvers.hull import Frontier
from allocator.solvers.lagrangian import Lagrangian
from allocator.solvers.milp import MixedInteger
from search_spaces.registry import Registry

__all__ = [
    "SOLVERS",
    "BruteForce",
    "DynamicProgram",
    "Frontier",
    "Lagrangian",
    "MixedInteger",
    "Oracle",
    "Solver",
]

SOLVERS: Registry[type[Solver]] = Registry(
    "solver",
    {
        "dynamic": DynamicProgram,
        "lagrangian": Lagrangian,
        "milp": MixedInteger,
        "brute_force": BruteForce,
    },
    entry_point_group="model_allocator.solvers",
)

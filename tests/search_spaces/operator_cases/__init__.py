"""Instances of every operator that the conformance suite runs on: one file per family.

A family's file defines ``LADDERS``: lists of operators of one kind, from cheap to dear; for those
that take a whole unit ``UNIT_LADDERS``, with the members of a unit that they fit. The suite runs
on every operator of every ladder, and checks that a step up costs more bytes and never errs more by
the objective of its ladder. Ladders of one operator are checked for the rest only.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from search_spaces.operators import Statistics
from search_spaces.space import Member


def squared_error(error: torch.Tensor, stats: Statistics) -> float:
    """The plain objective: summed squared error."""
    del stats
    return error.square().sum().item()


def output_error(error: torch.Tensor, stats: Statistics) -> float:
    """Mean squared output error on the calibration inputs: ``tr(E H E')``."""
    assert stats.hessian is not None
    return torch.einsum("ri,ij,rj->", error, stats.hessian, error).item()


def fisher_error(error: torch.Tensor, stats: Statistics) -> float:
    """Squared error weighted by the empirical Fisher."""
    assert stats.fisher is not None
    return (error.square() * stats.fisher).sum().item()


@dataclass(frozen=True)
class Ladder:
    """Operators of one kind from cheap to dear, and what they minimise: (error, stats) -> loss."""

    steps: tuple
    objective: Callable[[torch.Tensor, Statistics], float] = squared_error


def summed_error(errors: list[torch.Tensor], stats: list[Statistics]) -> float:
    """Summed squared error of all members."""
    del stats
    return sum(error.square().sum().item() for error in errors)


@dataclass(frozen=True)
class UnitLadder:
    """Unit operators from cheap to dear, the members they fit, and what they minimise.

    The objective takes lists in the order of the members: (errors, stats) -> loss.
    """

    steps: tuple
    members: tuple[Member, ...]
    objective: Callable[[list[torch.Tensor], list[Statistics]], float] = summed_error


FAMILIES = tuple(
    importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
)
LADDERS = tuple(ladder for family in FAMILIES for ladder in getattr(family, "LADDERS", ()))
UNIT_LADDERS = tuple(case for family in FAMILIES for case in getattr(family, "UNIT_LADDERS", ()))
CASES = tuple(operator for ladder in LADDERS for operator in ladder.steps)


def case_id(operator):
    """A readable test id."""
    return f"{operator.name}-{operator.label}"

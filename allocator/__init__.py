"""Find the allocation of bits, rank and sparsity that loses least under an exact byte budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.api import AllocateOptions, Allocation, allocate, allocate_task
    from allocator.plan import Plan, load_plan

__all__ = ["AllocateOptions", "Allocation", "Plan", "allocate", "allocate_task", "load_plan"]

_HOMES = {
    "AllocateOptions": "allocator.api",
    "Allocation": "allocator.api",
    "Plan": "allocator.plan",
    "allocate": "allocator.api",
    "allocate_task": "allocator.api",
    "load_plan": "allocator.plan",
}


def __getattr__(name: str) -> Any:
    """Import on first use: plans, problems and solvers must load without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'allocator' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

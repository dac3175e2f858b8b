"""Executors: where measurements run, and the table that names them. Importing this needs no ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from allocator.executors.base import Executor, Measure, MeasureFactory
from allocator.executors.in_process import InProcess
from allocator.executors.ray_pool import RayPool
from search_spaces.registry import Registry

__all__ = [
    "EXECUTORS",
    "Executor",
    "InProcess",
    "Measure",
    "MeasureFactory",
    "RayPool",
    "WorkerSetting",
]


@dataclass(frozen=True)
class WorkerSetting:
    """How many workers, and what each may use; the fields are :class:`RayPool`'s arguments."""

    workers: int = 1
    address: str | None = None
    num_gpus: float = 0.0
    threads: int = 1


def start_in_process(make: MeasureFactory, setting: WorkerSetting) -> Executor:
    """One measurement after another in this process; needs nothing else.

    Raises:
        ValueError: More than one worker or a cluster is asked for.
    """
    if setting.workers != 1 or setting.address is not None:
        raise ValueError(
            f"the in-process executor is 1 worker in this process, got {setting.workers} workers "
            f"and address {setting.address!r}; use the ray executor for more"
        )
    return InProcess(make)


def start_ray(make: MeasureFactory, setting: WorkerSetting) -> Executor:
    """A pool of Ray actors on this machine or on a cluster."""
    return RayPool(
        make,
        setting.workers,
        address=setting.address,
        num_gpus=setting.num_gpus,
        threads=setting.threads,
    )


ExecutorStarter = Callable[[MeasureFactory, WorkerSetting], Executor]

EXECUTORS: Registry[ExecutorStarter] = Registry(
    "executor",
    {
        "in-process": start_in_process,
        "ray": start_ray,
    },
    entry_point_group="model_allocator.executors",
)

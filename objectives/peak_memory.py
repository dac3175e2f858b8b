"""The most memory that a process has held: what a user's machine must have."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that this process has held so far.

    Attributes:
        host_bytes: Resident, with the pages of files that it had mapped.
        device_bytes: Of tensors on the device; 0 on the CPU.
    """

    host_bytes: int
    device_bytes: int

    @classmethod
    def measure(cls, device: torch.device) -> PeakMemory:
        """As the system and torch have counted it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return cls(peak * (1 if sys.platform == "darwin" else 1024), on_device)

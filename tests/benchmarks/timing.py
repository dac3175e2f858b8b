"""The clock of benchmarks that compare two sides of one process."""

from __future__ import annotations

import time

import torch


def clock() -> float:
    """Processor seconds, or wall seconds where the work is done elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()

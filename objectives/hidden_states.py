"""Hidden states between blocks, in host memory up to a cap and in memory-mapped files beyond it.

The problem: a streamed pass keeps what every sequence handed from block to block. That is too much
for a GPU, and a pass in reverse needs all boundaries at once: tokens times width times depth, which
may be more than the host has left.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_HIDDEN_BYTES = 2 * 2**30


class HiddenStates:
    """Tensors by key, on the host whatever device they come from. Use as a context manager.

    Args:
        most_bytes: What is kept in memory; what comes later goes to files.
        folder: Where these are; the system's temporary folder if not given. They are deleted when
            the context ends.
    """

    def __init__(
        self, *, most_bytes: int = DEFAULT_HIDDEN_BYTES, folder: Path | None = None
    ) -> None:
        self._most_bytes = most_bytes
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[Hashable, Tensor] = {}
        self._held_bytes = 0
        self._files: dict[Hashable, tuple[Path, torch.dtype, torch.Size]] = {}
        self._written = 0

    def __enter__(self) -> HiddenStates:
        """Nothing is kept yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Forget everything and delete the files."""
        self._held.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def put(self, key: Hashable, states: Tensor) -> None:
        """Keep states of any shape under a key, instead of what it had."""
        self.drop(key)
        states = states.detach().cpu()
        if self._held_bytes + states.nbytes <= self._most_bytes:
            self._held[key] = states
            self._held_bytes += states.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hidden-states-", dir=self._parent)
            logger.info("hidden states beyond %d bytes go to %s", self._most_bytes, self._folder)
        path = Path(self._folder.name) / str(self._written)
        self._written += 1
        flat = states.contiguous().flatten()
        flat.view(torch.uint8).numpy().tofile(path)
        self._files[key] = (path, states.dtype, states.shape)

    def get(self, key: Hashable, device: torch.device) -> Tensor:
        """What was put under a key, on a device."""
        if key in self._held:
            return self._held[key].to(device)
        path, dtype, shape = self._files[key]
        mapped = torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype)
        return mapped.view(shape).to(device)

    def drop(self, key: Hashable) -> None:
        """Forget a key, if it is known."""
        if key in self._held:
            self._held_bytes -= self._held.pop(key).nbytes
        elif key in self._files:
            self._files.pop(key)[0].unlink()

"""Third-party chatter, kept out of users' terminals while a model is loaded.

The problem this file solves: transformers draws progress bars for everything and imports torchao
where it is installed, which logs what it could not load. None of that concerns the user; whatever
does (weights that do not fit, for example) is checked and said by the loaders themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_CHATTY = ("transformers", "accelerate", "torchao", "torch.utils._pytree", "gguf")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let only errors of the model libraries through, and draw no progress bars."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

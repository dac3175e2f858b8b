"""How a run's configuration is written down, and whether another asks for the same run.

The problem: a command that is given again should continue what it began, and what it began was
settled since: paths made whole, the precision of the machine, weights of texts, no passwords.
"""

from __future__ import annotations

from pathlib import Path

from allocator.config import RunConfig, load_config
from allocator.run_folder import RunFolder
from allocator.study_storage import without_password


def continues(config: RunConfig, folder: RunFolder) -> bool:
    """Whether a folder holds a run of this very configuration, ended or not."""
    return folder.begun and _wish(load_config(folder.config)) == _wish(config)


def _wish(config: RunConfig) -> RunConfig:
    """What was asked for, without what a session settles."""
    config = lasting(config)
    measure = config.measure.model_copy(update={"dtype": "auto", "threads": 0})
    data = config.data.model_copy(update={"weights": ()})
    return config.model_copy(update={"measure": measure, "data": data})


def lasting(config: RunConfig) -> RunConfig:
    """With whole paths, for whoever resumes from elsewhere, and without passwords."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    search = config.search
    if search.latencies is not None:
        whole = str(Path(search.latencies).resolve())
        search = search.model_copy(update={"latencies": whole})
    if search.warm_start is not None:
        shown = without_password(search.warm_start)
        search = search.model_copy(update={"warm_start": shown})
    return config.model_copy(update={"model": model, "search": search})

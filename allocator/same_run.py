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
    """Whether a folder holds a run of this very configuration, ended or not.

    What the configuration leaves open is as the run has settled it.
    """
    if not folder.begun:
        return False
    held = load_config(folder.config)
    wanted = lasting(config)
    settled = {
        "dtype": held.measure.dtype if wanted.measure.dtype == "auto" else wanted.measure.dtype,
        "threads": wanted.measure.threads or held.measure.threads,
    }
    measure = wanted.measure.model_copy(update=settled)
    data = wanted.data.model_copy(update={"weights": wanted.data.weights or held.data.weights})
    return held == wanted.model_copy(update={"measure": measure, "data": data})


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

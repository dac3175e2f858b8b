"""Models without weights, so that a space can be priced before anything is downloaded."""

from __future__ import annotations

from pathlib import Path

from torch import device, nn

from search_spaces.quiet import quiet_transformers


def skeleton(model_id_or_folder: str | Path) -> nn.Module:
    """The causal language model of a configuration, on the meta device.

    Args:
        model_id_or_folder: A hub id or a local folder with a ``config.json``. Code that a
            repository ships is never run.

    Raises:
        ValueError: No such folder or configuration, or not a causal language model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(model_id_or_folder)
    # What no hub id can be is a path; the hub's own words about it would mislead.
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"no model folder {name!r}; give a hub id or a folder with a config.json")
    try:
        with quiet_transformers(), device("meta"):
            config = AutoConfig.from_pretrained(name)
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".:")
        raise ValueError(
            f"cannot build a causal language model from {name!r} ({reason}); "
            "give a hub id or a folder with the config.json of one"
        ) from error
    return model

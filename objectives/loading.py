"""A frozen causal language model from a name: a local folder, an embedded model or a hub id.

The problem this file solves: a plan is only worth something for the very weights it was made for.
Whatever the name, the model comes from a folder of safetensors whose content is hashed as stored,
so the hashes do not depend on the precision, the device or the sharding it is evaluated with.
Nothing pickled is read and no code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from objectives.device_map import DeviceMap, check_blocks, check_device_map
from objectives.embedded import EMBEDDED_MODELS, prepare_embedded
from search_spaces.models.skeleton import skeleton
from search_spaces.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Configuration entries that say how a model is run or who wrote it, not what it is.
_VOLATILE_KEYS = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache"})
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be measured, and what identifies it.

    Attributes:
        model: In evaluation mode, without gradients or KV cache, on its device.
        tokenizer: Its tokenizer.
        name: The name it was asked for by.
        architecture: Its class, such as ``LlamaForCausalLM``.
        config_sha256: Hash of its configuration, see :func:`hash_config`.
        weights_sha256: Hash of its stored weights, see :func:`hash_weights`.
        folder: The folder it was read from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    architecture: str
    config_sha256: str
    weights_sha256: str
    folder: Path


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> LoadedModel:
    """Load a causal language model with its tokenizer and hash its weights.

    Args:
        name: A folder, a name in ``EMBEDDED_MODELS``, or a hub id.
        dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the device multiplies it
            natively.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA if there is any.
        device_map: Spread over several devices instead, by ``accelerate``. Every weight must lie
            on one of them: none is left on disk, or in host memory beside GPUs.

    Returns:
        The frozen model.

    Raises:
        ValueError: No such model, dtype or device; a folder without configuration, safetensors or
            tokenizer; a damaged file; weights that are missing, already quantized, or not those of
            a causal language model that transformers knows; a device map without ``accelerate``,
            beside a device, of unknown ones, that splits a block or leaves weights off every
            device.
    """
    if device_map is not None:
        for place in check_device_map(device_map, device):
            resolve_device(place)
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    folder = find_model(name)
    config = read_config(folder)
    files = weight_files(folder)
    if device_map is not None:
        check_blocks(device_map, skeleton(folder))
    model = _load_weights(folder, chosen_dtype, device_map)
    tokenizer = load_tokenizer(folder)
    return LoadedModel(
        model=model.to(chosen_device) if device_map is None else model,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        name=name,
        architecture=type(model).__name__,
        config_sha256=hash_config(config),
        weights_sha256=hash_files(files, model),
        folder=folder,
    )


def find_model(name: str) -> Path:
    """Folder that holds a named model, after converting or downloading it where needed.

    Raises:
        ValueError: Neither a folder, an embedded model, nor a model that the hub supplies.
    """
    if name in EMBEDDED_MODELS:
        return prepare_embedded(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"expected the folder of a model, got the file {name!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the HTTP library beneath, and so its errors, change with versions
        raise ValueError(
            f"no model {name!r}: neither a folder, nor an embedded model "
            f"({', '.join(EMBEDDED_MODELS)}), nor a model that the hub supplies "
            f"({first_line(error)})"
        ) from error


def resolve_device(device: str) -> torch.device:
    """The device of a name: ``auto`` is CUDA if there is any.

    Raises:
        ValueError: An unknown name, or a device that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"expected the device auto, cpu, cuda or cuda:N, got {device!r}")
    num_devices = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= num_devices:
        raise ValueError(f"no device {device!r}: there are {num_devices} of its kind here")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of a name: ``auto`` is bfloat16 where the device multiplies it natively.

    Raises:
        ValueError: An unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise ValueError(f"expected the dtype auto, {' or '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def hash_config(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration as canonical JSON.

    Args:
        config: The content of config.json. Entries about running or writing the model are left
            out, and so are those whose name starts with an underscore.
    """
    kept = {
        key: value
        for key, value in config.items()
        if key not in _VOLATILE_KEYS and not key.startswith("_")
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the names, element types, shapes and bytes of tensors, in any order.

    Args:
        tensors: Names and tensors of any shape; each is let go before the next is asked for.
    """
    entries = sorted(
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _hash_bytes(tensor))
        for name, tensor in tensors
    )
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def hash_module(module: nn.Module) -> str:
    """Hash the parameters and saved buffers of any module as they are, tied ones once."""
    saved = module.state_dict().keys()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return hash_weights((name, tensor) for name, tensor in tensors if name in saved)


def _hash_bytes(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 rather than emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    # Before get_capabilities, torch offered the same tests under private names.
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name)() for name in tests if hasattr(torch.cpu, name))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        ValueError: There is none, it cannot be read, or it is of a quantized model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a model: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    if "quantization_config" in config:
        raise ValueError(f"{folder} is already quantized; start from its full-precision model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those its index lists, or the single one.

    Raises:
        ValueError: There are none, or some are missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        try:
            listed = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read {index}: not an index of weights ({error})") from error
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} is incomplete: {missing[0]} is missing")
        return [folder / name for name in listed]
    if single.is_file():
        return [single]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when read: "
            "save it as safetensors first"
        )
    raise ValueError(f"{folder} holds no weights: expected model.safetensors or its index")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ValueError: There is none that transformers can read.
    """
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{folder} has no tokenizer that transformers can read (is tokenizer.json there?): "
            f"{first_line(error)}"
        ) from error


def _load_weights(
    folder: Path, dtype: torch.dtype, device_map: DeviceMap | None = None
) -> PreTrainedModel:
    try:
        with quiet_transformers():
            from transformers import AutoModelForCausalLM

            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load {folder} as a causal language model: {first_line(error)}"
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["mismatched_keys"]:
        weight, stored, expected = min(report["mismatched_keys"])
        raise ValueError(
            f"{folder} does not fit its config.json: {weight} has the shape {tuple(stored)}, "
            f"expected {tuple(expected)}"
        )
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(absent)} weights of {type(model).__name__}, such as {absent[0]}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{folder} does not fit these devices: the device map leaves weights off the GPUs, "
            "on disk or in host memory; stream the model instead"
        )
    if report["unexpected_keys"]:
        spare = sorted(report["unexpected_keys"])
        logger.warning("%s: %d weights are not used, such as %s", folder, len(spare), spare[0])
    model.config.use_cache = False
    model.requires_grad_(False)
    model.train(False)
    return model


def hash_files(files: Iterable[Path], model: nn.Module) -> str:
    """Hash weights as stored; a tied one counts once, whichever of its names are stored."""
    first_names: dict[int, str] = {}
    aliases = {
        name: first_names.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }

    def stored() -> Iterator[tuple[str, Tensor]]:
        seen: set[str] = set()
        for path in files:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):
                    name = aliases.get(key, key)
                    if name not in seen:
                        seen.add(name)
                        yield name, file.get_tensor(key)

    return hash_weights(stored())


def first_line(error: Exception) -> str:
    """A foreign error's message, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def check_length(model: nn.Module, sequence_length: int) -> None:
    """Refuse sequences longer than a model has positions for.

    Raises:
        ValueError: Its configuration gives fewer positions.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and sequence_length > most:
        raise ValueError(
            f"the model reads at most {most} tokens at once: expected a --sequence-length of at "
            f"most that, got {sequence_length}"
        )

"""A model without weights, and where each of its weights lies in a checkpoint of safetensors.

The problem: a model larger than memory is built and read piece by piece. Buffers that a model
computes itself (rotary frequencies) are in no checkpoint and must be real from the start; weights
must be found under whatever of their names the checkpoint uses, once if they are tied; and what a
full load would convert on the way must be refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from objectives.loading import first_line, weight_files
from search_spaces.quiet import quiet_transformers


def empty_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The frozen causal language model of a folder: parameters on the meta device, buffers real.

    Args:
        folder: With a ``config.json``.
        dtype: Of the parameters.

    Raises:
        ValueError: Not a causal language model that transformers knows, or one that keeps some
            parameters in float32 whatever the dtype.
    """
    try:
        with quiet_transformers(), _weightless():
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"cannot build {folder} as a causal language model: {first_line(error)}"
        ) from error
    wide = [
        name
        for flag in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, flag, None) or ()
    ]
    if wide and dtype != torch.float32:
        raise ValueError(
            f"{type(model).__name__} keeps {wide[0]} in float32: stream it with the dtype float32"
        )
    model.config.use_cache = False  # type: ignore[union-attr]
    model.requires_grad_(False)
    return model.train(False)


@contextmanager
def _weightless() -> Iterator[None]:
    """Let every parameter that a module registers be a shape on the meta device."""

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(strip)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def find_decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path of the one list of blocks of a model, and the list.

    Raises:
        ValueError: There is none, or there are several.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [
        (name, blocks)
        for name, blocks in lists
        if len(blocks) and not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise ValueError(
            f"{type(model).__name__} cannot be streamed: its decoder must be one list of blocks, "
            f"found {names}"
        )
    return outer[0]


class Checkpoint:
    """The stored tensors of a model by the names that the model has for them.

    Args:
        folder: With one safetensors file or several and their index.
        model: Of the folder's configuration, without weights.

    Attributes:
        tied: For each distinct parameter, by its first name, all of its names.
        aliases: The first name of each name.
        empty: The meta parameter of each first name.
        buffers: Names of the buffers that are saved with the model.

    Raises:
        ValueError: Weights are missing, of another shape, or tied but different; or a file is
            damaged.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._folder = folder
        self.empty: dict[str, nn.Parameter] = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in self.empty.items()}
        self.aliases = {
            name: first[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.tied: dict[str, list[str]] = {name: [] for name in self.empty}
        for name, original in self.aliases.items():
            self.tied[original].append(name)
        saved = model.state_dict().keys()
        self.buffers = [name for name, _ in model.named_buffers() if name in saved]
        self._where = self._find(model)
        self._check_ties()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their first names, as stored; each is a view of its file until let go.

        Raises:
            ValueError: A file is damaged.
        """
        for name in names:
            path, key = self._where[name][0]
            yield name, self._open(path, key)

    def _find(self, model: nn.Module) -> dict[str, list[tuple[Path, str]]]:
        """File and key of each first name; where a tied one is stored twice, both."""
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        shapes = {name: tuple(p.shape) for name, p in self.empty.items()}
        shapes |= {name: tuple(model.get_buffer(name).shape) for name in self.buffers}
        known = self.aliases | {name: name for name in self.buffers}
        where: dict[str, list[tuple[Path, str]]] = {}
        for path in weight_files(self._folder):
            with self._reading(path), safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):
                    tries = (key, prefix + key, key.removeprefix(prefix))
                    name = next((known[found] for found in tries if found in known), None)
                    if name is None:
                        continue
                    stored = tuple(file.get_slice(key).get_shape())
                    if stored != shapes[name]:
                        raise ValueError(
                            f"{self._folder} does not fit its config.json: {name} has the shape "
                            f"{stored}, expected {shapes[name]}"
                        )
                    where.setdefault(name, []).append((path, key))
        if absent := sorted(shapes.keys() - where.keys()):
            raise ValueError(
                f"{self._folder} lacks {len(absent)} weights of {type(model).__name__} as the "
                f"model names them, such as {absent[0]}: what transformers renames or fuses while "
                "loading (experts stored apart) cannot be streamed"
            )
        return where

    def _check_ties(self) -> None:
        """Refuse a checkpoint whose tied weights differ: a full load would not tie them."""
        for name, places in self._where.items():
            for path, key in places[1:]:
                if not torch.equal(self._open(*places[0]), self._open(path, key)):
                    raise ValueError(
                        f"{self._folder}: {name} and {key} are tied by config.json but differ: "
                        "it cannot be streamed"
                    )

    def _open(self, path: Path, key: str) -> Tensor:
        # One file, one tensor: pages of a mapped file count as memory as long as it is open.
        with self._reading(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path}: {first_line(error)}") from error

"""Token batches in four disjoint splits, with content hashes.

The problem this file solves: a plan that was searched, chosen and reported on the same text proves
nothing. Statistics, search, guard and held-out tokens come from different documents; the guard's
decide, the held-out ones only report. Splits are filled in the order held-out, guard, search,
statistics, so that asking for more search text never changes the text that is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from objectives.tensor_file import write_tensors
from objectives.texts import load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("statistics", "search", "guard", "heldout")
"""What the tokens are for."""

_FILL_ORDER = ("heldout", "guard", "search", "statistics")


@dataclass(frozen=True)
class CalibrationRequest:
    """Which text, and how much of it for what.

    Attributes:
        source: What :func:`objectives.texts.load_documents` takes.
        sequence_length: Tokens of each sequence.
        num_statistics: Sequences for activation statistics, Hessians, gradients.
        num_search: Sequences that searches measure on.
        num_guard: Sequences that decide between the search's plan and the baselines.
        num_heldout: Sequences that only report.
        seed: Orders the documents, and so decides which split each lands in.
    """

    source: str
    sequence_length: int = 256
    num_statistics: int = 32
    num_search: int = 32
    num_guard: int = 16
    num_heldout: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        for name, count in self.num_sequences.items():
            if count < 1:
                raise ValueError(f"num_{name} must be at least 1, got {count}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def num_sequences(self) -> dict[str, int]:
        """Sequences of each split."""
        return {name: getattr(self, f"num_{name}") for name in SPLITS}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids of the four splits.

    Attributes:
        source: Where the text came from.
        splits: For each of ``SPLITS`` an int64 (num_sequences, sequence_length) tensor on the CPU.
    """

    source: str
    splits: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS):
            expected, got = ", ".join(SPLITS), ", ".join(self.splits) or "none"
            raise ValueError(f"expected the splits {expected}, got {got}")
        for name, tokens in self.splits.items():
            if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
                raise ValueError(
                    f"split {name!r}: expected int64 (num_sequences, sequence_length), "
                    f"got {str(tokens.dtype).removeprefix('torch.')} {tuple(tokens.shape)}"
                )
        self._refuse_shared_sequences()

    @classmethod
    def from_tensors(cls, splits: Mapping[str, Tensor], source: str = "tensors") -> Calibration:
        """Use token ids that were made elsewhere.

        Args:
            splits: For each of ``SPLITS`` an int64 (num_sequences, sequence_length) tensor.
            source: How to call them in plans and reports.

        Raises:
            ValueError: A split is missing, unknown, empty, of another type or shape, or two splits
                share a sequence.
        """
        copies = {name: tokens.detach().cpu().clone() for name, tokens in splits.items()}
        return cls(source, copies)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Content hash of each split."""
        return {name: hash_tokens(self.splits[name]) for name in SPLITS}

    def save(self, path: Path) -> None:
        """Write one safetensors file, which workers load by its path.

        Raises:
            ValueError: It cannot be written.
        """
        metadata = {"source": self.source, "hashes": json.dumps(self.hashes)}
        write_tensors(self.splits, path, metadata=metadata, what="the calibration tokens")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what :meth:`save` wrote and check its hashes.

        Raises:
            ValueError: Not such a file, or its tokens are not the ones that were saved.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                splits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the calibration tokens {path}: {error}") from error
        if not {"source", "hashes"} <= metadata.keys():
            raise ValueError(f"{path} holds no calibration tokens: it names no source and hashes")
        calibration = cls(metadata["source"], splits)
        if calibration.hashes != json.loads(metadata["hashes"]):
            raise ValueError(f"{path}: the tokens do not match their recorded hashes; rebuild it")
        return calibration

    def _refuse_shared_sequences(self) -> None:
        """Identical sequences in two splits would let a search see what reports are made on."""
        owner: dict[bytes, str] = {}
        for name in SPLITS:
            for row in self.splits[name].cpu().numpy():
                first = owner.setdefault(row.tobytes(), name)
                if first != name:
                    raise ValueError(f"splits {first!r} and {name!r} share a sequence")


def hash_tokens(tokens: Tensor) -> str:
    """sha256 of the token ids' shape and little-endian int64 bytes."""
    header = json.dumps(list(tokens.shape)).encode()
    return hashlib.sha256(header + tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def build_calibration(
    request: CalibrationRequest, tokenizer: PreTrainedTokenizerBase
) -> Calibration:
    """Read, shuffle and tokenize documents until the four splits are full.

    A document goes to one split only, and identical documents count once. The documents of a split
    are joined by the tokenizer's end-of-text token, where it has one, and cut into sequences. A
    tokenizer that opens every text with a token of its own does so with every sequence, since
    some models are lost without it.

    Args:
        request: Which text, and how much of it for what.
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: The source cannot be read, or is too short; then with the numbers.
    """
    texts = load_documents(request.source).texts
    # Two documents that differ in white space only are the same document.
    unique = list({" ".join(text.split()): text for text in texts}.values())
    order = np.random.default_rng(request.seed).permutation(len(unique))
    opening = _opening(tokenizer)
    body_length = request.sequence_length - len(opening)
    needed = {name: request.num_sequences[name] * body_length for name in _FILL_ORDER}
    documents = _tokenized((unique[i] for i in order), tokenizer)
    filled = {name: _take(documents, num_tokens) for name, num_tokens in needed.items()}
    if any(len(filled[name]) < needed[name] for name in needed):
        raise ValueError(_too_short(request, needed, filled, len(unique)))
    splits = {}
    for name in SPLITS:
        body = torch.tensor(filled[name][: needed[name]]).reshape(-1, body_length)
        start = torch.tensor(opening, dtype=torch.int64).expand(len(body), -1)
        splits[name] = torch.cat([start, body], dim=1)
    return Calibration(request.source, splits)


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text, mostly none or one."""
    marked = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(len(marked) - len(plain) + 1)
    return list(marked[: next(i for i in starts if marked[i : i + len(plain)] == plain)])


def _tokenized(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of one document after the other, each with its end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        yield [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]


def _take(documents: Iterator[list[int]], num_tokens: int) -> list[int]:
    """Tokens of whole documents until there are enough, or no more documents."""
    taken: list[int] = []
    while len(taken) < num_tokens and (document := next(documents, None)) is not None:
        taken.extend(document)
    return taken


def _too_short(
    request: CalibrationRequest,
    needed: Mapping[str, int],
    filled: Mapping[str, list[int]],
    num_documents: int,
) -> str:
    """What was found, what is needed in all and per split, and what to do about it."""
    found = sum(len(tokens) for tokens in filled.values())
    parts = ", ".join(
        f"{name} {min(len(filled[name]), needed[name])} of {needed[name]}" for name in needed
    )
    missing = " or ".join(name for name in needed if len(filled[name]) < needed[name])
    return (
        f"{request.source} is too short: its {num_documents} different documents hold {found} "
        f"tokens, {sum(needed.values())} are needed, and a document serves one split only "
        f"({parts}); ask for fewer {missing} sequences or shorter ones, or give more text"
    )

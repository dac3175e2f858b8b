"""What was measured: a fidelity (which tokens) and an evaluation (what came out). No torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from search_spaces.space import Assignment

SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True, order=True)
class Fidelity:
    """Which sequences of which split an assignment is measured on.

    Attributes:
        split: ``search``, ``guard`` or ``heldout``.
        first: Index of the first sequence; counting wraps around the split's end.
        count: Number of sequences.
        slopes: Whether :class:`Slopes` are read off too, for a backward pass.
    """

    split: str
    first: int
    count: int
    slopes: bool = False

    @property
    def num_passes(self) -> int:
        """Sequences sent through the model; a backward pass counts as two forwards."""
        return self.count * (3 if self.slopes else 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data; slopes are named only where they are asked for."""
        plain: dict[str, Any] = {"split": self.split, "first": self.first, "count": self.count}
        return plain | ({"slopes": True} if self.slopes else {})

    def indices(self, num_sequences: int) -> tuple[int, ...]:
        """The sequences' indices in a split of ``num_sequences``."""
        if not 1 <= self.count <= num_sequences:
            raise ValueError(f"fidelity asks for {self.count} of {num_sequences} sequences")
        return tuple((self.first + i) % num_sequences for i in range(self.count))


@dataclass(frozen=True)
class Slopes:
    """What the loss would do, to first order, if single units took other options.

    Rows are units, columns their options; a unit that has no weights (a cache) has an empty row.

    Attributes:
        nats: ``<dL/dW, W' - W>`` at the measured weights ``W`` for the option's weights ``W'``,
            loss per token, the mean over the sequences; 0 for the option that is measured.
        moves: ``|W' - W|^2`` over the larger of the squared errors of both options: 0 for the
            option that is measured and for one that makes the same weights, 1 for a step from or
            to the dense weights, near 2 between errors that have nothing to do with each other.
    """

    nats: tuple[tuple[float, ...], ...]
    moves: tuple[tuple[float, ...], ...]

    def kept(self, options: Sequence[Sequence[int]]) -> Slopes:
        """With these options of each unit alone."""
        return Slopes(_kept(self.nats, options), _kept(self.moves, options))


def _kept(
    rows: Sequence[Sequence[float]], options: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], ...]:
    pairs = zip(rows, options, strict=True)
    return tuple(tuple(row[i] for i in chosen) if row else () for row, chosen in pairs)


@dataclass(frozen=True)
class Evaluation:
    """Measured loss of a whole assignment at a fidelity. Losses: lower is better.

    Attributes:
        assignment: What was measured.
        fidelity: On which sequences.
        sequence_nats: (count,) mean loss per token of each sequence, nats, in the fidelity's order,
            rounded to six significant digits; empty when the evaluation failed.
        sequence_cross_entropy_nats: (count,) the same for cross-entropy; empty where the task has
            none.
        num_tokens: Tokens sent through the model; a backward pass counts as two forwards.
        num_block_tokens: The same summed over the blocks that had to run: what prefix reuse saves
            shows here. It depends on what was measured before, and is no part of the history.
        error: Why it failed, or ``None``.
        slopes: Where the fidelity asks for them.
    """

    assignment: Assignment
    fidelity: Fidelity
    sequence_nats: tuple[float, ...] = ()
    sequence_cross_entropy_nats: tuple[float, ...] = ()
    num_tokens: int = 0
    num_block_tokens: int = field(default=0, compare=False)
    error: str | None = None
    slopes: Slopes | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a finite loss."""
        return self.error is None

    @property
    def loss_nats(self) -> float:
        """Mean loss per token, rounded; infinite when failed."""
        return round_significant(mean(self.sequence_nats)) if self.ok else math.inf

    @property
    def standard_error_nats(self) -> float:
        """Standard error of the mean over sequences; 0 for a single sequence."""
        return standard_error(self.sequence_nats)

    @property
    def key(self) -> str:
        """Content address of what was measured."""
        return evaluation_key(self.assignment, self.fidelity)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        slopes = {} if self.slopes is None else {"slopes": asdict(self.slopes)}
        return {
            "assignment": list(self.assignment),
            "fidelity": self.fidelity.to_json(),
            "sequence_nats": list(self.sequence_nats),
            "sequence_cross_entropy_nats": list(self.sequence_cross_entropy_nats),
            "num_tokens": self.num_tokens,
            "num_block_tokens": self.num_block_tokens,
            "error": self.error,
            **slopes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_json` wrote."""
        return cls(
            tuple(data["assignment"]),
            Fidelity(**data["fidelity"]),
            tuple(data["sequence_nats"]),
            tuple(data["sequence_cross_entropy_nats"]),
            data["num_tokens"],
            data.get("num_block_tokens", 0),
            data["error"],
            _slopes(data["slopes"]) if "slopes" in data else None,
        )


def _slopes(data: Mapping[str, Any]) -> Slopes:
    nats, moves = (tuple(map(tuple, data[name])) for name in ("nats", "moves"))
    return Slopes(nats, moves)


def evaluation_key(assignment: Assignment, fidelity: Fidelity) -> str:
    """sha256 of the canonical JSON of an assignment and a fidelity."""
    text = json.dumps([list(assignment), fidelity.to_json()], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def round_significant(value: float) -> float:
    """Round to six significant digits, so that equal losses are equal on every worker."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def non_finite(named: Mapping[str, Iterable[float]]) -> str | None:
    """What is said of the first value that is no number, by its name; ``None`` if all are."""
    for name, values in named.items():
        for value in values:
            if not math.isfinite(value):
                return f"non-finite {name} {value}"
    return None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, correctly rounded."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))

"""Token accounts: what was sent through the model, by kind, in the journal and in the results.

Tokens are the currency that methods are compared in; block-tokens (tokens times the blocks they
went through) show what sharing forward passes saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from objectives.evaluation import Evaluation, Fidelity
from objectives.task import TokenMeter


class Records(Protocol):
    """The part of a journal that accounts and tables need."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was recorded so far."""
        ...

    def append(self, record: Mapping[str, Any]) -> None:
        """Record one thing durably."""
        ...


@dataclass(frozen=True)
class Spent:
    """Forward tokens by kind; a backward counts as two.

    Attributes:
        tokens: Tokens by kind, sorted.
        block_tokens: The same summed over the blocks that had to run.
    """

    tokens: dict[str, int]
    block_tokens: dict[str, int]


@contextmanager
def spending(meter: TokenMeter, records: Records, purpose: str) -> Iterator[None]:
    """Record the tokens of each kind that are spent inside, if any, also where it fails.

    Args:
        meter: Counts them.
        records: The journal.
        purpose: What they are spent on; a pass that a crash made a run repeat keeps its own.
    """
    before, blocks_before = meter.counts.copy(), meter.block_counts.copy()
    try:
        yield
    finally:
        spent = meter.counts - before
        blocks = meter.block_counts - blocks_before
        if spent:
            counts = {"counts": dict(spent), "block_counts": {kind: blocks[kind] for kind in spent}}
            records.append({"type": "tokens", "purpose": purpose} | counts)


def recorded_evaluations(records: Iterable[Mapping[str, Any]]) -> dict[str, Evaluation]:
    """One per key: the last, which supersedes a failed one that was tried again."""
    found = (Evaluation.from_json(r["evaluation"]) for r in records if r["type"] == "evaluation")
    return {evaluation.key: evaluation for evaluation in found}


def inherited_evaluations(records: Iterable[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    """Measurements of an earlier run that a journal carries."""
    for record in records:
        if record["type"] == "warm_start":
            return tuple(Evaluation.from_json(data) for data in record["evaluations"])
    return ()


def recorded_tokens(records: Records, *, of: str = "counts") -> dict[str, int]:
    """What stages other than measurements recorded, by kind.

    Args:
        records: The journal.
        of: ``counts`` or ``block_counts``; journals before the latter have none.
    """
    totals = Counter[str]()
    for record in records.records:
        if record["type"] == "tokens":
            totals.update(record.get(of, {}))
    return dict(totals)


def undisturbed_tokens(records: Records) -> dict[str, int]:
    """As :func:`recorded_tokens`, a pass that a crash made the run repeat counted once."""
    passes: dict[tuple[str, str], int] = {}
    for record in records.records:
        if record["type"] == "tokens":
            for kind, count in record["counts"].items():
                key = record.get("purpose", ""), kind
                passes[key] = max(passes.get(key, 0), count)
    totals = Counter[str]()
    for (_, kind), count in passes.items():
        totals[kind] += count
    return dict(totals)


def all_spent(records: Records, evaluations: Iterable[Evaluation]) -> Spent:
    """Tokens by kind of a whole run, repeated measurements counted once."""
    tokens, blocks = recorded_tokens(records), recorded_tokens(records, of="block_counts")
    for evaluation in {e.key: e for e in evaluations}.values():
        for kind, share in _shares(evaluation.fidelity):
            tokens[kind] = tokens.get(kind, 0) + round(share * evaluation.num_tokens)
            blocks[kind] = blocks.get(kind, 0) + round(share * evaluation.num_block_tokens)
    return Spent(dict(sorted(tokens.items())), dict(sorted(blocks.items())))


def _shares(fidelity: Fidelity) -> list[tuple[str, float]]:
    """The kinds of tokens that a measurement spends, and the share of each."""
    forward = fidelity.count / fidelity.num_passes
    if forward == 1:
        return [(fidelity.split, 1.0)]
    return [(fidelity.split, forward), (f"{fidelity.split}_backward", 1 - forward)]

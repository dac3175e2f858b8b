"""Budgets as users write them, resolved to exact bytes before anything is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from search_spaces.space import SearchSpace

_SUFFIX_BYTES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_PATTERN = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(bpw|%|(?:[kmgt]i?)?b|)\s*$", re.IGNORECASE)
_GROUPED = re.compile(r"^\s*[0-9]{1,3}(,[0-9]{3})+\s*$")
_HELP = "write 90MB, 2.5GiB, 123456789, 3.25bpw or 40%"


@dataclass(frozen=True)
class Budget:
    """A budget resolved for one space.

    Attributes:
        text: As the user wrote it.
        stored_bytes: Most bytes of the whole stored model, header and fixed tensors included.
        searched_bytes: Most payload bytes of the searched units.
    """

    text: str
    stored_bytes: int
    searched_bytes: int


def parse_budgets(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of budgets, check every word and drop repeated ones.

    Raises:
        ValueError: Nothing is given, or a word is not a budget.
    """
    if _GROUPED.match(text):
        raise ValueError(f"{text!r}: write bytes without commas, which part budgets")
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError(f"expected a budget, got {text!r}; {_HELP}")
    for word in words:
        _parse(word)
    return words


def resolve_budget(text: str, space: SearchSpace) -> Budget:
    """The exact bytes of a budget word.

    Bits per weight speak of the searched weights with all their metadata, and a cache that is not
    up for choice comes on top; bytes and percentages speak of the whole stored model and of its
    cache. Fractions of a byte are rounded down.

    Raises:
        ValueError: Not a budget word, bits per weight where caches are up for choice, or below the
            cheapest assignment of the space; the message has the least and the most achievable.
    """
    amount, unit = _parse(text)
    menus = zip(space.units, space.menus, strict=True)
    caches = [menu for entry, menu in menus if entry.is_cache]
    if unit == "BPW":
        if any(len(menu) > 1 for menu in caches):
            raise ValueError(
                f"the budget {text} says nothing of the cache, which {space.name} searches too; "
                "give bytes or per cent"
            )
        searched = int(amount * space.num_weights / 8) + sum(menu[0].bytes for menu in caches)
        stored = searched + space.overhead_bytes
    else:
        if unit == "%":
            stored = int(amount * dense_bytes(space) / 100)
        else:
            stored = int(amount * _SUFFIX_BYTES[unit])
        searched = stored - space.overhead_bytes
    if searched < space.least_bytes:
        least, most = space.least_bytes, space.most_bytes
        overhead = space.overhead_bytes
        bits = (
            f"{space.bits_per_weight(least):.4g} to {space.bits_per_weight(most):.4g} bits per "
            "searched weight"
        )
        searches = f"{least:,} to {most:,} of weights and caches" if caches else bits
        raise ValueError(
            f"the budget {text} ({stored:,} bytes) cannot be met: {space.name} stores between "
            f"{least + overhead:,} and {most + overhead:,} bytes, that is {searches} plus "
            f"{overhead:,} bytes that are not searched; raise the budget or offer cheaper options"
        )
    return Budget(text, stored, searched)


def dense_bytes(space: SearchSpace) -> int:
    """Bytes of everything at 16 bits, searched caches and the header's bound included."""
    searched = sum(member.num_weights for unit in space.units for member in unit.members)
    return 2 * searched + space.overhead_bytes


def _parse(text: str) -> tuple[Fraction, str]:
    match = _PATTERN.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a budget; {_HELP}")
    amount, unit = Fraction(match[1]), match[2].upper()
    if amount == 0:
        raise ValueError(f"the budget {text!r} is zero; {_HELP}")
    return amount, unit

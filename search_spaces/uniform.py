"""What every allocation is compared with: the same operator everywhere."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from search_spaces.operators import AnyOperator

if TYPE_CHECKING:
    from search_spaces.space import Assignment, SearchSpace


def uniform(space: SearchSpace, searched_bytes: int) -> Assignment | None:
    """The dearest assignment within a payload budget that treats all unpinned units alike.

    All weights share one operator, and so do all caches: of pairs that fit, the one whose harder
    compressed half keeps the largest share of its bytes. Pinned units keep their pin.

    Args:
        space: Units and menus.
        searched_bytes: Most bytes of all units together.

    Returns:
        The option of each unit; ``None`` when nothing shared fits that leaves the units any byte.
    """
    choices = [_shared(space, cache=cache) for cache in (False, True)]
    found = [_all(space, pair) for pair in product(*choices)]
    sizes = [(space.bytes(a) - space.cache_bytes(a), space.cache_bytes(a)) for a in found]
    most = [max(column) or 1 for column in zip(*sizes, strict=True)]
    fitting = [
        (min(part / whole for part, whole in zip(size, most, strict=True)), sum(size), place)
        for place, size in enumerate(sizes)
        if sum(size) <= searched_bytes
    ]
    return found[max(fitting)[-1]] if fitting else None


def _shared(space: SearchSpace, *, cache: bool) -> list[AnyOperator | None]:
    """Operators that all unpinned units of one sort offer, but for those that drop a unit.

    A single ``None`` where there are no such units.
    """
    kinds = zip(space.units, space.menus, strict=True)
    free = [menu for unit, menu in kinds if unit.is_cache == cache and len(menu) > 1]
    if not free:
        return [None]
    common = set.intersection(*({o.operator for o in menu} for menu in free))
    return [o.operator for o in free[0] if o.operator in common and o.bytes]


def _all(space: SearchSpace, operators: tuple[AnyOperator | None, ...]) -> Assignment:
    """Every unpinned unit with the (weights', caches') operator."""
    return tuple(
        0 if len(menu) == 1 else [o.operator for o in menu].index(operators[unit.is_cache])  # type: ignore[arg-type]
        for unit, menu in zip(space.units, space.menus, strict=True)
    )

"""Searches on the measured loss, by name. One more is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from allocator.searches.base import Search, SearchSetting
from allocator.searches.cma import CMA
from allocator.searches.evolution import Evolution
from allocator.searches.formula import FormulaSearch
from allocator.searches.gp import GP
from allocator.searches.model_guided import ModelGuided
from allocator.searches.nsga import NSGA2, NSGA3
from allocator.searches.options import Scalar, configured, split_options
from allocator.searches.optspa import Optspa
from allocator.searches.portfolio import Portfolio
from allocator.searches.random_search import RandomSearch
from allocator.searches.surrogate_nsga2 import SurrogateNSGA2
from allocator.searches.tpe import TPE
from search_spaces.registry import Registry
from search_spaces.space import SearchSpace

_SEQUENCES = 4  # of an evaluation, where a search has no wish of its own

NO_OPTIONS: Mapping[str, Scalar] = MappingProxyType({})

SearchFactory = Callable[..., Search]
"""A search class: made from a setting alone, its options have defaults; see ``options``."""

SEARCHES: Registry[SearchFactory] = Registry(
    "search",
    {
        "cma": CMA,
        "evolution": Evolution,
        "formula": FormulaSearch,
        "gp": GP,
        "model_guided": ModelGuided,
        "nsga2": NSGA2,
        "nsga3": NSGA3,
        "optspa": Optspa,
        "random": RandomSearch,
        "surrogate_nsga2": SurrogateNSGA2,
        "tpe": TPE,
    },
    entry_point_group="model_allocator.searches",
)


def search_names(name: str) -> list[str]:
    """One name, or several with commas between them, as a list.

    Raises:
        ValueError: An unknown name, or one that is given twice.
    """
    names = [part.strip() for part in name.split(",")]
    for part in names:
        SEARCHES[part]
    if len(set(names)) != len(names):
        raise ValueError(f"a portfolio of different searches was expected, got {name!r}")
    return names


def preferred_sequences(name: str) -> int:
    """Sequences per evaluation that a search, or the most demanding of several, does best with."""
    searches = (SEARCHES[part] for part in search_names(name))
    return max(getattr(search, "preferred_sequences", _SEQUENCES) for search in searches)


def needs_importances(name: str) -> bool:
    """Whether a search, or any of several, reads samples of the weights' importances."""
    searches = (SEARCHES[part] for part in search_names(name))
    return any(getattr(search, "needs_importances", False) for search in searches)


def refuse_caches(name: str, space: SearchSpace) -> None:
    """Refuse a space with caches for a search, or any of several, that reads weights.

    Raises:
        ValueError: There is a cache, which has none.
    """
    for part in search_names(name):
        if space.has_caches and needs_importances(part):
            raise ValueError(
                f"search {part} reads the weights of every unit, and caches in this space have "
                "none; search the weights alone or take another search"
            )


def check_latencies(name: str) -> None:
    """Refuse latencies where a search, or any of several, minimises loss and bytes alone.

    Raises:
        ValueError: It does, or a name is unknown.
    """
    for part in search_names(name):
        if not getattr(SEARCHES[part], "minimises_latency", False):
            able = [n for n in SEARCHES if getattr(SEARCHES[n], "minimises_latency", False)]
            raise ValueError(
                f"--latencies is for searches that minimise latency too: {' or '.join(able)}; "
                f"{part} does not"
            )


def check_options(name: str, options: Mapping[str, Scalar]) -> None:
    """Refuse options that the search of a name, or each of several, does not have.

    Raises:
        ValueError: An unknown name, an unknown option, or a value that it cannot take.
    """
    _parameters(search_names(name), options)


def _parameters(names: list[str], options: Mapping[str, Scalar]) -> dict[str, dict[str, Any]]:
    """What each search is made with besides its setting."""
    split = split_options(names, options)
    return {part: configured(part, SEARCHES[part], split[part]) for part in names}


def make_search(
    name: str, setting: SearchSetting, options: Mapping[str, Scalar] = NO_OPTIONS
) -> Search:
    """The search of a name, or a portfolio of several: ``model_guided,evolution``.

    Args:
        name: One name of ``SEARCHES``, or several with commas between them.
        setting: What to search.
        options: Of the search by name; of several with the search's name before a dot.

    Raises:
        ValueError: An unknown name or option, one that is given twice, or a setting that a search
            refuses.
    """
    names = search_names(name)
    made = _parameters(names, options)
    searches = [SEARCHES[part](setting, **made[part]) for part in names]
    return searches[0] if len(names) == 1 else Portfolio(searches, setting.num_sequences)

"""Searches on the measured loss, by name. One more is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from allocator.searches.base import Search, SearchSetting
from allocator.searches.evolution import Evolution
from allocator.searches.model_guided import ModelGuided
from allocator.searches.random_search import RandomSearch
from allocator.searches.tpe import TPE
from search_spaces.registry import Registry

SearchFactory = Callable[[SearchSetting], Search]
"""A search class: made from a setting alone, its options have defaults."""

SEARCHES: Registry[SearchFactory] = Registry(
    "search",
    {
        "evolution": Evolution,
        "model_guided": ModelGuided,
        "random": RandomSearch,
        "tpe": TPE,
    },
    entry_point_group="model_allocator.searches",
)

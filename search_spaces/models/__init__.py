"""From a model to its units."""

from search_spaces.models.discover import Discovery, discover
from search_spaces.models.skeleton import skeleton

__all__ = ["Discovery", "discover", "skeleton"]

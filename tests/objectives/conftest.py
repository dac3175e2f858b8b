"""Tiny models of every family live with the tests of the search spaces."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "search_spaces"))  # tiny_models

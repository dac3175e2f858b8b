"""The helpers of the folder above, and the tiny models of the search spaces."""

import sys
from pathlib import Path

for folder in (Path(__file__).parents[1], Path(__file__).parents[2] / "search_spaces"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

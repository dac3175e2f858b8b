"""Imported by the fork server of test_resume: what every run imports, once for all of them."""

from cli_runs import MODEL

import allocator.runner  # noqa: F401
from search_spaces.models import skeleton

skeleton(MODEL)

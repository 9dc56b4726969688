"""How many generated cases a test tries: few in `make test`, all in `make test-all` (LAB_TEST_FULL=1)."""

from __future__ import annotations

import os


def cases(quick: int, full: int) -> int:
    """`full` in `make test-all`, else `quick`."""
    return full if os.environ.get("LAB_TEST_FULL") == "1" else quick

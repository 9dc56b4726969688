"""Waits for a state, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.report import BenchError


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Call `true` every 2 ms until it returns True. Raises BenchError after `seconds`."""
    end = time.perf_counter() + seconds
    while not true():
        if time.perf_counter() > end:
            raise BenchError(f"it did not happen within {seconds:.0f} s")
        time.sleep(0.002)

"""A watchdog over the steps of one thread: it reports the first step that hangs.

A thread cannot be ended, but its callers need not wait for it, and its process can be replaced. Knows only time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Watchdog:
    """timeout: seconds after which a step hangs. on_hang: called once, in the watchdog's thread, with `lock` held and
    the reason; `hangs` is true from then on. The watched thread checks `hangs` after each step and ends."""

    def __init__(self, name: str, timeout: float, lock: threading.Condition, on_hang: Callable[[str], None]) -> None:
        self._name, self._timeout, self._lock, self._on_hang = name, timeout, lock, on_hang
        self._ended = threading.Event()
        self._began: float | None = None  # time.monotonic() of the running step
        self.hangs = False

    def start(self) -> None:
        threading.Thread(target=self._watch, name=f"{self._name} watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def begin(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The step has ended."""
        self._began = None

    def _watch(self) -> None:
        while not self._ended.wait(self._timeout / 4):
            with self._lock:
                began = self._began
                if began is None or time.monotonic() - began < self._timeout:
                    continue
                self.hangs = True
                log.error("a step of %s has not ended within %g s; all requests fail", self._name, self._timeout)
                self._on_hang(f"a step did not end within {self._timeout:g} s")
            return

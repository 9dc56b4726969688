"""When an upstream that fails is left alone for a while, so that callers hear at once what they would hear late.

Counts calls and failures. Knows nothing of HTTP, nor of what a failure is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 10
LEAST_CALLS = 20  # in the window: below it one bad minute of a quiet night would shut the door
OPEN_RATIO = 0.5
PROBE_SECONDS = 5.0  # one call in so long is let through while it is open


class CircuitBreaker:
    """Closed: all calls go. Open: one in PROBE_SECONDS goes, and the first that succeeds closes it.

    A call that began before the breaker opened or closed tells of another time: its end is not counted.
    """

    def __init__(self, on_open: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_open = on_open
        self._clock = clock
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW_SECONDS)  # [second, calls, failures]
        self._probe_at: float | None = None  # None: closed
        self._turn = 0  # counts openings and closings

    @property
    def is_open(self) -> bool:
        return self._probe_at is not None

    def wait(self) -> float:
        """Seconds until the next call may go: 0.0 where one may now, and then the caller makes it."""
        if self._probe_at is None:
            return 0.0
        now = self._clock()
        if now < self._probe_at:
            return self._probe_at - now
        self._probe_at = now + PROBE_SECONDS
        return 0.0

    def began(self) -> int:
        """What the call's end is to be told with."""
        return self._turn

    def succeeded(self, began: int) -> None:
        if began != self._turn:
            return
        if self._probe_at is not None:
            self._probe_at = None
            self._turn += 1
            self._seconds.clear()
            return
        self._now()[1] += 1

    def failed(self, began: int, *, answered: bool = False) -> None:
        """`answered`: the call was counted as a success when its answer began, and broke later."""
        if began != self._turn or self._probe_at is not None:
            return
        second = self._now()
        second[1] += not answered
        second[2] += 1
        oldest = second[0] - WINDOW_SECONDS
        counted = [each for each in self._seconds if each[0] > oldest]
        calls, failures = sum(each[1] for each in counted), sum(each[2] for each in counted)
        if calls >= LEAST_CALLS and failures >= OPEN_RATIO * calls:
            self._probe_at = self._clock() + PROBE_SECONDS
            self._turn += 1
            self._on_open()

    def _now(self) -> list[int]:
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        return self._seconds[-1]

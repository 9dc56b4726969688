"""Circuit breaker: a failing upstream gets no calls for a while, so that callers get their error at once.

Counts calls and failures. Knows nothing of HTTP, nor of what counts as a failure.
"""

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 10
LEAST_CALLS = 20  # in the window: with fewer calls a few failures must not open it
OPEN_RATIO = 0.5
PROBE_SECONDS = 5.0  # interval of probes while it is open


class CircuitBreaker:
    """Closed: all calls pass. Open: one call in PROBE_SECONDS passes, and the first success closes the breaker. A call
    that began before the breaker opened or closed is not counted."""

    def __init__(self, on_open: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_open = on_open
        self._clock = clock
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW_SECONDS)  # [second, calls, failures]
        self._probe_at: float | None = None  # None: closed
        self._period = 0  # counts openings and closings

    @property
    def is_open(self) -> bool:
        return self._probe_at is not None

    def wait(self) -> float:
        """Seconds until the next call may go; 0.0: now, and then the caller must make it."""
        if self._probe_at is None:
            return 0.0
        now = self._clock()
        if now < self._probe_at:
            return self._probe_at - now
        self._probe_at = now + PROBE_SECONDS
        return 0.0

    def began(self) -> int:
        """The current period, to be passed to `succeeded` or `failed` at the call's end."""
        return self._period

    def succeeded(self, began: int) -> None:
        if began != self._period:
            return
        if self._probe_at is not None:
            self._probe_at = None
            self._period += 1
            self._seconds.clear()
            return
        self._now()[1] += 1

    def failed(self, began: int, *, answered: bool = False) -> None:
        """`answered`: the call was counted as a success at its answer's first byte, and broke later."""
        if began != self._period or self._probe_at is not None:
            return
        second = self._now()
        second[1] += not answered
        second[2] += 1
        oldest = second[0] - WINDOW_SECONDS
        counted = [each for each in self._seconds if each[0] > oldest]
        calls, failures = sum(each[1] for each in counted), sum(each[2] for each in counted)
        if calls >= LEAST_CALLS and failures >= OPEN_RATIO * calls:
            self._probe_at = self._clock() + PROBE_SECONDS
            self._period += 1
            self._on_open()

    def _now(self) -> list[int]:
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        return self._seconds[-1]

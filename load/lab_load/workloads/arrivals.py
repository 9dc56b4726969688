"""Arrival times of an open loop: a renewal process (Poisson or gamma) whose rate follows a shape over the run."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable

STEP = 0.01  # seconds between grid points at which the rate is summed

# Shape -> rate at a share 0…1 of the run, as a multiple of LOAD_RATE.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "ramp": lambda share: share,
    "spike": lambda share: 4.0 if 0.45 <= share < 0.55 else 1.0,
    "diurnal": lambda share: 1 - 0.8 * math.cos(2 * math.pi * share),  # one day in one run
}


def arrivals(rate: float, seconds: float, *, shape: str, burstiness: float, seed: int) -> list[float]:
    """Arrival times in seconds after the start, in ascending order.

    Gaps of a unit-rate gamma process with shape 1 / `burstiness` are stretched by the summed rate (time rescaling).
    `burstiness` is the squared coefficient of variation of the gaps: 1 is Poisson, more is burstier, 0 is even.
    """
    chosen = random.Random(f"arrivals/{seed}")  # noqa: S311 reproducible, not secret
    steps = max(1, math.ceil(seconds / STEP))
    summed = [0.0]
    for step in range(steps):
        summed.append(summed[-1] + rate * SHAPES[shape]((step + 0.5) / steps) * seconds / steps)
    found: list[float] = []
    reached = 0.0
    while True:
        reached += chosen.gammavariate(1 / burstiness, burstiness) if burstiness > 0 else 1.0
        if reached >= summed[-1]:
            return found
        place = bisect.bisect_right(summed, reached) - 1
        within = (reached - summed[place]) / (summed[place + 1] - summed[place])
        found.append((place + within) * seconds / steps)

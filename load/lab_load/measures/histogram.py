"""Mergeable histograms of times (HdrHistogram), and the number of samples that a percentile needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped] # it ships no types

MICROSECONDS = 1_000_000
LONGEST = 3_600 * MICROSECONDS
DIGITS = 3  # significant digits: each value is stored within 0.1 %
SAMPLES = {"p50": 1, "p95": 200, "p99": 1_000}  # samples that each percentile needs


class Times:
    """Histogram of times in seconds, stored in microseconds. Histograms of several processes or runs can be added."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self._histogram = HdrHistogram(1, LONGEST, DIGITS)
        self._largest = self._sum = 0.0
        for value in seconds:
            self.add(value)

    def add(self, seconds: float) -> None:
        self._histogram.record_value(min(max(round(seconds * MICROSECONDS), 1), LONGEST))
        self._largest = max(self._largest, seconds)
        self._sum += seconds

    @property
    def count(self) -> int:
        return int(self._histogram.get_total_count())

    def percentile(self, name: str) -> float | None:
        """`p50`, `p95` or `p99` in seconds; None with too few samples for it."""
        if self.count < SAMPLES[name]:
            return None
        return float(self._histogram.get_value_at_percentile(float(name[1:]))) / MICROSECONDS

    def figures(self) -> dict[str, Any]:
        """Count, mean, percentiles, largest value, and the histogram itself (base64), to merge with others."""
        if not self.count:
            return {"count": 0}
        return {
            "count": self.count, "mean": self._sum / self.count,
            **{name: self.percentile(name) for name in SAMPLES},
            "max": self._largest, "histogram": self._histogram.encode().decode(),
        }  # fmt: skip

    @classmethod
    def merge(cls, encoded: Iterable[str]) -> Times:
        """The sum of histograms from `figures`. The largest value and the mean are then exact within 0.1 %."""
        merged = cls()
        for each in encoded:
            merged._histogram.add(HdrHistogram.decode(each.encode()))
        merged._largest = merged._histogram.get_max_value() / MICROSECONDS
        merged._sum = merged._histogram.get_mean_value() / MICROSECONDS * merged.count
        return merged

    def cumulative(self, points: int = 200) -> list[tuple[float, float]]:
        """(seconds, share of the samples up to this time), for a chart."""
        total = self.count
        values = [(self._histogram.get_value_at_percentile(100 * k / points) / MICROSECONDS, k / points)
                  for k in range(points + 1)] if total else []  # fmt: skip
        return list(dict(values).items())

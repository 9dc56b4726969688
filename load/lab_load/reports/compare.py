"""Compares two groups of runs of one workload, paired by request: difference of medians with a bootstrap interval.

The bootstrap resamples the requests and the runs of each group, because runs differ too.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPEATS = 3  # least number of runs in a group; fewer do not show how runs differ
DRAWS = 1000
MOST_PAIRS = 1000  # requests to compare; if there are more, a sample of them
FIELDS = {"ttft": "TTFT", "e2e": "end to end", "tpot": "TPOT"}

Values = dict[int, float]  # number of the request -> seconds


@dataclass(frozen=True)
class Difference:
    """B minus A in seconds: median of the pairs, and its 95 % interval."""

    field: str
    pairs: int
    median: float
    low: float
    high: float
    a: float  # medians
    b: float
    repeats: int

    @property
    def verdict(self) -> str:
        if self.repeats < REPEATS:
            return f"undecided: {self.repeats} of {REPEATS} runs on each side"
        return "B is slower" if self.low > 0 else "B is faster" if self.high < 0 else "undecided"


def sha_of(folder: Path) -> dict[str, str]:
    """Scenario -> SHA-256 of its workload. Raises ValueError if the folder has no finished run."""
    try:
        results = json.loads((folder / "summary.json").read_text("utf-8"))["results"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{folder} is not the folder of a finished run") from None
    return {name: figures["workload"]["sha256"] for name, figures in results.items()}


def differences(a: Sequence[Path], b: Sequence[Path]) -> list[Difference]:
    """Differences for each metric. Raises ValueError for runs of different workloads, and if the groups share no
    request."""
    shas = [sha_of(folder) for folder in [*a, *b]]
    if any(sha != shas[0] for sha in shas):
        raise ValueError("the runs have different workloads (SHA-256); only runs of one workload file can be compared")
    found = []
    for field in FIELDS:
        left, right = [_values(folder, field) for folder in a], [_values(folder, field) for folder in b]
        both = set.intersection(*(set(values) for values in [*left, *right]))
        if both:
            found.append(bootstrap(field, left, right, sorted(both)))
    if not found:
        raise ValueError("no request was answered in all of these runs (warm-up and cool-down do not count)")
    return found


def bootstrap(field: str, a: Sequence[Values], b: Sequence[Values], numbers: Sequence[int]) -> Difference:
    """The difference for one metric. `numbers`: requests that were answered in all runs."""
    chosen = random.Random(7)  # noqa: S311 reproducible, not secret
    sample = list(numbers) if len(numbers) <= MOST_PAIRS else chosen.sample(list(numbers), MOST_PAIRS)

    def median(left: Sequence[Values], right: Sequence[Values], of: Sequence[int]) -> float:
        return statistics.median(
            statistics.fmean(run[number] for run in right) - statistics.fmean(run[number] for run in left)
            for number in of
        )

    drawn = sorted(
        median(chosen.choices(a, k=len(a)), chosen.choices(b, k=len(b)), chosen.choices(sample, k=len(sample)))
        for _ in range(DRAWS)
    )
    return Difference(
        field, len(sample), median(a, b, sample), drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1],
        statistics.median(run[number] for run in a for number in sample),
        statistics.median(run[number] for run in b for number in sample), min(len(a), len(b)),
    )  # fmt: skip


def _values(folder: Path, field: str) -> Values:
    """Values of requests that succeeded, without warm-up and cool-down."""
    found: Values = {}
    for line in (folder / "records.jsonl").read_text("utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        if record["steady"] and not record["error"] and not record["abandoned"] and record[field] is not None:
            found[record["number"]] = record[field]
    return found

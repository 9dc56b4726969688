"""The load page: runs of the load service. Knows the formats of its API (docs/load.md); does not draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .answer import Fault
from .proxy import Proxy, Reply
from .settings import Settings

WORKLOADS = ("throughput", "caching", "stampede", "prefix", "sessions", "lengths", "abandoned", "slow", "embeddings",
             "tasks", "garbage")  # fmt: skip
MAX_USERS, MAX_SECONDS = 64, 180
SERIES = ("tokens_per_second", "ttft_p50", "hit_ratio", "queue")  # fields of a progress line; each has a chart


def call(proxy: Proxy, settings: Settings, method: str, path: str, *, key: str | None,
         body: Mapping[str, Any] | None = None) -> Reply | Fault:  # fmt: skip
    """One request to the load service."""
    return proxy.call(method, path, key, body=body, seconds=settings.status_timeout_seconds, base=settings.load_url)


@dataclass(frozen=True)
class Finished:
    """A finished run. `requests`, `tokens`: per second. `ttft`, `e2e`: medians in seconds, None without enough samples.
    `hit_ratio`: None if nothing was cached."""

    name: str
    workload: str
    sha256: str
    trusted: bool
    sums_hold: bool
    requests: float
    tokens: float
    ttft: float | None
    e2e: float | None
    hit_ratio: float | None


def read_finished(summary: Mapping[str, Any]) -> Finished | None:
    """The figures in summary.json of a run with one workload; None for other runs and other versions of the file."""
    try:
        ((workload, figures),) = summary["results"].items()
        metrics = figures["metrics"]
        return Finished(
            str(summary["name"]), workload, str(figures["workload"]["sha256"]), bool(summary["trusted"]),
            bool(summary["sums"]["holds"]), float(figures["requests_per_second"]),
            float(figures["output_tokens_per_second"]), metrics["ttft_seconds"].get("p50"),
            metrics["end_to_end_seconds"].get("p50"), (figures.get("hit_ratio") or {}).get("measured"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def series(progress: list[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(seconds since the start, value) of each progress line that has the value."""
    return [
        (float(line["seconds"]), float(line[name]))
        for line in progress
        if isinstance(line.get(name), int | float) and isinstance(line.get("seconds"), int | float)
    ]


def replicas(progress: list[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """(second of the run, answers in that second, replica), for each replica that answered at all."""
    found = [(line["seconds"], line["replicas"]) for line in progress
             if isinstance(line.get("replicas"), Mapping) and isinstance(line.get("seconds"), int | float)]  # fmt: skip
    names = sorted({str(name) for _, counts in found for name in counts})
    return [
        (float(second), float(count), name)
        for second, counts in found
        for name in names
        if isinstance(count := counts.get(name, 0), int | float)
    ]


def ratio(a: float | None, b: float | None) -> float | None:
    """Relative change from `a` to `b`: b / a - 1."""
    return None if a is None or b is None or a == 0 else b / a - 1

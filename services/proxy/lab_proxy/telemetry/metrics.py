"""What /metrics tells: requests, tokens, times, upstreams, redis, limits; of one process, or of all workers together.

Plain numbers in dictionaries while requests run; prometheus_client writes them out when somebody asks. Names of models
and upstreams, reasons, counts and times; never a prompt, an answer or a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.samples import Exemplar

from .record import RequestRecord

MOST_MODELS = 200  # names that are told apart: a caller may invent any number of them
MOST_SERIES = 5_000  # of one family: beyond it new combinations of labels are not kept
SHARE_SECONDS = 0.5  # how old another worker's numbers may be
OPENMETRICS = "application/openmetrics-text"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

_BY = ("route", "model", "cache")
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests answered.", (*_BY, "status")),
    "tokens": ("Tokens of answers, by where they came from.", ("model", "source", "kind")),
    "redis_errors": ("Operations that redis failed.", ("operation",)),
    "upstream_calls": ("Calls that upstreams really got, retries among them.", ("upstream", "outcome")),
    "upstream_retries": ("Calls that repeated a failed one.", ("upstream",)),
    "fallbacks": ("Answers that another upstream gave than the one that was asked for.", ("upstream", "answered")),
    "breaker_opened": ("How often a breaker opened.", ("upstream",)),
    "reconciled": ("Calls that broke off, by whether the model told what they used.", ("outcome",)),
    "limits_refused": ("Requests that a limit refused.", ("reason",)),
    "reloads": ("Files read anew while the proxy ran.", ("file", "outcome")),
}
_TIMES: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "request": ("Time to the end of the answer.", _BY, _SECONDS),
    "ttft": ("Time to the first token of a stream.", _BY, _SECONDS),
    "upstream": ("Time that a request waited for upstreams.", _BY, _SECONDS),
    "overhead": ("Time of a request that was not waiting for upstreams: the proxy's own.", _BY, _SHORT),
    "redis": ("Time of one round trip to redis.", ("operation",), _SHORT),
}
_GAUGES: dict[str, tuple[str, tuple[str, ...], Callable[[Iterable[float]], float]]] = {
    "in_flight": ("Requests being answered.", (), sum),
    "draining": ("1 while the proxy ends and takes no new work.", (), max),
    "redis_up": ("1 while redis answers.", (), min),
    "breaker_open": ("1 while the breaker of an upstream is open.", ("upstream",), max),
    "generation": ("How often a file was read.", ("file",), max),
    "reload_failing": ("1 while a changed file is no good and the one before it is in use.", ("file",), max),
}  # fmt: skip


class Times:
    """One histogram: how many fell into each bucket, their sum, and the last request of each bucket."""

    __slots__ = ("bounds", "buckets", "examples", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.examples: list[tuple[str, float, float] | None] = [None] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float, request_id: str = "", now: float = 0.0) -> None:
        place = bisect_left(self.bounds, seconds)
        self.buckets[place] += 1
        self.total += seconds
        if request_id:
            self.examples[place] = (request_id, seconds, now)


class _Series:
    """The numbers of one (route, model, cache)."""

    __slots__ = ("completion", "overhead", "prompt", "request", "statuses", "ttft", "upstream")

    def __init__(self, request: Times, ttft: Times, upstream: Times, overhead: Times) -> None:
        self.request, self.ttft, self.upstream, self.overhead = request, ttft, upstream, overhead
        self.statuses: dict[int, int] = {}
        self.prompt = self.completion = 0  # tokens


Snapshot = dict[str, Any]


class Metrics:
    """The numbers of one process, and of its siblings where `folder` is where the workers of one proxy share them.

    A worker that has ended stays in the sum: a counter never goes back.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._name = f"{os.getpid()}-{time.time_ns()}.json"
        self._counts: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _COUNTERS}
        self._times: dict[str, dict[tuple[str, ...], Times]] = {name: {} for name in _TIMES}
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._gauges: list[Callable[[], Mapping[str, Mapping[tuple[str, ...], float]]]] = []
        self._models = {""}
        self._written = b""
        self._task: asyncio.Task[None] | None = None
        self.hits = 0
        self.misses = 0

    async def start(self) -> None:
        if self._folder is not None:
            self._task = asyncio.get_running_loop().create_task(self._sharing(), name="metrics")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.share(ended=True)

    async def _sharing(self) -> None:
        while True:
            self.share()
            await asyncio.sleep(SHARE_SECONDS)

    # ---- while requests run

    def record(self, route: str, record: RequestRecord, status: int, seconds: float, request_id: str = "") -> None:
        """One request is over."""
        model = record.model
        if model not in self._models:
            if record.model_known and len(self._models) <= MOST_MODELS:
                self._models.add(model)
            else:
                model = "other"
        cache = record.cache
        series = self._series.get((route, model, cache)) or self._made(route, model, cache)
        series.statuses[status] = series.statuses.get(status, 0) + 1
        series.prompt += record.prompt_tokens
        series.completion += record.completion_tokens
        now = time.time()
        series.request.add(seconds, request_id, now)
        if record.ttft is not None:
            series.ttft.add(record.ttft, request_id, now)
        waited = record.upstream_seconds
        if waited:
            series.upstream.add(waited)
        series.overhead.add(seconds - waited if seconds > waited else 0.0)
        if cache == "hit":
            self.hits += 1
        elif cache in {"miss", "request", "partial"}:
            self.misses += 1

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """`name`: one of the counters above."""
        counts = self._counts[name]
        if labels in counts:
            counts[labels] += by
        elif len(counts) < MOST_SERIES:
            counts[labels] = by

    def time(self, name: str, *labels: str, seconds: float) -> None:
        """`name`: one of the times above."""
        times = self._times[name].get(labels) or self._new(name, labels)
        times.add(seconds)

    def watch(self, gauges: Callable[[], Mapping[str, Mapping[tuple[str, ...], float]]]) -> None:
        """`gauges` is asked at each look: name -> labels -> value."""
        self._gauges.append(gauges)

    def _made(self, route: str, model: str, cache: str) -> _Series:
        labels = (route, model, cache)
        made = _Series(*(self._new(name, labels) for name in ("request", "ttft", "upstream", "overhead")))
        if len(self._series) < MOST_SERIES:
            self._series[labels] = made
        return made

    def _new(self, name: str, labels: tuple[str, ...]) -> Times:
        made = Times(_TIMES[name][2])
        if len(self._times[name]) < MOST_SERIES:
            self._times[name][labels] = made
        return made

    # ---- when somebody looks

    def totals(self) -> tuple[int, int]:
        """Hits and misses of all workers."""
        every = self._every()
        return sum(each["hits"] for each in every), sum(each["misses"] for each in every)

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics, with request ids as exemplars, for who accepts it."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        if OPENMETRICS in accept:
            return openmetrics.generate_latest(registry), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
        return generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8"

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's way to read the numbers."""
        every = self._every()
        for name, (said, labels) in _COUNTERS.items():
            counter = CounterMetricFamily(f"lab_proxy_{name}", said, labels=labels)
            for key, values in _together(every, "counts", name).items():
                counter.add_metric(key, sum(values))
            yield counter
        for name, (said, labels, bounds) in _TIMES.items():
            histogram = HistogramMetricFamily(f"lab_proxy_{name}_seconds", said, labels=labels)
            for key, parts in _together(every, "times", name).items():
                histogram.add_metric(key, _buckets(bounds, parts), sum(part[1] for part in parts))
            yield histogram
        for name, (said, labels, join) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"lab_proxy_{name}", said, labels=labels)
            living = [each for each in every if not each["ended"]]
            for key, values in _together(living, "gauges", name).items():
                gauge.add_metric(key, join(values))
            yield gauge

    def share(self, *, ended: bool = False) -> None:
        """Put this process's numbers where its siblings find them."""
        if self._folder is None:
            return
        said = orjson.dumps(self._snapshot() | {"ended": ended})
        if said == self._written:
            return
        draft = self._folder / f".{self._name}"
        with contextlib.suppress(OSError):  # a full disk is no reason to stop answering
            draft.write_bytes(said)
            draft.replace(self._folder / self._name)
            self._written = said

    def _snapshot(self) -> Snapshot:
        return {
            "ended": False,
            "hits": self.hits,
            "misses": self.misses,
            "counts": {name: list(counts.items()) for name, counts in self._counts.items()} | self._counted(),
            "times": {
                name: [(key, (each.buckets, each.total, each.examples)) for key, each in times.items()]
                for name, times in self._times.items()
            },
            "gauges": self._gauged(),
        }

    def _counted(self) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        requests: list[tuple[tuple[str, ...], float]] = []
        tokens: dict[tuple[str, ...], float] = {}
        for labels, series in self._series.items():
            requests += [((*labels, str(status)), times) for status, times in series.statuses.items()]
            source = {"hit": "cache", "collapsed": "collapsed"}.get(labels[2], "upstream")
            for kind, number in (("prompt", series.prompt), ("completion", series.completion)):
                key = (labels[1], source, kind)
                if number or key in tokens:
                    tokens[key] = tokens.get(key, 0) + number
        return {"requests": requests, "tokens": list(tokens.items())}

    def _gauged(self) -> dict[str, list[tuple[tuple[str, ...], float]]]:
        told: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for gauges in self._gauges:
            for name, values in gauges().items():
                told.setdefault(name, []).extend(values.items())
        return told

    def _every(self) -> list[Snapshot]:
        """This process's numbers as they are, its siblings' as they last told them."""
        every = [self._snapshot()]
        for path in self._folder.glob("*.json") if self._folder else ():
            if path.name != self._name:
                with contextlib.suppress(OSError, orjson.JSONDecodeError):
                    every.append(orjson.loads(path.read_bytes()))
        return every


def _together(every: Sequence[Snapshot], kind: str, name: str) -> dict[tuple[str, ...], list[Any]]:
    """Labels -> what each process says."""
    joined: dict[tuple[str, ...], list[Any]] = {}
    for snapshot in every:
        for key, value in snapshot[kind].get(name, ()):
            joined.setdefault(tuple(key), []).append(value)
    return joined


def _buckets(bounds: tuple[float, ...], parts: Sequence[Any]) -> list[Any]:
    """Prometheus's cumulative buckets, each with the latest request that fell into it."""
    told: list[Any] = []
    reached = 0
    for place, bound in enumerate((*map(str, bounds), "+Inf")):
        reached += sum(part[0][place] for part in parts)
        example = max((part[2][place] for part in parts if part[2][place]), key=lambda each: each[2], default=None)
        shown = Exemplar({"request_id": example[0][:100]}, example[1], example[2]) if example else None
        told.append((bound if "." in bound or bound == "+Inf" else f"{bound}.0", reached, shown))
    return told

"""The metrics of this process: requests, tokens, times, upstreams, redis, limits. Written out at /metrics.

Names of models and upstreams, reasons, counts and times; never a prompt, an answer or a key.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics

from .record import RequestRecord

MOST_MODELS = 200  # model names with series of their own: callers may invent any number of names
MOST_SERIES = 5_000  # of one metric: further combinations of labels are not counted
OPENMETRICS = "application/openmetrics-text"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

_BY = ("route", "model", "cache")
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests answered.", (*_BY, "status")),
    "tokens": ("Tokens of answers, by where they came from.", ("model", "source", "kind")),
    "cost_usd": ("Cost of upstream calls in USD, by the prices of the moment.", ("upstream", "model")),
    "redis_errors": ("Operations that redis failed.", ("operation",)),
    "upstream_calls": ("Calls that upstreams received, including retries.", ("upstream", "outcome")),
    "upstream_retries": ("Calls that repeated a failed one.", ("upstream",)),
    "fallbacks": ("Answers that came from a fallback instead of the requested upstream.", ("upstream", "answered")),
    "breaker_opened": ("How often a breaker opened.", ("upstream",)),
    "reconciled": ("Interrupted calls, by whether the model service reported their usage.", ("outcome",)),
    "limits_refused": ("Requests that a limit refused.", ("reason",)),
    "reloads": ("Reloads of files while the proxy ran.", ("file", "outcome")),
}
_TIMES: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "request": ("Time to the end of the answer.", _BY, _SECONDS),
    "ttft": ("Time to the first token of a stream.", _BY, _SECONDS),
    "upstream": ("Time that a request waited for upstreams.", _BY, _SECONDS),
    "overhead": ("Time of a request that was not waiting for upstreams: the proxy's own.", _BY, _SHORT),
    "redis": ("Time of one round trip to redis.", ("operation",), _SHORT),
}
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "in_flight": ("Requests being answered.", ()),
    "draining": ("1 while the proxy shuts down and accepts no new requests.", ()),
    "redis_up": ("1 while redis answers.", ()),
    "breaker_open": ("1 while the breaker of an upstream is open.", ("upstream",)),
    "task_failures": ("How often a background task failed and was restarted.", ("task",)),
    "generation": ("How often a file was read.", ("file",)),
    "reload_failing": ("1 while a changed file is faulty and its previous content is in use.", ("file",)),
}

_SOURCES = {
    "hit": "cache",
    "stale": "cache",
    "collapsed": "collapsed",
}  # of tokens, by the label `cache`; all others: upstream

Gauges = Mapping[str, Mapping[tuple[str, ...], float]]  # name -> labels -> value


class _Uncounted:
    """Stands in for a counter or histogram beyond MOST_SERIES."""

    def inc(self, *_: Any) -> None: ...

    def observe(self, *_: Any) -> None: ...


_UNCOUNTED = _Uncounted()


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each one, that is never read
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Histogram] = {}
        for name, (text, labels) in _COUNTERS.items():
            self._metrics[name] = Counter(f"lab_proxy_{name}", text, labels, registry=self.registry)
        for name, (text, labels, bounds) in _TIMES.items():
            full = f"lab_proxy_{name}_seconds"
            self._metrics[name] = Histogram(full, text, labels, registry=self.registry, buckets=bounds)
        self.registry.register(self)
        # The children by their labels: prometheus_client's own lookup takes a lock and longer than the count.
        self._children: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in self._metrics}
        self._of_request: dict[tuple[tuple[str, str, str], int], tuple[Any, Any, Any]] = {}
        self._next_exemplar: dict[tuple[str, ...], float] = {}  # labels -> time.monotonic()
        self._gauges: list[Callable[[], Gauges]] = []
        self._models = {""}
        self.hits = 0
        self.misses = 0

    def record(self, route: str, record: RequestRecord, status: int, seconds: float, request_id: str = "") -> None:
        model, cache = record.model, record.cache
        if model not in self._models:
            if record.model_known and len(self._models) <= MOST_MODELS:
                self._models.add(model)
            else:
                model = "other"
        by, waited = (route, model, cache), record.upstream_seconds
        requests, overhead, request = self._of_request.get((by, status)) or self._request_children(by, status)
        requests.inc()
        overhead.observe(seconds - waited if seconds > waited else 0.0)
        for kind, tokens in (("prompt", record.prompt_tokens), ("completion", record.completion_tokens)):
            if tokens:
                self._child("tokens", (model, _SOURCES.get(cache, "upstream"), kind)).inc(tokens)
        # An exemplar costs as much as all other work here, so each series gets one per second at most.
        now, exemplar = time.monotonic(), None
        if request_id and now >= self._next_exemplar.get(by, 0.0) and len(self._next_exemplar) < MOST_SERIES:
            exemplar, self._next_exemplar[by] = {"request_id": request_id[:100]}, now + 1  # OpenMetrics: at most 128
        request.observe(seconds, exemplar)
        if record.ttft is not None:
            self._child("ttft", by).observe(record.ttft, exemplar)
        if waited:
            self._child("upstream", by).observe(waited)
        if cache == "hit":
            self.hits += 1
        elif cache in {"miss", "request", "partial"}:
            self.misses += 1

    def _request_children(self, by: tuple[str, str, str], status: int) -> tuple[Any, Any, Any]:
        """The counter, the overhead histogram and the time histogram for these labels, looked up once."""
        found = (self._child("requests", (*by, str(status))), self._child("overhead", by), self._child("request", by))
        if len(self._of_request) < MOST_SERIES:
            self._of_request[by, status] = found
        return found

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """`name`: one of the counters above."""
        self._child(name, labels).inc(by)

    def time(self, name: str, *labels: str, seconds: float) -> None:
        """`name`: one of the times above."""
        self._child(name, labels).observe(seconds)

    def _child(self, name: str, labels: tuple[str, ...]) -> Any:
        """The counter or histogram with these labels; beyond MOST_SERIES one that is not shown."""
        children = self._children[name]
        child = children.get(labels)
        if child is None:
            if len(children) >= MOST_SERIES:
                return _UNCOUNTED
            child = children[labels] = self._metrics[name].labels(*labels)
        return child

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        """`gauges` is called for each page."""
        self._gauges.append(gauges)

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics with request ids as exemplars, if `accept` names it."""
        if OPENMETRICS in accept:
            return openmetrics.generate_latest(self.registry), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
        return generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"

    def collect(self) -> Iterator[Metric]:
        """The gauges, for the registry; their values are read at each call."""
        values = [gauges() for gauges in self._gauges]
        for name, (text, labels) in _GAUGES.items():
            family = GaugeMetricFamily(f"lab_proxy_{name}", text, labels=labels)
            for each in values:
                for key, value in each.get(name, {}).items():
                    family.add_metric(key, value)
            yield family

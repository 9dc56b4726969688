"""The servers' own counters: /metrics of proxy and model and the ledger's /usage, read before and after a run.

The counters of several processes of one service are added. A service without counters is None and is not compared.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

SECONDS = 10  # timeout of each page
LEDGER = ("requests", "upstream_calls", "prompt_tokens", "completion_tokens", "hits", "collapsed",
          "hit_prompt_tokens", "hit_completion_tokens", "collapsed_prompt_tokens", "collapsed_completion_tokens",
          "estimated_calls")  # fmt: skip
MODEL = {
    "lab_model_requests_total": "requests", "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "completion_tokens", "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:prefix_cache_queries_total": "prefix_queries",
}  # fmt: skip
GAUGES = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}

Counts = dict[str, float]


@dataclass
class Counters:
    """`proxy`: `requests`, `requests.<state>`, `<kind>_tokens.<source>`, `upstream_calls`, `retries`. Counters only."""

    proxy: Counts | None = None
    model: Counts | None = None
    ledger: Counts | None = None
    in_flight: float | None = None  # requests at the proxy
    running: float | None = None  # requests at the model, including waiting ones
    missing: list[str] = field(default_factory=list)  # pages that could not be read, and why

    def since(self, before: Counters) -> Counters:
        """The counts since `before`. A counter that fell gives a negative number."""

        def less(now: Counts | None, then: Counts | None) -> Counts | None:
            if now is None or then is None:
                return None
            return {name: now.get(name, 0) - then.get(name, 0) for name in now.keys() | then.keys()}

        return Counters(less(self.proxy, before.proxy), less(self.model, before.model),
                        less(self.ledger, before.ledger), self.in_flight, self.running,
                        [*before.missing, *self.missing])  # fmt: skip

    @property
    def fell(self) -> list[str]:
        """Names of counters in a difference that fell, because a process was restarted or a counter was reset."""
        sides = {"proxy": self.proxy, "model": self.model, "ledger": self.ledger}
        return [f"{side} {name}" for side, counts in sides.items() for name, n in (counts or {}).items() if n < 0]


@dataclass(frozen=True)
class Source:
    """URLs of the counters. `routes`: paths of the workload; requests to other paths do not count.

    `ledger`: URL of any proxy, because all share one ledger.
    """

    ledger: str
    proxies: Sequence[str]
    models: Sequence[str]
    key: str | None
    routes: frozenset[str]

    def read(self) -> Counters:
        """Read all counters. Never raises; `missing` names pages that could not be read."""
        found = Counters()
        for url in self.proxies:
            if (page := self._page(found, f"{url}/metrics")) is not None and "lab_proxy_" in page:
                self._proxy(found, page)
        for url in self.models:
            if (page := self._page(found, f"{url}/metrics")) is not None and "lab_model_" in page:
                self._model(found, page)
        if (page := self._page(found, f"{self.ledger}/usage")) is not None:
            try:
                total = json.loads(page)["total"]
                found.ledger = {name: float(total[name]) for name in LEDGER}
            except (ValueError, KeyError, TypeError):
                found.missing.append(f"{self.ledger}/usage: not the ledger's page")
        return found

    def _proxy(self, found: Counters, page: str) -> None:
        proxy = found.proxy = found.proxy if found.proxy is not None else {"requests": 0.0}
        for name, labels, value in _samples(page):
            if name == "lab_proxy_requests_total" and labels.get("route") in self.routes:
                _add(proxy, "requests", value)
                _add(proxy, f"requests.{labels.get('cache') or 'none'}", value)
            elif name == "lab_proxy_tokens_total":
                _add(proxy, f"{labels['kind']}_tokens.{labels['source']}", value)
            elif name == "lab_proxy_upstream_calls_total":
                _add(proxy, "upstream_calls", value)
            elif name == "lab_proxy_upstream_retries_total":
                _add(proxy, "retries", value)
            elif name == "lab_proxy_in_flight":
                found.in_flight = (found.in_flight or 0) + value

    def _model(self, found: Counters, page: str) -> None:
        model = found.model = found.model if found.model is not None else {}
        for name, labels, value in _samples(page):
            if name == "lab_model_requests_total":
                if f"/v1/{labels.get('endpoint')}" in self.routes:
                    _add(model, "requests", value)
            elif name in MODEL:
                _add(model, MODEL[name], value)
            elif name in GAUGES:
                found.running = (found.running or 0) + value

    def _page(self, found: Counters, url: str) -> str | None:
        request = urllib.request.Request(url)  # noqa: S310 the settings take http(s) only
        if self.key:
            request.add_header("authorization", f"Bearer {self.key}")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=SECONDS) as answer:
                return str(answer.read().decode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            found.missing.append(f"{url}: {getattr(error, 'reason', error)}")
            return None


def _samples(page: str) -> Iterator[tuple[str, dict[str, Any], float]]:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def _add(counts: Counts, name: str, value: float) -> None:
    counts[name] = counts.get(name, 0.0) + value

"""Pages about the proxy itself: /health, /ready, /status, /metrics; and its gauges. Knows states; changes none."""

import asyncio
import platform
import time

import orjson

from ... import __version__, tasks
from ...cache.store import Cache
from ...reload import Reloader
from ...requests.context import Traffic
from ...telemetry.metrics import Metrics
from ...upstreams.failover import UpstreamPool
from ...upstreams.model_list import ModelList
from ..response import PageRequest, Pages, Response


class HealthPages:
    def __init__(
        self,
        cache: Cache,
        upstreams: UpstreamPool,
        models: ModelList,
        *,
        metrics: Metrics,
        traffic: Traffic,
        files: Reloader,
    ) -> None:
        self._cache, self._upstreams, self._models = cache, upstreams, models
        self._metrics, self._traffic, self._files = metrics, traffic, files
        self._started = time.time()

    def pages(self) -> Pages:
        return {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/status"): self._status,
            ("GET", "/metrics"): self._metrics_page,
        }

    def gauges(self) -> dict[str, dict[tuple[str, ...], float]]:
        """For Metrics.watch."""
        return {
            "in_flight": {(): float(self._traffic.in_flight)},
            "draining": {(): float(self._traffic.draining)},
            "redis_up": {(): float(self._cache.up)} if self._cache.enabled else {},
            "task_failures": {(name,): float(count) for name, count in tasks.failures.items()},
            "breaker_open": {(name,): float(is_open) for name, is_open in self._upstreams.breaker_states().items()},
        }

    async def _health(self, _: PageRequest, response: Response) -> None:
        # 200 in both states, because the process is alive. The gate sends no new requests to a draining one.
        await response.send(b'{"status":"draining"}' if self._traffic.draining else b'{"status":"ok"}', {})

    async def _ready(self, _: PageRequest, response: Response) -> None:
        model = await self._models.ready()
        ready = model["state"] == "up"
        if self._traffic.draining:
            ready, model = False, model | {"state": "draining"}
        sound = (self._cache.up or not self._cache.enabled) and not tasks.failing
        status = ("ready" if sound else "degraded") if ready else model["state"]
        answer = {"status": status, "model": model["state"], "redis": "up" if self._cache.up else "down"}
        answer |= {"failing_tasks": sorted(tasks.failing)} if tasks.failing else {}
        await response.send(orjson.dumps(answer), {}, status=200 if ready else 503)

    async def _status(self, _: PageRequest, response: Response) -> None:
        model, redis = await asyncio.gather(self._models.ready(), self._cache.report())
        entries = redis.pop("entries", None)
        cache = {"enabled": self._cache.enabled, "hits": self._metrics.hits, "misses": self._metrics.misses}
        answer = {
            "proxy": {
                "version": __version__,
                "python": platform.python_version(),
                "started": int(self._started),
                "upstreams": self._upstreams.status(),
                "draining": self._traffic.draining,
                "files": self._files.report(),
            },
            "redis": redis,
            "model": model,
            "cache": cache if entries is None else cache | {"entries": entries},
        }
        await response.send(orjson.dumps(answer), {})

    async def _metrics_page(self, request: PageRequest, response: Response) -> None:
        page, content_type = self._metrics.page(request.headers.get("accept", ""))
        await response.send(page, {}, content_type)

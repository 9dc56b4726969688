"""The pool of upstreams, and failover: a request goes to its target, then to the fallbacks. Knows no retries."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ..endpoints import ENDPOINTS
from ..errors import UpstreamDown
from ..settings import Settings
from ..telemetry.metrics import Metrics
from ..telemetry.traces import Traces
from .client import UpstreamClient, UpstreamFault, UpstreamRequest
from .reply import UpstreamResponse
from .routes import Routes, Target, UpstreamConfig


class UpstreamPool:
    """A client for each upstream of the routes file. Requests in flight keep the client they began with. A part."""

    def __init__(self, routes: Routes, settings: Settings, metrics: Metrics, traces: Traces | None = None) -> None:
        self._routes = routes
        self._traces = traces
        self._settings = settings
        self._metrics = metrics
        self._clients: dict[UpstreamConfig, UpstreamClient] = {}

    async def start(self) -> None: ...

    async def stop(self) -> None:
        for upstream in self._clients.values():
            await upstream.stop()

    @property
    def model_config(self) -> UpstreamConfig:
        """Configuration of the model service."""
        return next(config for config in self._routes.upstreams.values() if config.kind == "model")

    async def ask_model(self, path: str, limit: float, body: Any = None) -> tuple[int, Any]:
        """A GET of the model service, or with a `body` a POST: see UpstreamClient.get_json."""
        client = self._client(self.model_config)
        return await (client.get_json(path, limit) if body is None else client.post_json(path, body, limit))

    async def send(self, targets: Sequence[Target], request: UpstreamRequest) -> UpstreamResponse:
        """The answer of the first of `targets` that succeeds: see its `target` and `x-model-fallback`.

        The caller closes it; before its end that closes the connection, which tells the upstream to stop.

        If all fail, raises the error of the first: UpstreamDown, CircuitOpen, UpstreamTimeout, UpstreamBroken,
        UpstreamLimited, UpstreamRefused.
        """
        first_fault: UpstreamFault | None = None
        for target in targets:
            if target is not targets[0] and not _can_replace(target, targets[0], request.endpoint):
                continue
            try:
                answer = await self._client(target.config).send(request, target)
            except UpstreamFault as fault:
                first_fault = first_fault or fault
                if not fault.fallback or time.perf_counter() >= request.deadline:
                    break
                continue
            if first_fault is not None:
                answer.headers["x-model-fallback"] = f"{target.upstream}/{target.model}"
                self._metrics.count("fallbacks", targets[0].upstream, target.upstream)
            return answer
        raise first_fault.error if first_fault else UpstreamDown("No upstream is available for this request.")

    def status(self) -> list[dict[str, Any]]:
        """For the status page, without keys: all upstreams, and their open circuit breakers."""
        states = []
        for name, config in self._routes.upstreams.items():
            found = self._clients.get(config)
            broken = sorted(which for which, each in found.breakers.items() if each.is_open) if found else []
            states.append({"name": name, "configured": config.configured} | ({"open": broken} if broken else {}))
        return states

    def breaker_states(self) -> dict[str, bool]:
        return {name: each.is_open for upstream in self._clients.values() for name, each in upstream.breakers.items()}

    def on_routes_reloaded(self) -> None:
        """The routes file was reloaded: close the clients of removed upstreams, once their answers must have ended."""
        kept = set(self._routes.upstreams.values())
        for config in [config for config in self._clients if config not in kept]:
            asyncio.get_running_loop().call_later(self._settings.total_timeout_seconds, self._retire, config)

    def _retire(self, config: UpstreamConfig) -> None:
        if config in self._clients and config not in self._routes.upstreams.values():
            gone = asyncio.ensure_future(self._clients.pop(config).stop())
            gone.add_done_callback(lambda _: None)

    def _client(self, config: UpstreamConfig) -> UpstreamClient:
        found = self._clients.get(config)
        if found is None:
            found = self._clients[config] = UpstreamClient(config, self._settings, self._metrics, self._traces)
        return found


def _can_replace(target: Target, first: Target, endpoint: str) -> bool:
    rule = ENDPOINTS[endpoint].fallback
    if rule == "same_model":
        return target.model == first.model
    if rule == "responses":
        return target.config.responses
    return target.kind != "embedding"

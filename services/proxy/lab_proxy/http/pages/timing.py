"""Pages about requests and their prices: GET /v1/requests/{id}/timing and GET /v1/prices.

The first asks the model service for the phases of its own part of a request; neither asks an upstream for an answer.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import orjson

from ...errors import PathNotFound, ProxyError
from ...ledger.prices import Prices
from ...telemetry.record import UpstreamCall
from ...telemetry.timing import Timings, with_model
from ..response import PRIVATE, PageRequest, Pages, Response

PREFIX, SUFFIX = "/v1/requests/", "/timing"
MODEL_SECONDS = 1.0  # for the model service's answer
AGAIN_SECONDS = 0.05  # the model may begin with a call, or end it, a moment after the proxy

Get = Callable[[str, float], Awaitable[tuple[int, Any]]]  # UpstreamPool.ask_model


class TimingPages:
    def __init__(self, timings: Timings, prices: Prices, ask_model: Get) -> None:
        self._timings, self._prices, self._ask_model = timings, prices, ask_model

    def pages(self) -> Pages:
        return {("GET", PREFIX + "{id}" + SUFFIX): self._timing, ("GET", "/v1/prices"): self._list}

    async def _timing(self, request: PageRequest, response: Response) -> None:
        name = request.path.removeprefix(PREFIX)
        id_ = name.removesuffix(SUFFIX)
        found = self._timings.find(request.identity.tenant, id_) if name.endswith(SUFFIX) else None
        if found is None:
            raise PathNotFound(
                "This proxy process answered no request of yours with this id in the last 5 minutes. The id is in the "
                "answer's `x-request-id`. If there are several proxies, only the one that answered knows it."
            )
        timing, call = found
        if call is not None and call.id:
            timing = with_model(timing, await self._of_model(call, running=timing["status"] is None))
        await response.send(orjson.dumps({"id": id_, **timing}), PRIVATE)

    async def _of_model(self, call: UpstreamCall, *, running: bool) -> Any:
        """The model service's phases of a call; None: it has none, as an earlier version or of embeddings."""
        answer = None
        for _ in range(2):
            try:
                status, answer = await self._ask_model(f"{PREFIX}{quote(call.id, safe='')}{SUFFIX}", MODEL_SECONDS)
            except ProxyError:
                return None
            if status != 200:
                return None
            if running or not isinstance(answer, dict) or answer.get("state") == "ended":
                break
            await asyncio.sleep(AGAIN_SECONDS)
        return answer

    async def _list(self, _: PageRequest, response: Response) -> None:
        await response.send(orjson.dumps({"unit": "USD per million tokens", "upstreams": self._prices.listed()}), {})

"""Pages about requests and their prices: GET /v1/requests/{id}/timing and GET /v1/prices. They call no upstream."""

import orjson

from ...errors import PathNotFound
from ...ledger.prices import Prices
from ...telemetry.timing import Timings
from ..response import PRIVATE, PageRequest, Pages, Response

PREFIX, SUFFIX = "/v1/requests/", "/timing"


class TimingPages:
    def __init__(self, timings: Timings, prices: Prices) -> None:
        self._timings, self._prices = timings, prices

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
        await response.send(orjson.dumps({"id": id_, **found}), PRIVATE)

    async def _list(self, _: PageRequest, response: Response) -> None:
        await response.send(orjson.dumps({"unit": "USD per million tokens", "upstreams": self._prices.listed()}), {})

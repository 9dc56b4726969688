"""Plan cache: requests with the same bytes have the same plan, until the routes or the model list change.

Programs repeat requests byte by byte. Parsing the body, resolving the model and computing the HMAC of the canonical
form would be most of the cost of a hit. Knows requests as bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..upstreams.routes import Target

MAX_BODY_BYTES = 65_536  # parsing a longer body costs little compared with its answer
MAX_BYTES = 32 * 1024 * 1024  # of all requests, with their parsed bodies and canonical forms
PARSED_FACTOR = 6  # size of a parsed body and its canonical form, in sizes of its bytes

RequestBytes = tuple[str, str, bytes]  # tenant, endpoint, body
Generation = tuple[int, int]  # of the routes, of the model list


@dataclass(slots=True)
class CachedPlan:
    """The plan of a request, without what depends on the moment. `key` is empty if no single entry can answer."""

    body: dict[str, Any]
    target: Target
    stream: bool
    include_usage: bool
    bypass: str | None
    canonical_form: bytes
    key: str
    samples: int = 1


class PlanCache:
    """The plans of the most recently seen requests."""

    def __init__(self) -> None:
        self._plans: OrderedDict[RequestBytes, CachedPlan] = OrderedDict()
        self._generation: Generation = (0, 0)
        self._size = 0

    def get(self, request: RequestBytes, generation: Generation) -> CachedPlan | None:
        if generation != self._generation:
            self._plans.clear()
            self._generation, self._size = generation, 0
            return None
        plan = self._plans.get(request)
        if plan is not None:
            self._plans.move_to_end(request)
        return plan

    def put(self, request: RequestBytes, plan: CachedPlan, generation: Generation) -> None:
        """`generation`: from before the plan was made. Long bodies are not kept."""
        if len(request[2]) > MAX_BODY_BYTES or generation != self._generation or request in self._plans:
            return
        self._plans[request] = plan
        self._size += _weight(request)
        while self._size > MAX_BYTES:
            self._size -= _weight(self._plans.popitem(last=False)[0])


def _weight(request: RequestBytes) -> int:
    return 1000 + PARSED_FACTOR * len(request[2])

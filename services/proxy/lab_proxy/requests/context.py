"""The context of one request, and the traffic of all of them. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..cache.policy import NO_DIRECTIVES, CacheControl
from ..keys.identity import Identity
from ..keys.limits import Admission
from ..telemetry.record import RequestRecord
from .plan_cache import CachedPlan


@dataclass(slots=True)
class RequestContext:
    """One parsed request."""

    identity: Identity
    endpoint: str
    raw: bytes
    body: dict[str, Any]
    request_id: str
    cache_control: CacheControl = NO_DIRECTIVES
    store_sampled: bool = False
    started: float = 0.0  # time.perf_counter()
    record: RequestRecord = field(default_factory=RequestRecord)
    admission: Admission | None = None
    cached_plan: CachedPlan | None = None  # the plan of an earlier request with the same bytes
    plan_cacheable: bool = False  # its plan depends on no header
    batch_price: bool = False  # a line of a batch: half price
    caller_deadline: float | None = None  # time.perf_counter(), if the caller set a deadline

    @property
    def tenant(self) -> str:
        return self.identity.tenant


@dataclass(slots=True)
class Traffic:
    """Interactive requests of this process. Set by the app and the server, read by the batch worker, which yields."""

    draining: bool = False  # no new requests are accepted; running ones finish
    started: int = 0  # requests passed to the executor
    ended: int = 0

    @property
    def in_flight(self) -> int:
        return self.started - self.ended

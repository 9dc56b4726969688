"""Context and plan of one request, and the traffic of all requests. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..cache.key import sample_key
from ..cache.policy import NO_DIRECTIVES, CacheControl
from ..keys.identity import Identity
from ..keys.limits import Admission
from ..telemetry.record import RequestRecord
from ..upstreams.routes import Target


@dataclass(slots=True)
class RequestContext:
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
    cached_plan: Plan | None = None  # the plan of an earlier request with the same bytes
    plan_cacheable: bool = False  # its plan depends on no header
    batch_price: bool = False  # a line of a batch: half price at the model service
    caller_deadline: float | None = None  # time.perf_counter(), if the caller set a deadline

    @property
    def tenant(self) -> str:
        return self.identity.tenant


@dataclass(slots=True)
class Plan:
    """How one request is answered. Some fields change while the request runs."""

    request: RequestContext
    target: Target
    stream: bool
    include_usage: bool
    bypass: str | None  # reason why the cache is not used
    canonical_form: bytes = b""  # with the target's revision
    key: str = ""  # of `canonical_form`; empty for a bypass and for endpoints with one entry per input
    samples: int = 1  # answers that are stored side by side
    epoch: str = ""  # at the beginning of the request: its answer is stored in this epoch
    forward: str = "miss"  # reason why the upstream is called: `fwd` of cache-status
    limits_checked: bool = False
    retried_at: float = 0.0  # time.perf_counter() of a second upstream call, made for the followers
    slot: int = 0  # which of the samples this request's answer becomes
    shareable: bool = False  # other requests may join its flight

    def for_request(self, request: RequestContext, epoch: str = "") -> Plan:
        """The plan as it was made, for another request with the same bytes."""
        made = (self.target, self.stream, self.include_usage, self.bypass, self.canonical_form, self.key, self.samples)
        return Plan(request, *made, epoch)

    @property
    def keys(self) -> list[str]:
        """The key of each sample; the first one is the request's own."""
        return [sample_key(self.key, slot) for slot in range(self.samples)]

    @property
    def targets(self) -> list[Target]:
        """The target and the fallbacks that this caller may use."""
        allows = self.request.identity.allows
        return [self.target, *(each for each in self.target.fallbacks if allows(each.model))]

    def miss_headers(self, outcome: str | None = None) -> dict[str, str]:
        """Headers of an answer from an upstream. `outcome`: `stored`, or why it was not."""
        if self.bypass:
            status = f"llm-lab; fwd=bypass; detail={self.bypass}"
        else:
            end = {None: "", "stored": "; stored"}.get(outcome, f"; detail={outcome}")
            status = f"llm-lab; fwd={self.forward}{end}"
        return {"cache-status": status, **self._alias}

    def collapsed_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers of an answer that another request's upstream call gives; `headers`: of that call."""
        kept = {name: headers[name] for name in ("x-model-revision", "x-model-fallback") if name in headers}
        return {"cache-status": f"llm-lab; fwd={self.forward}; collapsed", **kept, **self._alias}

    def hit_headers(self, ttl: int, age: int, key: str | None, failed: int | None = None) -> dict[str, str]:
        """Headers of an answer from the cache. `failed`: status of the failed call that a stale entry replaces."""
        status = f"llm-lab; hit; ttl={ttl - age}" + (f'; key="{key}"' if key else "")
        if failed is not None:
            status = f"llm-lab; fwd=stale; fwd-status={failed}"
        revision = {"x-model-revision": self.target.revision} if self.target.revision else {}
        return {"cache-status": status, "age": str(age), **revision, **self._alias}

    @property
    def _alias(self) -> dict[str, str]:
        headers = {"x-model-alias": self.target.alias} if self.target.alias else {}
        return headers | {"x-model-auto": self.target.auto} if self.target.auto else headers


@dataclass(slots=True)
class Traffic:
    """Interactive requests of this process. Set by the app and the server, read by the batch worker, which yields."""

    draining: bool = False  # no new requests are accepted; running ones finish
    started: int = 0  # requests passed to the executor
    ended: int = 0

    @property
    def in_flight(self) -> int:
        return self.started - self.ended

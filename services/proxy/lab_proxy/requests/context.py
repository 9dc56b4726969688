"""One request, and what became of it: who asks for what, and the numbers that log line, metrics and ledger read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..cache.store import CacheControl
from ..keys.authentication import Identity
from ..upstreams.client import UpstreamCall
from .plan_cache import CachedPlan
from .roles import Admission


@dataclass(slots=True)
class RequestRecord:
    """What the log line and the metrics tell of one request. Never a prompt, an answer or a key."""

    model: str = ""
    model_known: bool = False  # `model` is one of the model service's, or an upstream answered to the name
    upstream: str = ""
    cache: str = ""
    error: str = ""
    ttft: float | None = None  # seconds
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that the upstream had in a cache of its own; of a Response alone
    upstream_called: bool = False  # an upstream was really asked: its tokens count
    billed_tokens: int = 0  # tokens of the real calls that are in the ledger
    upstream_seconds: float = 0.0  # waited for upstreams
    calls: list[UpstreamCall] = field(default_factory=list)  # that upstreams really got for this request

    def add_call(self, call: UpstreamCall) -> None:
        self.calls.append(call)
        self.upstream_seconds += call.seconds

    @property
    def upstream_tokens(self) -> int:
        """Tokens that this request cost."""
        return self.billed_tokens or (self.prompt_tokens + self.completion_tokens if self.upstream_called else 0)

    def set_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = usage.get("prompt_tokens") or 0
            self.completion_tokens = usage.get("completion_tokens") or 0


@dataclass(slots=True)
class RequestContext:
    """One parsed request."""

    identity: Identity
    endpoint: str
    raw: bytes
    body: dict[str, Any]
    request_id: str
    cache_control: CacheControl
    store_sampled: bool
    started: float  # time.perf_counter()
    record: RequestRecord = field(default_factory=RequestRecord)
    admission: Admission | None = None
    cached_plan: CachedPlan | None = None  # decided before, about the same bytes
    plan_cacheable: bool = False  # its headers ask nothing of the cache
    batch_price: bool = False  # at half price: a line of a batch
    caller_deadline: float | None = None  # time.perf_counter() when the caller's own time is over, where it said so

    @property
    def tenant(self) -> str:
        return self.identity.tenant

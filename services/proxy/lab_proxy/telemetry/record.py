"""The record of one request: the numbers that log line, metrics, traces and billing read. No prompt, answer or key."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_TOKENS = 10**9  # of one call: a larger count is not one, and its price would not fit into redis


def token_count(usage: Any, name: str) -> int:
    """A token count as an upstream reported it; 0 for anything else."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and 0 < value <= MAX_TOKENS else 0


@dataclass(slots=True)
class UpstreamCall:
    """One call that an upstream received: billed, counted and traced. Times are in seconds."""

    upstream: str
    model: str
    began: float  # time.time()
    seconds: float = 0.0  # waited for the upstream, up to the end of its answer
    status: int = 0  # 0: no answer
    outcome: str = ""  # ok, refused (4xx), failed (5xx, no answer), broken (after its first byte), cancelled
    answered: bool = False  # a 2xx: its content is the caller's answer
    id: str = ""  # by which the model service reports the call's usage; empty for other upstreams
    count_tokens: Callable[[int], None] = lambda _: None  # at its end, and when its real usage is known: for the cap
    span: Any = None  # of OpenTelemetry, where the request has one

    @property
    def possibly_processed(self) -> bool:
        """The call got no answer but may have used tokens: it was cut off, or failed on the way."""
        return bool(self.id) and not self.answered and self.status in {0, 500, 504}


@dataclass(slots=True)
class RequestRecord:
    """What log line, metrics and ledger read of one request."""

    model: str = ""
    model_known: bool = False  # `model` is listed by the model service, or an upstream answered to it
    upstream: str = ""
    cache: str = ""
    error: str = ""
    ttft: float | None = None  # seconds
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens from the upstream's own cache; Responses API only
    upstream_called: bool = False  # this request caused an upstream call: its tokens count
    billed_tokens: int = 0  # tokens of its upstream calls that are in the ledger
    billed_prompt: int = 0  # those of prompts
    upstream_seconds: float = 0.0  # waited for upstreams
    calls: list[UpstreamCall] = field(default_factory=list)
    tenant: str = ""
    span: Any = None  # of OpenTelemetry, where traces are on
    # Start and ends of the phases before the answer, as time.perf_counter(); 0: not reached.
    began_at: float = 0.0
    read_at: float = 0.0  # headers checked, key verified, body read
    planned_at: float = 0.0  # model, upstream and cache key known
    looked_up_at: float = 0.0  # limits and cache answered by redis
    call: UpstreamCall | None = None  # the last one that began; it is in `calls` when it has ended

    def begin_call(self, call: UpstreamCall) -> None:
        self.call = call

    def add_call(self, call: UpstreamCall) -> None:
        self.calls.append(call)
        self.upstream_seconds += call.seconds

    @property
    def upstream_tokens(self) -> int:
        return self.billed_tokens or (self.prompt_tokens + self.completion_tokens if self.upstream_called else 0)

    def set_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = token_count(usage, "prompt_tokens")
            self.completion_tokens = token_count(usage, "completion_tokens")

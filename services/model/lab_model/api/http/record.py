"""The record of each request: log line, metrics, usage.

Knows numbers and names. Never contains prompts, answers or keys.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import Counter, Histogram

from .timing import Timeline, TimingRing
from .traces import Phase, Traces
from .usage import TokenUsage, UsageRing

log = logging.getLogger(__name__)

# Names and labels are vLLM's where the meaning is the same (https://docs.vllm.ai/en/stable/usage/metrics/), so that its
# dashboards work here. `engine` is vLLM's number of an engine within one process: each replica has one.
ENGINE = "0"
REQUESTS = Counter("lab_model_requests", "Requests answered.", ["model_name", "endpoint", "status"])
SECONDS = Histogram(
    "lab_model_request_seconds", "Seconds from request to the end of its answer.", ["model_name", "endpoint"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)  # fmt: skip
LATENCY = Histogram(
    "vllm:e2e_request_latency_seconds", "Seconds from request to the end of its generation.", ["model_name", "engine"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)  # fmt: skip
TTFT = Histogram(
    "vllm:time_to_first_token_seconds", "Seconds from request to its first token.", ["model_name", "engine"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
PHASES = {
    name: Histogram(
        f"vllm:request_{name}_time_seconds", meaning, ["model_name", "engine"],
        buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
    )
    for name, meaning in (
        ("queue", "Seconds from the queue to the batch."),
        ("prefill", "Seconds from the batch to the first token."),
        ("decode", "Seconds from the first token to the end."),
    )
}  # fmt: skip
PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Prompt tokens computed or found in cache.", ["model_name", "engine"])
GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens generated.", ["model_name", "engine"])
USAGE = UsageRing()
TIMINGS = TimingRing()
TRACES = Traces()


class Work(Protocol):
    """The computation for one request. `ended` is set while there is none."""

    ended: asyncio.Event

    def used(self) -> tuple[int, int, int]:
        """(prompt, completion, cached) tokens so far; final when `ended` is set."""


@dataclass(slots=True)
class Record:
    """One request, for its log line, the metrics and the recorded usage."""

    request_id: str
    call_id: str  # unique: a caller may reuse its request id
    endpoint: str
    started: float
    model: str | None = None
    status: int = 499  # until a response starts: the client disconnected
    ttft: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    outcome: str = "gone"  # the client disconnected; else done, error, forwarded
    work: Work | None = None
    timeline: Timeline | None = None  # of a request to the engine
    span: Any = None  # of OpenTelemetry, where traces are on

    def phases(self, ended: float) -> Iterator[Phase]:
        """The phases of the engine that were reached, the last one until `ended`, time.monotonic()."""
        _, *begins, _ = self.timeline.moments() if self.timeline is not None else (0.0, 0.0)
        reached = [(name, began) for name, began in zip(PHASES, begins, strict=False) if began]
        for place, (name, began) in enumerate(reached):
            yield Phase(name, began, reached[place + 1][1] if place + 1 < len(reached) else ended)


def finish_request(method: str, record: Record) -> None:
    """Write the log line, metrics and usage of a request that has ended."""
    if record.timeline is not None:
        record.timeline.mark("end")
    if record.outcome == "forwarded" or (method == "GET" and record.status in (200, 503)):
        return  # the model's own process records it; health checks and scrapes come several times a second
    seconds = time.monotonic() - record.started
    model, status = record.model or "-", 499 if record.outcome == "gone" else record.status
    # Each unknown path would create a label.
    endpoint = record.endpoint if record.status != 404 else "-"
    REQUESTS.labels(model, endpoint, status).inc()
    SECONDS.labels(model, endpoint).observe(seconds)
    PROMPT_TOKENS.labels(model, ENGINE).inc(record.prompt_tokens)
    GENERATION_TOKENS.labels(model, ENGINE).inc(record.completion_tokens)
    USAGE.put(record.call_id, TokenUsage(record.prompt_tokens, record.completion_tokens, record.cached_tokens))
    if record.ttft is not None:
        TTFT.labels(model, ENGINE).observe(record.ttft)
        LATENCY.labels(model, ENGINE).observe(seconds)
        for phase in record.phases(time.monotonic()):
            PHASES[phase.name].labels(model, ENGINE).observe(phase.ended - phase.began)
    fields = {
        "request_id": record.request_id,
        "model": record.model,
        "endpoint": record.endpoint,
        "status": status,
        "outcome": record.outcome,
        "ttft_ms": None if record.ttft is None else round(record.ttft * 1000, 1),
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.completion_tokens,
        "seconds": round(seconds, 4),
    }
    log.info("request", extra={"fields": fields})
    if record.span is not None:
        attributes = {
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "http.response.status_code": status,
            "lab.request_id": record.request_id,
            "lab.cached_tokens": record.cached_tokens,
            "lab.outcome": record.outcome,
        }
        failed = record.outcome == "error" or status >= 500
        TRACES.end(record.span, record.endpoint, attributes, record.phases(time.monotonic()), failed=failed)

"""OpenTelemetry spans of requests and of the real calls they took, by the GenAI semantic conventions, over OTLP/HTTP.

Names, counts, times and outcomes; never what was asked or answered. The opentelemetry packages are an extra of this
package (`lab-proxy[otel]`) and are imported only where PROXY_OTLP_ENDPOINT is set.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from typing import TYPE_CHECKING, Any, Protocol

from .. import __version__
from ..upstreams.client import UpstreamCall

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SEND_SECONDS = 5.0  # for one batch to the collector
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}


class Account(Protocol):
    """What a span tells of one request; call.Account is one."""

    model: str
    model_known: bool
    upstream: str
    cache: str
    error: str
    ttft: float | None
    prompt_tokens: int
    completion_tokens: int
    calls: list[UpstreamCall]


def installed() -> bool:
    """Whether the extra is there."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


class Traces:
    """A part: made before the event loop runs, its thread sends what was recorded. `exporter`: another way out."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415

        self._kinds, self._within = SpanKind, set_span_in_context
        self._failed = Status(StatusCode.ERROR)
        resource = Resource.create({"service.name": "proxy", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        out = exporter or OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(out, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("lab_proxy", __version__)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    def record(self, route: str, account: Account, status: int, seconds: float, request_id: str) -> None:
        """One request is over: a span of it, and one below it for each call that an upstream got."""
        now = time.time()
        operation = _OPERATIONS[route]
        model = account.model if account.model_known else "other"
        told: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "http.route": route,
            "http.response.status_code": status,
            "lab.request_id": request_id,
            "lab.cache": account.cache,
        }
        if account.upstream:
            told["gen_ai.provider.name"] = _provider(account.upstream)
        if status < 400:
            told["gen_ai.response.model"] = model
        if account.prompt_tokens or account.completion_tokens:
            told["gen_ai.usage.input_tokens"] = account.prompt_tokens
            told["gen_ai.usage.output_tokens"] = account.completion_tokens
        if account.ttft is not None:
            told["gen_ai.response.time_to_first_chunk"] = account.ttft
        if account.error:
            told["error.type"] = account.error
        span = self._tracer.start_span(
            f"{operation} {model}".strip(),
            kind=self._kinds.SERVER,
            attributes=told,
            start_time=_nanoseconds(now - seconds),
        )
        for call in account.calls:
            self._below(span, operation, call)
        if account.error or status >= 500:
            span.set_status(self._failed)
        span.end(_nanoseconds(now))

    def _below(self, span: Any, operation: str, call: UpstreamCall) -> None:
        told: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": call.model,
            "gen_ai.provider.name": _provider(call.upstream),
            "lab.outcome": call.outcome,
        }
        if call.status:
            told["http.response.status_code"] = call.status
        good = call.outcome == "ok"
        if not good:
            told["error.type"] = str(call.status) if call.status >= 400 else call.outcome
        made = self._tracer.start_span(
            f"{operation} {call.model}",
            context=self._within(span),
            kind=self._kinds.CLIENT,
            attributes=told,
            start_time=_nanoseconds(call.began),
        )
        if not good:
            made.set_status(self._failed)
        made.end(_nanoseconds(call.began + call.seconds))


def _provider(upstream: str) -> str:
    return "llm-lab" if upstream == "model" else upstream


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

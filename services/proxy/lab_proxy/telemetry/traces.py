"""OpenTelemetry traces over OTLP/HTTP: a span for each request and one below it for each upstream call.

Follows the GenAI semantic conventions: names, counts, times and outcomes; no prompts or answers. A request's
`traceparent` (W3C Trace Context) makes its span a part of the caller's trace; the model service gets one and continues
it. The opentelemetry packages are an extra (`lab-proxy[otel]`) and are imported only if PROXY_OTLP_ENDPOINT is set.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..endpoints import ENDPOINTS
from .record import RequestRecord, UpstreamCall

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SEND_SECONDS = 5.0  # for one batch to the collector


def installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


class Traces:
    """A part. A thread of the SDK sends the spans. `exporter` replaces OTLP/HTTP, for tests."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._kinds, self._within = SpanKind, set_span_in_context
        self._failed = Status(StatusCode.ERROR)
        self._wire = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "proxy", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        out = exporter or OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(out, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("lab_proxy", __version__)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    def begin(self, headers: Mapping[str, str]) -> Any:
        """The span of a request with these headers (names in lower case). A malformed `traceparent` is ignored."""
        return self._tracer.start_span("request", self._wire.extract(headers), self._kinds.SERVER)

    def end(self, span: Any, route: str, record: RequestRecord, status: int, request_id: str) -> None:
        """The request has ended."""
        operation = ENDPOINTS[route].operation
        model = record.model if record.model_known else "other"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "http.route": route,
            "http.response.status_code": status,
            "lab.request_id": request_id,
            "lab.cache": record.cache,
        }
        if record.upstream:
            attributes["gen_ai.provider.name"] = _provider(record.upstream)
        if status < 400:
            attributes["gen_ai.response.model"] = model
        if record.prompt_tokens or record.completion_tokens:
            attributes["gen_ai.usage.input_tokens"] = record.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = record.completion_tokens
        if record.ttft is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = record.ttft
        if record.error:
            attributes["error.type"] = record.error
        self._end(span, f"{operation} {model}".strip(), attributes, failed=bool(record.error) or status >= 500)

    def begin_call(self, parent: Any, route: str, call: UpstreamCall) -> dict[str, str]:
        """Begin the span of an upstream call, below its request's. The headers that continue the trace upstream."""
        attributes = {
            "gen_ai.operation.name": ENDPOINTS[route].operation,
            "gen_ai.request.model": call.model,
            "gen_ai.provider.name": _provider(call.upstream),
        }
        name = f"{attributes['gen_ai.operation.name']} {call.model}"
        call.span = self._tracer.start_span(name, self._within(parent), self._kinds.CLIENT, attributes)
        headers: dict[str, str] = {}
        self._wire.inject(headers, self._within(call.span))
        return headers

    def end_call(self, call: UpstreamCall) -> None:
        failed = call.outcome != "ok"
        attributes: dict[str, Any] = {"lab.outcome": call.outcome}
        if call.status:
            attributes["http.response.status_code"] = call.status
        if failed:
            attributes["error.type"] = str(call.status) if call.status >= 400 else call.outcome
        self._end(call.span, None, attributes, failed=failed)

    def _end(self, span: Any, name: str | None, attributes: Mapping[str, Any], *, failed: bool) -> None:
        if name:
            span.update_name(name)
        span.set_attributes(attributes)
        if failed:
            span.set_status(self._failed)
        span.end()


def _provider(upstream: str) -> str:
    return "llm-lab" if upstream == "model" else upstream

"""OpenTelemetry spans of one replica's requests, sent by OTLP/HTTP: one for each request, and below it one for each
phase of the engine: `queue`, `prefill` and `decode`.

The caller's `traceparent` (W3C Trace Context) makes them a part of its trace. Knows numbers and names; no prompts or
answers. The opentelemetry packages are an extra (`lab-model[otel]`) and are imported only by `open`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from ... import __version__

SEND_SECONDS = 5.0  # for one batch to the collector
OPERATIONS = {"chat/completions": "chat", "completions": "text_completion"}  # GenAI semantic conventions


class Phase(NamedTuple):
    """began, ended: time.monotonic()."""

    name: str
    began: float
    ended: float


class Traces:
    """This process's spans; until it is opened there are none."""

    def __init__(self) -> None:
        self.on = False

    def open(self, endpoint: str | None) -> None:
        """Record requests that begin from now on; without an endpoint none. Call it once. Raises ImportError."""
        if endpoint is None:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._kind, self._failed, self._within = SpanKind.SERVER, Status(StatusCode.ERROR), set_span_in_context
        self._wire = TraceContextTextMapPropagator()
        provider = TracerProvider(resource=Resource.create({"service.name": "model", "service.version": __version__}))
        out = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=SEND_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(out, schedule_delay_millis=1000))
        self._tracer = provider.get_tracer("lab_model", __version__)
        self.on = True

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> Any:
        """The span of a request with these headers. A malformed `traceparent` is ignored."""
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name[:5] == b"trace"}
        return self._tracer.start_span("request", self._wire.extract(sent), self._kind)

    def end(
        self, span: Any, endpoint: str, attributes: dict[str, Any], phases: Iterable[Phase], *, failed: bool
    ) -> None:
        """The request has ended. attributes: with `gen_ai.request.model`."""
        operation = OPERATIONS.get(endpoint, endpoint)
        span.update_name(f"{operation} {attributes['gen_ai.request.model']}")
        span.set_attributes({"gen_ai.operation.name": operation, "gen_ai.provider.name": "llm-lab", **attributes})
        if failed:
            span.set_status(self._failed)
        now, clock = time.time_ns(), time.monotonic()
        for phase in phases:
            began, ended = (now - int((clock - moment) * 1e9) for moment in (phase.began, phase.ended))
            self._tracer.start_span(phase.name, self._within(span), start_time=began).end(ended)
        span.end(now)

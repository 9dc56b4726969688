"""OpenTelemetry spans of the ui's requests to the proxy, sent by OTLP/HTTP; `traceparent` continues the trace there.

Knows operations, models, statuses and times; no prompts, answers or keys. The opentelemetry packages are an extra
(`lab-ui[otel]`) and are imported only if UI_OTLP_ENDPOINT is set.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

SEND_SECONDS = 5.0  # for one batch to the collector


def installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


class Span:
    """One request. headers: to be sent with it. status, error: set by the caller before the end."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.status: int | None = None
        self.error: str | None = None


class Traces:
    """A thread of the SDK sends the spans, the last ones at `close`."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._kind, self._failed, self._within = SpanKind.CLIENT, Status(StatusCode.ERROR), set_span_in_context
        self._wire = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ui"}))
        out = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(out, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("lab_ui")

    @contextlib.contextmanager
    def request(self, path: str, model: object) -> Iterator[Span]:
        """The span of one POST to the proxy, ended with the block. model: the body's, if any."""
        attributes: dict[str, Any] = {"http.request.method": "POST", "url.path": path}
        if isinstance(model, str):
            attributes["gen_ai.request.model"] = model
        made = self._tracer.start_span(f"POST {path}", kind=self._kind, attributes=attributes)
        span = Span()
        self._wire.inject(span.headers, self._within(made))
        try:
            yield span
        except BaseException as error:
            span.error = span.error or type(error).__name__
            raise
        finally:
            if span.status is not None:
                made.set_attribute("http.response.status_code", span.status)
            if span.error is not None:
                made.set_attribute("error.type", span.error)
                made.set_status(self._failed)
            made.end()

    def close(self) -> None:
        self._provider.shutdown()

"""An OTLP/HTTP collector of traces for the tests: what arrives is decoded and kept."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Collector:
    """spans: (service.name, span) in the order of their arrival."""

    url: str = ""
    spans: list[tuple[str, Any]] = field(default_factory=list)

    def of(self, service: str, trace: bytes | None = None) -> list[Any]:
        """A service's spans by start, those of one trace if it is given."""
        found = [span for name, span in self.spans if name == service and trace in (None, span.trace_id)]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(carrier: Any) -> dict[str, Any]:
    """Of a span or a resource."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in carrier.attributes}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
            for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
                service = attributes(resource.resource)["service.name"]
                collector.spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

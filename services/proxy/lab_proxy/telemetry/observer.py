"""The end of each request, passed on to metrics, traces and the access log. Knows records; not how they are written.

The log's lines are written in batches, because waking the log thread costs more than a hit; its formatter turns them
into text in a thread of its own.
"""

import asyncio
import logging
import time
from typing import Any

from ..endpoints import ENDPOINTS, OTHER_ROUTES, QUIET
from .metrics import Metrics
from .record import RequestRecord
from .timing import Timings
from .traces import Traces

log = logging.getLogger("lab_proxy.request")

FLUSH_SECONDS = 0.05

Line = tuple[float, int, dict[str, Any]]  # of the access log: unix seconds, level, fields


class Observer:
    """Records finished requests, whether they came by HTTP or as a line of a batch."""

    def __init__(self, metrics: Metrics, traces: Traces | None = None) -> None:
        self._metrics, self.traces = metrics, traces
        self.timings = Timings()
        self._lines: list[Line] = []

    def observe(self, path: str, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
        route = path if path in ENDPOINTS or path in QUIET or path in OTHER_ROUTES else "other"
        self._metrics.record(route, record, status, seconds, request_id)
        if record.span is not None and self.traces is not None:
            self.traces.end(record.span, route, record, status, request_id)
        if path in ENDPOINTS:
            self.timings.end(request_id, record, status, seconds)
        if route in QUIET and status < 400:
            return
        fields = {
            "request_id": request_id,
            "route": route,
            "model": record.model,
            "upstream": record.upstream,
            "cache": record.cache,
            "status": status,
            "ttft_ms": None if record.ttft is None else round(record.ttft * 1000, 1),
            "tokens": record.prompt_tokens + record.completion_tokens,
            "seconds": round(seconds, 4),
        }
        if record.error:
            fields["error"] = record.error
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)
        self._lines.append((time.time(), logging.WARNING if status >= 500 else logging.INFO, fields))

    def flush(self) -> None:
        """Write the remaining lines of the access log."""
        if self._lines:
            lines, self._lines = self._lines, []
            log.info("requests", extra={"lines": lines})

"""The end of each request, passed on to metrics, traces and access log. Knows records; not how they are written."""

from __future__ import annotations

from ..endpoints import ENDPOINTS, OTHER_ROUTES, QUIET
from .access_log import AccessLog
from .metrics import Metrics
from .record import RequestRecord
from .traces import Traces


class Observer:
    """Records finished requests, whether they came by HTTP or as a line of a batch."""

    def __init__(self, metrics: Metrics, traces: Traces | None = None) -> None:
        self._metrics, self._traces = metrics, traces
        self._access_log = AccessLog()

    def observe(self, path: str, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
        """One request has ended."""
        route = path if path in ENDPOINTS or path in QUIET or path in OTHER_ROUTES else "other"
        self._metrics.record(route, record, status, seconds, request_id)
        if self._traces is not None and path in ENDPOINTS:
            self._traces.record(route, record, status, seconds, request_id)
        if route in QUIET and status < 400:
            return
        self._access_log.write(route, request_id, record, status, seconds)

    def flush(self) -> None:
        """Write the remaining log lines."""
        self._access_log.flush()

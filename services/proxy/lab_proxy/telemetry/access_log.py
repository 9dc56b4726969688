"""The access log: one line for each request, written in batches, because waking the log thread costs more than a hit.

Knows the fields of a line; the log's formatter turns them into text in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from .record import RequestRecord

log = logging.getLogger("lab_proxy.request")

FLUSH_SECONDS = 0.05

Line = tuple[float, int, dict[str, Any]]  # unix seconds, level, fields


class AccessLog:
    """Buffers lines for at most FLUSH_SECONDS. `flush` the rest before the process ends."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def write(self, route: str, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
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
        if self._lines:
            lines, self._lines = self._lines, []
            log.info("requests", extra={"lines": lines})

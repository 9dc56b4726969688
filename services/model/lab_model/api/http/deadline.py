"""The deadline that a caller may set by a header.

Knows one header. Knows nothing of endpoints.
"""

from __future__ import annotations

import time

from starlette.requests import Request as HttpRequest

from ...errors import BadRequestError, deadline_exceeded
from .record import Record

LONGEST_TIMEOUT_MS = 24 * 3600 * 1000


def deadline_of(http: HttpRequest) -> float | None:
    """The request's deadline, as `time.monotonic()`; None: none. Raises BadRequestError, DeadlineExceededError."""
    value = http.headers.get("x-request-timeout-ms")
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 0 < int(value) <= LONGEST_TIMEOUT_MS):
        raise BadRequestError(
            f"The header x-request-timeout-ms must be whole milliseconds from 1 to {LONGEST_TIMEOUT_MS}.",
            param="x-request-timeout-ms",
            code="invalid_value",
        )
    record: Record = http.scope["record"]
    deadline = record.started + int(value) / 1000
    if time.monotonic() >= deadline:
        raise deadline_exceeded()
    return deadline

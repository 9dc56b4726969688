"""All uses of uvicorn's private state: reading a body that has arrived, and writing a response at once.

With uvicorn's own `receive` and `send` a hit takes a quarter longer: they wait for events that have already happened,
and check each header again. A test compares the installed version with CHECKED_UVICORN.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

CHECKED_UVICORN = "0.54"
WRITE_BYTES = 65_536  # a body up to this size is copied behind its head and written at once


def received_body(receive: Callable[[], Awaitable[Any]]) -> bytes | None:
    """The whole body if it has arrived, once per request. None: call `receive`."""
    cycle = getattr(receive, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.more_body or cycle.disconnected:
        return None
    if cycle.waiting_for_100_continue or cycle.response_complete:
        return None
    body, cycle.body = bytes(cycle.body), bytearray()
    cycle.message_event.clear()
    cycle.flow.resume_reading()
    return body


def write_at_once(send: Callable[[Any], Awaitable[None]], head: bytes, body: bytes) -> bool:
    """Write a response of status 200. head: header lines with their line ends, including `content-length`; not checked.
    Returns False if nothing was written: use `send`."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not cycle.keep_alive or len(body) > WRITE_BYTES:
        return False
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
        return False
    parts = [STATUS_LINE[200]]
    for name, value in cycle.default_headers:
        parts += (name, b": ", value, b"\r\n")
    parts += (head, b"\r\n", body)
    cycle.response_started = cycle.response_complete = True
    cycle.transport.write(b"".join(parts))
    cycle.message_event.set()
    cycle.on_response()
    return True

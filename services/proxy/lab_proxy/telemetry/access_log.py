"""One line in the log for each request, written by the turn: to wake the log's thread for each costs more than a hit.

Knows what a line says of a request; the log's formatter makes text of it, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

log = logging.getLogger("lab_proxy.request")

TURN_SECONDS = 0.05

Line = tuple[float, int, dict[str, Any]]  # unix seconds, level, what is said


class Told(Protocol):
    """What a line says of a request's account; call.Account is one. Never a prompt, an answer or a key."""

    model: str
    upstream: str
    cache: str
    error: str
    ttft: float | None
    prompt_tokens: int
    completion_tokens: int


class AccessLog:
    """Lines of at most one turn. `flush` what is left before the process ends."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def write(self, route: str, request_id: str, account: Told, status: int, seconds: float) -> None:
        said = {
            "request_id": request_id,
            "route": route,
            "model": account.model,
            "upstream": account.upstream,
            "cache": account.cache,
            "status": status,
            "ttft_ms": None if account.ttft is None else round(account.ttft * 1000, 1),
            "tokens": account.prompt_tokens + account.completion_tokens,
            "seconds": round(seconds, 4),
        }
        if account.error:
            said["error"] = account.error
        if not self._lines:
            asyncio.get_running_loop().call_later(TURN_SECONDS, self.flush)
        self._lines.append((time.time(), logging.WARNING if status >= 500 else logging.INFO, said))

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            log.info("requests", extra={"lines": lines})

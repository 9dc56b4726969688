"""Reconciliation: the real usage of interrupted calls, read from the model service in the background.

Complete answers report their own usage and need no reconciliation. Knows call ids and token counts, not requests.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ProxyError
from ..tasks import end, supervise
from ..telemetry.record import MAX_TOKENS

log = logging.getLogger("lab_proxy.ledger")

FIRST_SECONDS = 0.1  # the model stops a request within 500 ms, mostly within one step
LONGEST_SECONDS = 5.0  # between two queries for the same call
PATIENCE_SECONDS = 60.0  # for a busy or paused model; a restarted one has no record
STOP_SECONDS = 1.5  # at shutdown
AT_ONCE = 100  # ids in one query
MOST_OPEN = 10_000  # interrupted calls within a minute; further ones keep their estimates


class TokenUsage(NamedTuple):
    """Tokens of one call. `cached`: prompt tokens from the prefix cache."""

    prompt: int
    completion: int
    cached: int


OnUsage = Callable[[TokenUsage], None]
Get = Callable[[str, float], Awaitable[tuple[int, Any]]]  # UpstreamClient.get_json of the model service


@dataclass(slots=True)
class _PendingCall:
    on_usage: OnUsage
    due: float  # time.monotonic()
    until: float
    interval: float = FIRST_SECONDS


class Reconciliation:
    """A part. `enqueue` never waits."""

    def __init__(self, get: Get, on_end: Callable[[str], None] = lambda _: None) -> None:
        """`on_end` gets `exact` or `unknown` for each call."""
        self._get, self._on_end = get, on_end
        self._pending: dict[str, _PendingCall] = {}
        self._some = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = supervise("reconciliation", self._run)

    async def stop(self) -> None:
        """Resolve the most recent calls; the ledger still runs."""
        await end(self._task)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while self._pending:
                    for at in range(0, len(self._pending), AT_ONCE):
                        await self._query(list(self._pending)[at : at + AT_ONCE])
                    await asyncio.sleep(FIRST_SECONDS if self._pending else 0)

    def enqueue(self, call_id: str, on_usage: OnUsage) -> None:
        """A call was interrupted: `on_usage` gets its usage if the model service has it."""
        if len(self._pending) >= MOST_OPEN:
            return self._on_end("unknown")
        now = time.monotonic()
        self._pending[call_id] = _PendingCall(on_usage, now + FIRST_SECONDS, now + PATIENCE_SECONDS)
        return self._some.set()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            # 1. Calls whose next query is due.
            now = time.monotonic()
            due = [call_id for call_id, call in self._pending.items() if call.due <= now][:AT_ONCE]
            if not due:
                await asyncio.sleep(min(call.due for call in self._pending.values()) - now)
                continue
            # 2. Query them. Unknown calls are queried again at growing intervals, up to a limit.
            await self._query(due)
            now = time.monotonic()
            for call_id in due:
                if (call := self._pending.get(call_id)) is None:
                    continue
                call.interval = min(2 * call.interval, LONGEST_SECONDS)
                call.due = now + call.interval
                if now >= call.until:
                    del self._pending[call_id]
                    self._on_end("unknown")
            if not self._pending:
                self._some.clear()

    async def _query(self, ids: list[str]) -> None:
        try:
            status, answer = await self._get("/tally?" + "&".join(f"id={each}" for each in ids), 2.0)
        except ProxyError as error:
            log.debug("the model service does not report usage of calls: %s", error)
            return
        if status != 200 or not isinstance(answer, dict):  # another version of the service
            return
        for call_id in ids:
            found = answer.get(call_id)
            numbers = [found.get(name) for name in TokenUsage._fields] if isinstance(found, dict) else [None]
            valid = all(type(each) is int and 0 <= each <= MAX_TOKENS for each in numbers)
            if valid and (call := self._pending.pop(call_id, None)):
                self._on_end("exact")
                call.on_usage(TokenUsage(*numbers))

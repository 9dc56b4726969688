"""What calls that broke off really used, asked of the model service in the background.

Nothing is asked about a whole answer: it told its own usage. Knows ids and numbers of tokens; does not know what is
done with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ProxyError

log = logging.getLogger("lab_proxy.ledger")

FIRST_SECONDS = 0.1  # the model lets go of a request within 500 ms, mostly within one step
LONGEST_SECONDS = 5.0  # between two questions for the same call
PATIENCE_SECONDS = 60.0  # a model that is busy or paused; one that starts anew has forgotten
STOP_SECONDS = 1.5  # when the proxy ends
AT_ONCE = 100  # ids in one question
MOST_OPEN = 10_000  # calls that broke off within a minute; the numbers of more stay estimates


class TokenUsage(NamedTuple):
    """Tokens of one call. `cached`: those of the prompt that were not computed again."""

    prompt: int
    completion: int
    cached: int


Told = Callable[[TokenUsage], None]
Get = Callable[[str, float], Awaitable[tuple[int, Any]]]  # upstream.Upstream.get of the model service


@dataclass(slots=True)
class _Open:
    told: Told
    due: float  # time.monotonic()
    until: float
    pause: float = FIRST_SECONDS


class Reconciliation:
    """A part. `expect` never waits."""

    def __init__(self, get: Get, on_end: Callable[[str], None] = lambda _: None) -> None:
        """`on_end` hears `exact` or `unknown` of each call."""
        self._get, self._on_end = get, on_end
        self._open: dict[str, _Open] = {}
        self._some = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="tally")

    async def stop(self) -> None:
        """Hear of those that broke off just now; the ledger is open still."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while self._open:
                    for at in range(0, len(self._open), AT_ONCE):
                        await self._ask(list(self._open)[at : at + AT_ONCE])
                    await asyncio.sleep(FIRST_SECONDS if self._open else 0)

    def enqueue(self, call_id: str, told: Told) -> None:
        """A call broke off: `told` hears what it used, should the model tell."""
        if len(self._open) >= MOST_OPEN:
            return self._on_end("unknown")
        now = time.monotonic()
        self._open[call_id] = _Open(told, now + FIRST_SECONDS, now + PATIENCE_SECONDS)
        return self._some.set()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            # 1. Who has waited long enough since the last question.
            now = time.monotonic()
            due = [call_id for call_id, call in self._open.items() if call.due <= now][:AT_ONCE]
            if not due:
                await asyncio.sleep(min(call.due for call in self._open.values()) - now)
                continue
            # 2. Who is not known is asked for again later, ever more seldom, and then no more.
            await self._ask(due)
            now = time.monotonic()
            for call_id in due:
                if (call := self._open.get(call_id)) is None:
                    continue
                call.pause = min(2 * call.pause, LONGEST_SECONDS)
                call.due = now + call.pause
                if now >= call.until:
                    del self._open[call_id]
                    self._on_end("unknown")
            if not self._open:
                self._some.clear()

    async def _ask(self, ids: list[str]) -> None:
        try:
            status, said = await self._get("/tally?" + "&".join(f"id={each}" for each in ids), 2.0)
        except ProxyError as error:
            log.debug("the model service does not tell what calls used: %s", error)
            return
        if status != 200 or not isinstance(said, dict):  # a service of another version, or none at all
            return
        for call_id in ids:
            if (used := _read(said.get(call_id))) is not None and (call := self._open.pop(call_id, None)) is not None:
                self._on_end("exact")
                call.told(used)


def _read(said: Any) -> TokenUsage | None:
    numbers = {name: said.get(name) for name in TokenUsage._fields} if isinstance(said, dict) else {"prompt": None}
    if all(isinstance(each, int) and each >= 0 for each in numbers.values()):
        return TokenUsage(**numbers)
    return None

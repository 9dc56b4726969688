"""One answer of the proxy while it arrives: state, text, times, stop. Also Fault: why an answer or a request failed.

Knows threads and one event loop. Knows nothing of HTTP, Streamlit, languages or pages.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ABANDONED_AFTER = 3.0  # seconds without a `wait`, after which the tab counts as closed, reloaded or on another page
State = Literal["waiting", "streaming", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Fault:
    """Why an answer or a request failed. `kind`: key of a text below `faults`. The other fields come from the proxy's
    answer, if there was one. `retry_after`: the header, mostly seconds."""

    kind: str
    status: int | None = None
    message: str = ""
    retry_after: str | None = None
    code: str | None = None
    request_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Alternative:
    """A token that the model could have chosen. `text` is U+FFFD if its bytes are only a part of a character."""

    text: str
    logprob: float  # natural logarithm, of the raw distribution
    data: bytes = b""


@dataclass(frozen=True)
class Token(Alternative):
    """A generated token, and the most likely tokens at its place, the most likely first."""

    top: tuple[Alternative, ...] = ()


@dataclass
class Answer:
    """What has arrived of an answer. The event loop's thread writes it, any thread reads it; `text` only grows."""

    request: Mapping[str, Any]
    _loop: asyncio.AbstractEventLoop | None = field(repr=False)  # None: a stored answer, which has ended
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # the ui's own; secret, it gives access to the answer
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""
    state: State = "waiting"
    finish_reason: str | None = None
    fault: Fault | None = None
    phase: str = ""  # of a running answer, as the proxy reports it: "queue", "prefill", "decode" …; empty: not known
    cache: str | None = None  # "hit", "miss", "bypass" …; None without a Cache-Status header
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tokens: list[Token] = field(default_factory=list)  # empty unless the request asks for `logprobs`
    cached_tokens: int | None = None  # prompt tokens that the model's prefix cache had
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None  # times of the first and the last content, on the clock of `started`
    last: float | None = None
    ended: float | None = None
    seen: float = field(default_factory=time.monotonic)
    _task: asyncio.Task[None] | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        return not self._over.is_set()

    @property
    def ttft(self) -> float | None:
        """Seconds from the request to the first content."""
        return None if self.first is None else self.first - self.started

    @property
    def seconds(self) -> float:
        """Seconds from the request to the end, or until now."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first, divided by the time after the first. If the text came in one piece: all
        tokens, divided by the whole time."""
        if not self.completion_tokens or self.first is None or self.last is None:
            return None
        if self.completion_tokens > 1 and self.last > self.first:
            return (self.completion_tokens - 1) / (self.last - self.first)
        return self.completion_tokens / max(self.last - self.started, 1e-6)

    def add(self, content: str) -> None:
        """Append a piece of the text."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.text += content
        self.state = "streaming"

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most `seconds`. True if the answer has ended. A page that shows the answer must call
        this at least every ABANDONED_AFTER seconds."""
        self.seen = time.monotonic()
        return self._over.wait(seconds)

    def stop(self) -> None:
        """Cancel the request and keep what has arrived. Returns when the connection is closed, after at most 1 s."""
        if self.running and self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
            self._over.wait(1)

    def start(self, receive: Callable[[Answer], Awaitable[None]]) -> None:
        """Run `receive(self)` as a task of the event loop until it ends, is stopped, or no page shows the answer.
        Raises ValueError for a stored answer."""

        loop = self._loop
        if loop is None:
            raise ValueError("a stored answer cannot be started again")

        def begin() -> None:
            self._task = loop.create_task(self._run(receive))
            self._task.add_done_callback(self._end)

        loop.call_soon_threadsafe(begin)

    async def _run(self, receive: Callable[[Answer], Awaitable[None]]) -> None:
        watch = asyncio.create_task(self._cancel_when_abandoned())
        try:
            await receive(self)
        finally:
            watch.cancel()

    async def _cancel_when_abandoned(self) -> None:
        """Polls, because pages call `wait` from another thread, and a missing call causes no event."""
        while (left := self.seen + ABANDONED_AFTER - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        if self._task is not None:
            self._task.cancel()

    def end(self) -> None:
        """Mark a stored answer as ended."""
        self.ended = self.ended or self.started
        self._over.set()

    def _end(self, task: asyncio.Task[None]) -> None:
        """Runs in the event loop after the connection is closed, also if the task was stopped before its first step."""
        if task.cancelled():
            self.state = "stopped"
        self.ended = time.monotonic()
        self._over.set()

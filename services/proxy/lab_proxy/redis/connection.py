"""A pipelined connection to redis, shared by all requests: commands of one turn of the event loop leave in one write.

Speaks RESP3, so that redis sends invalidations on the same connection, in order with the replies. Knows commands and
replies, not their meaning. A failed connection is not repaired: open another one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis

GRACE_SECONDS = 0.005  # a due timer runs before socket events: a delayed loop reads the socket first

Command = tuple[Any, ...]


class CommandError(Exception):
    """Redis answered one command with an error. `execute` returns it among the replies."""


class Pipeline:
    """Commands that were sent together, and their replies so far."""

    __slots__ = ("deadline", "done", "pushes", "replies", "want")

    def __init__(self, want: int, done: asyncio.Future[Pipeline]) -> None:
        self.want = want
        # time.monotonic(). Set when it is sent, so that a delayed event loop does not count against redis.
        self.deadline = float("inf")
        self.done = done
        self.replies: list[Any] = []
        self.pushes = 0  # push messages received before the first reply


class Connection(asyncio.Protocol):
    """`on_push` gets push messages; `on_lost` gets the reason if the connection ends without `close`."""

    def __init__(self, timeout: float, on_push: Callable[[list[Any]], None], on_lost: Callable[[str], None]) -> None:
        """`timeout`: seconds from sending a pipeline to its last reply."""
        self._timeout = timeout
        self._on_push, self._on_lost = on_push, on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=CommandError, notEnoughData=_NOT_YET)
        self._waiting: deque[Pipeline] = deque()
        self._out: list[bytes] = []
        self._unsent: list[Pipeline] = []
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.pushes = 0

    def execute(self, commands: Sequence[Command]) -> asyncio.Future[Pipeline]:
        """Send commands; the pipeline holds one reply for each, CommandErrors among them.

        Raises (from the future) TimeoutError if not all replies come in time, ConnectionError if the connection ends.
        """
        done: asyncio.Future[Pipeline] = self._loop.create_future()
        if self._transport is None:
            done.set_exception(ConnectionError("closed"))
            return done
        pipeline = Pipeline(len(commands), done)
        self._waiting.append(pipeline)
        self._unsent.append(pipeline)
        if not self._out:
            self._loop.call_soon(self._flush)
        for command in commands:
            self._out.append(hiredis.pack_command(command))
        return done

    def send(self, command: Command) -> None:
        """Send a command that redis answers with a push message (SUBSCRIBE), or not at all."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(command))

    def set_timeout(self, timeout: float) -> None:
        """Change the timeout. No pipeline may be in flight."""
        self._timeout = timeout
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, why: str = "") -> None:
        """Close at once; pipelines in flight get a ConnectionError. `why`: passed to `on_lost`."""
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        for pipeline in self._waiting:
            if not pipeline.done.done():
                pipeline.done.set_exception(ConnectionError(why or "closed"))
        self._waiting.clear()
        if why:
            self._on_lost(why)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._out))
            deadline = time.monotonic() + self._timeout  # loop.time() stands still while a callback runs
            for pipeline in self._unsent:
                pipeline.deadline = deadline
            if self._timer is None:
                self._timer = self._loop.call_later(self._timeout, self._due, False)
        self._out.clear()
        self._unsent.clear()

    def _due(self, again: bool) -> None:
        """The oldest pipeline is late. `again`: the socket was read since; without any reply redis counts as lost."""
        self._timer = None
        now = time.monotonic()
        late = bool(self._waiting) and self._waiting[0].deadline <= now
        if late and not again:
            self._timer = self._loop.call_later(GRACE_SECONDS, self._due, True)
            return
        for pipeline in self._waiting:
            if pipeline.deadline > now:
                if pipeline.deadline != float("inf"):  # otherwise the flush sets the timer
                    self._timer = self._loop.call_later(pipeline.deadline - now, self._due, False)
                return
            if pipeline.done.done():
                continue
            if not pipeline.replies:
                self.close("no answer in time")
                return
            pipeline.done.set_exception(TimeoutError())  # it keeps its place, for its late replies

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.close("no connection")

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while True:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError:
                self.close("no redis")
                return
            if reply is _NOT_YET:
                return
            if isinstance(reply, hiredis.PushNotification):
                self.pushes += 1
                self._on_push(reply)
                continue
            if not self._waiting:
                self.close("an answer to nothing")
                return
            pipeline = self._waiting[0]
            if not pipeline.replies:
                pipeline.pushes = self.pushes
            pipeline.replies.append(reply)
            if len(pipeline.replies) == pipeline.want:
                self._waiting.popleft()
                if not pipeline.done.done():
                    pipeline.done.set_result(pipeline)


_NOT_YET: Any = object()

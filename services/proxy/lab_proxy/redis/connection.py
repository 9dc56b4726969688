"""A pipelined connection to redis, shared by all requests: one write sends all commands of a turn of the event loop.

Speaks RESP3, so that redis sends invalidations on the same connection, in order with the replies. Knows commands and
replies, not their meaning. A failed connection is not repaired: the client opens another one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import hiredis

GRACE_SECONDS = 0.005  # a due timer runs before socket events: a delayed loop reads the socket first
MAX_WAITING = 10_000  # commands without a reply: redis answers so many within 0.2 s; further ones fail at once

Command = tuple[Any, ...]


class RedisError(Exception):
    """Redis is down, late or refuses, or too many commands wait for it."""


class CommandError(RedisError):
    """Redis answered one command with an error. In a pipeline it stands among the replies; it is not raised."""


@dataclass(slots=True, eq=False)
class Pipeline:
    """Commands that were sent together, and their replies so far."""

    want: int
    timeout: float
    done: asyncio.Future[Pipeline]
    replies: list[Any] = field(default_factory=list)
    errors: int = 0  # CommandErrors among the replies
    pushes: int = 0  # push messages received before the first reply
    sent: float = 0.0  # time.monotonic(): before it, a delayed event loop does not count against redis
    timer: asyncio.TimerHandle | None = None


class Connection(asyncio.Protocol):
    """`on_push` gets push messages; `on_lost` gets the reason if the connection ends without `close`."""

    def __init__(self, timeout: float, on_push: Callable[[list[Any]], None], on_lost: Callable[[str], None]) -> None:
        """`timeout`: seconds of silence, while replies are due, after which the connection counts as lost."""
        self.timeout = timeout
        self._on_push, self._on_lost = on_push, on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=CommandError, notEnoughData=_NOT_YET)
        self._waiting: deque[Pipeline] = deque()
        self._count = 0  # commands that wait
        self._out: list[bytes] = []
        self._unsent: list[Pipeline] = []
        self._received = 0.0  # time.monotonic() of redis's last bytes
        self._transport: asyncio.Transport | None = None
        self.pushes = 0

    @property
    def closed(self) -> bool:
        return self._transport is None

    def execute(self, commands: Sequence[Command], timeout: float) -> asyncio.Future[Pipeline]:
        """Send commands; the pipeline holds one reply for each, CommandErrors among them. Raises RedisError (from the
        future) if not all replies come within `timeout` or the connection ends."""
        done: asyncio.Future[Pipeline] = self._loop.create_future()
        if self._transport is None or self._count >= MAX_WAITING:
            done.set_exception(RedisError("too many commands wait" if self._transport else "no connection"))
            return done
        pipeline = Pipeline(len(commands), timeout, done)
        self._count += pipeline.want
        self._waiting.append(pipeline)
        self._unsent.append(pipeline)
        for command in commands:
            self.send(command)
        return done

    def send(self, command: Command) -> None:
        """Send a command that redis answers with a push message (SUBSCRIBE), or not at all."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(command))

    def close(self, why: str = "") -> None:
        """Close at once; pipelines in flight get a RedisError. `why`: passed to `on_lost`."""
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        for pipeline in self._waiting:
            if pipeline.timer:
                pipeline.timer.cancel()
            if not pipeline.done.done():
                pipeline.done.set_exception(RedisError(why or "closed"))
        self._waiting.clear()
        if why:
            self._on_lost(why)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._out))
            now = time.monotonic()  # loop.time() stands still while a callback runs
            for pipeline in self._unsent:
                pipeline.sent = now
                pipeline.timer = self._loop.call_later(min(pipeline.timeout, self.timeout), self._due, pipeline)
        self._out.clear()
        self._unsent.clear()

    def _due(self, pipeline: Pipeline, again: bool = False) -> None:
        """A pipeline may be late, and redis silent. `again`: the socket was read since, so the loop was not delayed."""
        now = time.monotonic()
        age, silence = now - pipeline.sent, now - max(pipeline.sent, self._received)
        if not again:
            wait = GRACE_SECONDS
        elif silence >= self.timeout:
            self.close("no answer in time")
            return
        else:
            wait = self.timeout - silence
            if age >= pipeline.timeout and not pipeline.done.done():
                pipeline.done.set_exception(RedisError("no answer in time"))  # its place is kept for late replies
            elif age < pipeline.timeout:
                wait = min(wait, pipeline.timeout - age)
        pipeline.timer = self._loop.call_later(wait, self._due, pipeline, not again)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transport is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.close("no connection")

    def data_received(self, data: bytes) -> None:
        self._received = time.monotonic()
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
                self.close("a reply without a command")
                return
            pipeline = self._waiting[0]
            if not pipeline.replies:
                pipeline.pushes = self.pushes
            pipeline.replies.append(reply)
            self._count -= 1
            if type(reply) is CommandError:
                pipeline.errors += 1
            if len(pipeline.replies) == pipeline.want:
                self._waiting.popleft()
                if pipeline.timer:
                    pipeline.timer.cancel()
                if not pipeline.done.done():
                    pipeline.done.set_result(pipeline)


_NOT_YET: Any = object()

"""One connection to redis for all requests of a worker: what they ask in one turn of the loop leaves in one write.

Speaks RESP3, so that redis itself tells of changed keys on the same connection, in order with the replies. Knows
commands and replies; does not know what they are about. A connection that fails is not mended: make another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

GRACE_SECONDS = 0.005  # a timer that is due comes before the socket's news: a loop that was late reads these first

Command = tuple[Any, ...]


class CommandError(Exception):
    """Redis answered one command with an error. Found among the replies, not raised."""


class Pipeline:
    """Commands that were sent together, and their replies so far."""

    __slots__ = ("deadline", "done", "pushes", "replies", "want")

    def __init__(self, want: int, done: asyncio.Future[Pipeline]) -> None:
        self.want = want
        self.deadline = float("inf")  # time.monotonic(), from its sending on: a loop that is late is not redis's fault
        self.done = done
        self.replies: list[Any] = []
        self.pushes = 0  # redis's messages that had come before the first reply


class Connection(asyncio.Protocol):
    """`on_push` hears redis's own messages, `on_lost` why the connection ended, unless it was closed."""

    def __init__(self, timeout: float, on_push: Callable[[list[Any]], None], on_lost: Callable[[str], None]) -> None:
        """`timeout`: seconds from a command to its last reply."""
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
        """The batch with one reply for each command, refusals among them.

        Raises (from the future) TimeoutError when not all have come in time, ConnectionError when the connection ends.
        """
        done: asyncio.Future[Pipeline] = self._loop.create_future()
        if self._transport is None:
            done.set_exception(ConnectionError("closed"))
            return done
        batch = Pipeline(len(commands), done)
        self._waiting.append(batch)
        self._unsent.append(batch)
        if not self._out:
            self._loop.call_soon(self._flush)
        for command in commands:
            self._out.append(hiredis.pack_command(command))
        return done

    def send(self, command: Command) -> None:
        """A command that redis answers with a message of its own (SUBSCRIBE), or not at all."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(command))

    def set_timeout(self, timeout: float) -> None:
        """From now on this much patience. Nothing may be under way."""
        self._timeout = timeout
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, why: str = "") -> None:
        """End it at once; those who wait get a ConnectionError. `why`: told to `on_lost`."""
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        for batch in self._waiting:
            if not batch.done.done():
                batch.done.set_exception(ConnectionError(why or "closed"))
        self._waiting.clear()
        if why:
            self._on_lost(why)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._out))
            deadline = time.monotonic() + self._timeout  # the loop's own clock stands still while a callback runs
            for batch in self._unsent:
                batch.deadline = deadline
            if self._timer is None:
                self._timer = self._loop.call_later(self._timeout, self._due, False)
        self._out.clear()
        self._unsent.clear()

    def _due(self, again: bool) -> None:
        """The oldest batch's time is up, `again` once the socket was looked at: without any reply redis is gone."""
        self._timer = None
        now = time.monotonic()
        late = bool(self._waiting) and self._waiting[0].deadline <= now
        if late and not again:
            self._timer = self._loop.call_later(GRACE_SECONDS, self._due, True)
            return
        for batch in self._waiting:
            if batch.deadline > now:
                if batch.deadline != float("inf"):  # else its sending sets the timer
                    self._timer = self._loop.call_later(batch.deadline - now, self._due, False)
                return
            if batch.done.done():
                continue
            if not batch.replies:
                self.close("no answer in time")
                return
            batch.done.set_exception(TimeoutError())  # its place in the line is kept for the replies to come

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

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
            batch = self._waiting[0]
            if not batch.replies:
                batch.pushes = self.pushes
            batch.replies.append(reply)
            if len(batch.replies) == batch.want:
                self._waiting.popleft()
                if not batch.done.done():
                    batch.done.set_result(batch)


class Address:
    """PROXY_REDIS_URL, read once. Raises ValueError for options that this connection does not know."""

    def __init__(self, url: str) -> None:
        given: dict[str, Any] = dict(parse_url(url))
        secure = given.pop("connection_class", None) is SSLConnection
        self._path = given.pop("path", None)
        self._host, self._port = given.pop("host", "localhost"), given.pop("port", 6379)
        self._user, self._password = given.pop("username", None) or "default", given.pop("password", None)
        self._db = given.pop("db", 0)
        self._tls = _tls(given) if secure else None
        if given:
            raise ValueError(f"PROXY_REDIS_URL: {', '.join(sorted(given))} is not supported")

    def hello(self) -> Iterable[Command]:
        """The first commands on a connection."""
        yield ("HELLO", 3, "AUTH", self._user, self._password) if self._password else ("HELLO", 3)
        if self._db:
            yield ("SELECT", self._db)

    async def connect(self, make: Callable[[], Connection]) -> Connection:
        """A connection that has said hello. Raises OSError, TimeoutError, or Refused with redis's own words."""
        loop = asyncio.get_running_loop()
        if self._path:
            _, wire = await loop.create_unix_connection(make, self._path)
        else:
            _, wire = await loop.create_connection(make, self._host, self._port, ssl=self._tls)
        try:
            batch = await wire.execute(list(self.hello()))
            for reply in batch.replies:
                if isinstance(reply, CommandError):
                    raise reply
        except BaseException:
            wire.close()
            raise
        return wire


def _tls(given: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=given.pop("ssl_ca_certs", None))
    if given.pop("ssl_check_hostname", True) in {False, "False", "false", "no", "0"}:
        context.check_hostname = False
    if given.pop("ssl_cert_reqs", "required") == "none":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(KeyError):
        context.load_cert_chain(given.pop("ssl_certfile"), given.pop("ssl_keyfile", None))
    return context


_NOT_YET: Any = object()

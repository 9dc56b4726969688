"""HTTP/1.1 as a client: one origin, its connections, and one answer at a time on each of them.

Small because a miss is made of it: a request is one write, head and body are parsed where they come in, a connection
that is done is used again. Takes GET and POST; follows no redirect, keeps no cookie, asks no proxy, and never repeats
what may have been worked on. Knows bytes, headers and ends; what an answer is about is its reader's affair.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import ssl
import time
import zlib
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs
import httptools

MAX_HEAD_BYTES = 65_536  # of an answer's head, its trailers and what frames its chunks, between two pieces of its body
MAX_BUFFER_BYTES = 131_072  # of a body that nobody takes: from here on its sender has to wait
MAX_INFLATED_BYTES = 16 * 1024 * 1024  # that one read of a compressed body may become
NAMES_SECONDS = 10.0  # how long a host's addresses hold
NEXT_ADDRESS_SECONDS = 0.25  # after which a slow address has company (RFC 8305)
METHODS = frozenset({"GET", "POST"})
IDEMPOTENT = frozenset({"GET"})  # may be sent again when a connection that was used before turns out to be closed

_TARGET = re.compile(r"/[\x21-\x7e]*")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # what would end a header, or hide in one


class Failed(Exception):  # noqa: N818 - the names say what happened
    """There is no answer, or only a part of it."""


class Unreachable(Failed):
    """No connection: nothing was sent."""


class ConnectTimeout(Unreachable):
    """No connection in time."""


class Broken(Failed):
    """The connection ended too early, or what came was no answer."""


class Answer:
    """One answer. Read it to its end, or close it: else its connection is held."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0  # 0: there is no head yet
        self.headers: dict[str, str] = {}  # names in lower case; the first of several of one name
        self.heard = False  # something came of it, be it a single byte
        self._connection: Connection | None = connection  # None: it is whole, or will never be
        self._pieces: list[bytes] = []
        self._size = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._inflate: Any = None

    async def head(self, until: float) -> None:
        """Returns when status and headers are there, at the latest at `until` (the loop's time). Raises Broken, or
        TimeoutError."""
        while not self.status and self._connection is not None:
            await self._news(until)
        if not self.status:
            raise self._error or Broken("no head")

    async def read(self, within: float | None = None) -> bytes:
        """What has come of the body, at least one byte; none at its end.

        Raises TimeoutError after `within` seconds of silence, Broken when the rest will never come.
        """
        while not self._pieces and self._connection is not None:
            await self._news(None if within is None else asyncio.get_running_loop().time() + within)
        if not self._pieces:
            if self._error is not None:
                raise self._error
            return b""
        taken = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if self._size > MAX_BUFFER_BYTES and self._connection is not None:
            self._connection.transport.resume_reading()
        self._size = 0
        return taken

    def close(self) -> None:
        """The rest is not wanted: the other side learns of it at once."""
        if self._connection is not None:
            self._connection.close()

    async def _news(self, until: float | None) -> None:
        """A timer of its own: asyncio.timeout takes four times as long, and a stream waits here for each event."""
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = None if until is None else loop.call_at(until, _late, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    # ---- the connection's side

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """Raises ValueError for a coding that is not known."""
        self.headers = headers
        coding = headers.get("content-encoding", "identity").strip().lower()  # although nobody asked for one
        if coding in {"gzip", "x-gzip", "deflate"}:
            self._inflate = zlib.decompressobj(wbits=47)  # gzip or zlib, as its first bytes say
        elif coding not in {"", "identity"}:
            raise ValueError(f"content-encoding: {coding}")
        self.status = status
        self._wake()

    def put(self, data: bytes) -> None:
        """Raises ValueError or zlib.error for what cannot be decoded."""
        if self._inflate is not None:
            data = self._inflate.decompress(data, MAX_INFLATED_BYTES)
            if self._inflate.unconsumed_tail:
                raise ValueError("it inflates without end")
            if not data:
                return
        if self._size <= MAX_BUFFER_BYTES < self._size + len(data) and self._connection is not None:
            self._connection.transport.pause_reading()
        self._size += len(data)
        self._pieces.append(data)
        self._wake()

    def end(self) -> None:
        """It is whole. Raises ValueError where what was compressed is not."""
        if self._inflate is not None and self._size and not self._inflate.eof:
            raise ValueError("it ends inside of what was compressed")
        if self._size > MAX_BUFFER_BYTES and self._connection is not None:
            self._connection.transport.resume_reading()
        self._connection = None
        self._wake()

    def fail(self, error: Exception) -> None:
        if self._connection is not None:
            self._connection, self._error = None, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _late(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class Connection(asyncio.Protocol):
    """One connection: asked by `send`, once at a time."""

    transport: asyncio.Transport

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._answer: Answer | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._begun = False  # the head of the answer proper is read: what follows are trailers
        self._keep = False  # it can be used again
        self._open_end = False  # the body ends with the connection
        self._size = 0  # bytes of head and trailers
        self._loose = 0  # bytes that came since the last piece of a body
        self.used = 0  # how often it was asked
        self.lost = False

    def send(self, data: bytes) -> Answer:
        self.used += 1
        answer = Answer(self)
        if self.lost:
            answer.fail(Broken("closed"))
            return answer
        self._answer = answer
        self._headers, self._begun, self._keep, self._open_end, self._size, self._loose = {}, False, False, False, 0, 0
        self.transport.write(data)
        return answer

    def close(self, why: str = "closed") -> None:
        """At once, whatever is still to be sent or to come."""
        self.lost = True
        answer, self._answer = self._answer, None
        self._origin.forget(self)
        self.transport.abort()
        if answer is not None:
            answer.fail(Broken(why))

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._origin.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # an answer to nothing, which the next request must not get
            self.close()
            return
        self._answer.heard = True
        self._loose += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.close(f"no HTTP/1.1: {error.__context__ or error}")
        else:
            if self._loose > MAX_HEAD_BYTES:
                self.close("its head is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        answer, self._answer = self._answer, None
        self._origin.forget(self)
        if answer is None:
            return
        try:
            if exc is None and self._open_end:
                answer.end()
        except ValueError as error:
            answer.fail(Broken(str(error)))
        answer.fail(Broken("the connection ended"))  # unless it is whole

    # ---- the parser's side; what is raised here arrives in `data_received`

    def on_message_begin(self) -> None:
        if self._answer is None:
            raise ValueError("more than was asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value) + 4
        if self._size > MAX_HEAD_BYTES:
            raise ValueError("its head is too large")
        if not self._begun:
            self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # interim ones are passed over; whoever did not ask cannot switch protocols
            if status == 101:
                raise ValueError("it switches protocols")
            return
        self._begun = True
        headers, transfer = self._headers, self._headers.get("transfer-encoding")
        if transfer is not None and transfer.lower() != "chunked":
            raise ValueError("a transfer coding that is not known")
        self._open_end = transfer is None and "content-length" not in headers
        self._keep = self._parser.should_keep_alive()
        if self._answer is not None:
            self._answer.begin(status, headers)

    def on_body(self, data: bytes) -> None:
        self._loose = 0
        if self._answer is not None:
            self._answer.put(data)

    def on_message_complete(self) -> None:
        answer = self._answer
        if not self._begun or answer is None:
            self._headers = {}
            return
        answer.end()
        self._answer = None
        self._loose = 0
        if self._keep and not self.transport.get_write_buffer_size():  # else it has not read all of the request
            self._origin.rest(self)
        else:
            self.close()


class Origin:
    """One scheme, host and port, and the headers that go with every request. Made where an event loop runs."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        connect_timeout: float,
        keepalive: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`url` may hold a user, and end in a path that all requests' begin with. Seconds: `connect_timeout` for name,
        connection and TLS together, `keepalive` for a connection that nobody uses. `tls`: instead of the machine's own
        trust.

        Raises ValueError for what is no http or https URL, and for headers that are none.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("it must be an http:// or https:// URL")
        secure = parts.scheme == "https"
        self._host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        self._port = parts.port or (443 if secure else 80)
        self._path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        self._tls = (tls or _trust()) if secure else None
        host = f"[{self._host}]" if ":" in self._host else self._host
        host += "" if parts.port is None else f":{parts.port}"
        always = {"host": host}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            always["authorization"] = f"Basic {b64encode(user.encode()).decode()}"
        self._always = _lines(always | dict(headers or {}))
        self._connect_timeout = connect_timeout
        self._keepalive = keepalive
        self._idle: list[tuple[float, Connection]] = []  # since when
        self._sweeper: asyncio.TimerHandle | None = None
        self._addresses: asyncio.Future[list[Any]] | None = None
        self._looked = 0.0  # time.monotonic()
        self._turn = itertools.count()
        self.connections: set[Connection] = set()

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, within: float
    ) -> Answer:
        """The answer, when its head is there: within so many seconds. Cancelled, it closes the connection.

        Raises ValueError for what is no HTTP, Unreachable, TimeoutError, or Broken.
        """
        sent = self._request(method, path, headers, body)
        until = asyncio.get_running_loop().time() + within
        connection = self._rested() or await self._connect(until)
        while True:
            answer = connection.send(sent)
            try:
                await answer.head(until)
            except Broken:
                if answer.heard or connection.used == 1 or method not in IDEMPOTENT:
                    raise
                connection = await self._connect(until)
            except BaseException:
                answer.close()
                raise
            else:
                return answer

    async def stop(self) -> None:
        """Close every connection, also those in use."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.close()

    def _request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        target = self._path + path
        if method not in METHODS or not _TARGET.fullmatch(target):
            raise ValueError(f"not to be sent: {method[:20]!r} {target[:200]!r}")
        length = f"content-length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {target} HTTP/1.1\r\n{self._always}{_lines(headers)}{length}\r\n"
        return head.encode() + body

    # ---- connections

    def rest(self, connection: Connection) -> None:
        """It is free for another request."""
        self._idle.append((time.monotonic(), connection))
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._keepalive, self._sweep)

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)  # and among the idle ones it is passed over

    def _rested(self) -> Connection | None:
        """The one used last: those that are not needed grow old."""
        while self._idle:
            since, connection = self._idle.pop()
            if time.monotonic() - since < self._keepalive and not connection.transport.is_closing():
                return connection
            connection.close()
        return None

    def _sweep(self) -> None:
        self._sweeper = None
        oldest = time.monotonic() - self._keepalive
        for since, connection in self._idle:
            if since <= oldest:
                connection.close()
        self._idle = [each for each in self._idle if each[0] > oldest]
        if self._idle:
            left = self._idle[0][0] - oldest
            self._sweeper = asyncio.get_running_loop().call_later(left, self._sweep)

    async def _connect(self, until: float) -> Connection:
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._connect_timeout
        try:
            async with asyncio.timeout_at(min(limit, until)):
                found = await self._resolved()
                name = self._host.rstrip(".") if self._tls else None
                if len(found) == 1 and found[0][0] is socket.AF_INET:  # nothing to choose: half the time, for a burst
                    _, connection = await loop.create_connection(
                        lambda: Connection(self), *found[0][4], ssl=self._tls, server_hostname=name
                    )
                    return connection
                first = next(self._turn) % len(found)  # the next one with each connection: several may share the load
                made = await aiohappyeyeballs.start_connection(
                    found[first:] + found[:first], happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1
                )
                try:
                    _, connection = await loop.create_connection(
                        lambda: Connection(self), sock=made, ssl=self._tls, server_hostname=name
                    )
                except BaseException:
                    made.close()
                    raise
        except TimeoutError:
            if until < limit:
                raise
            raise ConnectTimeout("no connection in time") from None
        except OSError as error:  # no such name, nobody there, or a certificate that is not trusted
            raise Unreachable(str(error)) from None
        return connection

    async def _resolved(self) -> list[Any]:
        """The host's addresses. One look for all who wait; who leaves does not end it."""
        looking = self._addresses
        if looking is None or (looking.done() and (looking.exception() or time.monotonic() > self._looked)):
            looking = asyncio.ensure_future(
                asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            )
            looking.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody is left
            self._addresses, self._looked = looking, time.monotonic() + NAMES_SECONDS
        return await asyncio.shield(looking)


def _lines(headers: Mapping[str, str]) -> str:
    """Raises ValueError for a name or a value that would be more than one header."""
    for name, value in headers.items():
        if not _NAME.fullmatch(name) or _CONTROL.search(value):
            raise ValueError(f"not to be sent: the header {name[:100]!r}")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


def _trust() -> ssl.SSLContext:
    """What this machine trusts (SSL_CERT_FILE and SSL_CERT_DIR say otherwise)."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context

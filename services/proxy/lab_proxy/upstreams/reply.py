"""The answer of an upstream call: its headers for the caller, its body whole or in chunks. Knows no retries."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import aiohttp

from ..errors import ProxyError, UpstreamBroken, UpstreamDown, UpstreamTimeout
from ..long_bodies import loads, off_loop
from ..settings import Settings
from ..telemetry.record import UpstreamCall
from .routes import Target

MAX_ERROR_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# Errors after which nothing of the request was sent.
UNSENT = (
    aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL,
)  # fmt: skip
FAILURES = (aiohttp.ClientError, TimeoutError)
_FORWARDED = {
    "retry-after", "x-model-revision", "x-model-replica", "x-should-retry", "openai-processing-ms", "openai-version",
}  # fmt: skip


class UnreadableError(aiohttp.ClientPayloadError):
    """An answer in a form that the proxy did not request; the message names it."""


class Answer:
    """Status, headers and body of one HTTP answer. Its reader closes it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        """Raises UnreadableError, and closes the answer."""
        self._response, self._content = response, response.content
        self.status = response.status
        self.headers: dict[str, str] = {}  # names in lower case; the first of several of one name
        for name, value in response.raw_headers:
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        transfer, coding = (self.headers.get(f"{what}-encoding", "").lower() for what in ("transfer", "content"))
        self._open_end = not transfer and "content-length" not in self.headers  # the body ends with the connection
        protocol = None if response.connection is None else response.connection.protocol
        self._lost = None if protocol is None else protocol.closed  # None: the whole body is here
        if self._lost is not None:
            self._lost.add_done_callback(self._on_lost)
        fault = f"transfer-encoding: {transfer}" if transfer not in {"", "chunked"} else ""
        fault = f"content-encoding: {coding}" if coding not in {"", "identity"} else fault
        fault = f"HTTP status {self.status}" if self.status < 200 else fault
        if fault:
            self.close()
            raise UnreadableError(fault)

    async def read(self, limit: float | None = None) -> bytes:
        """The next bytes of the body as they arrive, none at its end. Raises TimeoutError after `limit` seconds without
        data, aiohttp.ClientError if the rest cannot be read."""
        piece = self._content.read_nowait()
        if not piece and not self._content.at_eof():
            # asyncio.timeout takes four times as long, and a stream waits here for each event.
            loop, silent = asyncio.get_running_loop(), TimeoutError()
            timer = limit and loop.call_later(limit, self._content.set_exception, silent)
            try:
                piece = await self._content.readany()
            finally:
                if timer:
                    timer.cancel()
        if not piece and (error := self._content.exception()):
            raise error
        return piece

    def close(self) -> None:
        """Close the connection unless the whole body has arrived, so that the upstream stops at once."""
        if self._lost is not None:
            self._lost.remove_done_callback(self._on_lost)
        self._response.close()

    def _on_lost(self, lost: asyncio.Future[None]) -> None:
        """aiohttp tells the reader neither of a fault in the body nor of the session's end, and takes a reset for the
        end of a body without length."""
        error = lost.exception()
        if not self._content.is_eof() or (error and self._open_end):
            self._content.set_exception(aiohttp.ClientPayloadError("the connection ended"))


class UpstreamResponse:
    """A 2xx answer whose body was not read yet."""

    def __init__(self, answer: Answer, target: Target, call: UpstreamCall, settings: Settings, redact: bytes) -> None:
        self._answer, self._settings, self._redact = answer, settings, redact
        self.call = call
        self.target = target  # the upstream that answered, which may be a fallback; entries are stored for it
        self.headers = forwarded_headers(answer.headers)
        self.revision = answer.headers.get("x-model-revision")
        self.is_stream = _content_type(answer) == "text/event-stream"
        self.complete = False
        self.on_close: Callable[[UpstreamResponse], None] = _ignore

    async def json(self) -> tuple[bytes, Any]:
        """The body, raw and parsed. Raises UpstreamBroken if it is not JSON."""
        with self._reading():
            raw = await read_whole(self._answer)
        self.complete = True
        try:
            return raw, await off_loop(len(raw), loads, raw)
        except ValueError:
            why = f"{self._answer.status} with {_content_type(self._answer)} instead of JSON: check its base URL."
            raise UpstreamBroken(f"The upstream `{self.target.upstream}` answered {why}") from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises UpstreamTimeout after a long pause, UpstreamBroken if it breaks off."""
        limit = self._settings.first_byte_timeout_seconds
        while True:
            with self._reading():
                piece = await self._answer.read(limit)
            if not piece:
                self.complete = True
                return
            yield piece
            limit = self._settings.idle_timeout_seconds

    async def drain(self) -> None:
        """Read to the end, which is near, so that the connection can be reused."""
        with contextlib.suppress(ProxyError, TimeoutError):
            async with asyncio.timeout(1):
                async for _ in self.chunks():
                    pass
        self.complete = True
        self.call.outcome = ""

    def redact(self, data: bytes) -> bytes:
        """`data` without the upstream's API key, in case an error message repeats it."""
        return data.replace(self._redact, b"[redacted]") if self._redact else data

    def close(self) -> None:
        """Close the answer and report its end, once."""
        self._answer.close()
        done, self.on_close = self.on_close, _ignore
        done(self)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Measure one wait for the body, and map its failure."""
        began = time.perf_counter()
        try:
            yield
        except FAILURES as error:
            self.call.outcome = "broken"
            raise network_error(self.target.upstream, error) from None
        finally:
            self.call.seconds += time.perf_counter() - began


def _ignore(_: UpstreamResponse) -> None:
    """After the end was reported."""


def forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are forwarded to the caller: no cookies, no hop-by-hop headers, nothing about the key's owner.
    Names are in lower case."""
    named = {name: value for name, value in headers.items() if name in _FORWARDED or name.startswith("x-ratelimit-")}
    if "x-request-id" in headers:
        named["x-upstream-request-id"] = headers["x-request-id"]
    return {name: value for name, value in named.items() if value.isprintable()}


def _content_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower() or "no content type"


async def read_whole(answer: Answer, limit: int = MAX_ANSWER_BYTES) -> bytes:
    pieces, size = [], 0
    while piece := await answer.read():
        size += len(piece)
        if size > limit:
            raise aiohttp.ClientPayloadError("it is too large")
        pieces.append(piece)
    return b"".join(pieces)


def network_error(name: str, error: Exception) -> ProxyError:
    where = "PROXY_MODEL_URL, `make logs`" if name == "model" else "its base URL and the network"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamTimeout(f"The upstream `{name}` did not accept a connection in time: check {where}.")
    if isinstance(error, TimeoutError):
        why = "sent no data for too long: ask for less, or raise PROXY_*_TIMEOUT_SECONDS."
        return UpstreamTimeout(f"The upstream `{name}` {why}")
    if isinstance(error, UNSENT):
        why = f"The upstream `{name}` cannot be reached: check {where}; `make start` starts the lab."
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            why = (
                f"The certificate of the upstream `{name}` is not trusted: set SSL_CERT_FILE to a PEM file with the "
                "certificate of the authority that signed it, and check the host name in its base URL."
            )
        if isinstance(error, (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)):
            status = f" It answered {error.status}." if isinstance(error, aiohttp.ClientHttpProxyError) else ""
            why = f"The forward proxy gives no connection to the upstream `{name}`: check HTTPS_PROXY, HTTP_PROXY and "
            why += f"NO_PROXY.{status}"
        return UpstreamDown(why, headers={"retry-after": "2"})
    if isinstance(error, UnreadableError):
        return UpstreamBroken(f"The upstream `{name}` answers with {str(error)[:100]}, which was not requested.")
    return UpstreamBroken(f"The upstream `{name}` broke off its answer: check {where}.")

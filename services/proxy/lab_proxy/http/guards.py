"""Checks of requests: host, origin, content type, body, deadline, query. Knows HTTP, not what a request means."""

import asyncio
import ipaddress
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import parse_qs

from .. import errors
from ..canonical import parse
from ..errors import InvalidRequest, UnsupportedMediaType
from ..keys.authentication import Authenticator
from ..long_bodies import off_loop
from ..requests.delivery import JSON
from ..settings import LOOPBACK, Settings
from .response import PageRequest, Receive
from .uvicorn_internals import received_body

DEADLINE = "x-request-timeout-ms"
CODINGS = "gzip, deflate"
MAX_CODINGS = 2
MAX_MEMBERS = 64  # members of one gzip body; each costs a copy of the bytes after it
MAX_DEADLINE_MS = 24 * 3600 * 1000


class CallerGuard:
    """Checks host and origin, so that a web page cannot use the user's key."""

    def __init__(self, settings: Settings) -> None:
        self._origins = set(settings.allowed_origins)
        self._hosts = LOOPBACK | {"proxy"} | set(settings.allowed_hosts)

    def allows_origin(self, origin: str) -> bool:
        return not self._origins.isdisjoint((origin.lower(), "*"))

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises HostNotAllowed and OriginNotAllowed."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        name = host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts and "*" not in self._hosts and not _is_address(name):
            raise errors.HostNotAllowed("This host name is not allowed: use localhost or set PROXY_ALLOWED_HOSTS.")
        if origin is None or self.allows_origin(origin):
            return
        if origin.lower().partition("://")[2] != host:
            why = "Web pages of this origin may not call the proxy: add the origin to PROXY_ALLOWED_ORIGINS."
            raise errors.OriginNotAllowed(why)


def _is_address(name: str) -> bool:
    """Whether the name is an IP address, as Prometheus uses for pods. Without DNS there is no DNS rebinding."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class BodyReader:
    """Reads bodies within limits of size and time."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes, self._timeout = settings.max_body_bytes, settings.body_timeout_seconds
        self._too_large = f"The body is larger than {self._max_bytes} bytes (PROXY_MAX_BODY_BYTES)."

    async def read(self, headers: Mapping[str, str], receive: Receive, deadline: float | None = None) -> bytes:
        """The whole body. `deadline`: time.perf_counter() of the caller's own deadline. Raises BodyTooLarge,
        BodyTimeout, DeadlineExceeded or ClientDisconnected."""
        raw = received_body(receive)
        if raw is None:
            raw = await self._receive(headers, receive, deadline)
        elif len(raw) > self._max_bytes:
            raise errors.BodyTooLarge(self._too_large)
        codings = headers.get("content-encoding")
        if not codings:
            return raw
        return await asyncio.to_thread(decode_content, raw, codings, self._max_bytes)  # few bytes may decode to many

    async def _receive(self, headers: Mapping[str, str], receive: Receive, deadline: float | None) -> bytes:
        parts: list[bytes] = []
        left = self._timeout if deadline is None else deadline - time.perf_counter()
        try:
            async with asyncio.timeout(min(self._timeout, left)):
                await receive_body(headers, receive, self._max_bytes, self._too_large, parts.append)
        except TimeoutError:
            if left < self._timeout:
                raise errors.DeadlineExceeded from None
            raise errors.BodyTimeout("The body did not arrive in time (PROXY_BODY_TIMEOUT_SECONDS).") from None
        return b"".join(parts)


def decode_content(raw: bytes, codings: str, limit: int) -> bytes:
    """The decoded content of `raw`. codings: of the header Content-Encoding (RFC 9110, section 8.4).

    Raises UnsupportedMediaType for an unknown coding, BodyTooLarge for content of more than `limit` bytes,
    InvalidRequest if the body does not have these codings.
    """
    names = [name for part in codings.split(",") if (name := part.strip().lower()) not in {"", "identity"}]
    if len(names) > MAX_CODINGS:
        why = f"A body has at most {MAX_CODINGS} content codings."
        raise UnsupportedMediaType(why, headers={"accept-encoding": CODINGS})
    for name in reversed(names):
        if name not in {"gzip", "x-gzip", "deflate"}:
            why = f"The content coding `{name[:50]}` is not supported: use {CODINGS} or none."
            raise UnsupportedMediaType(why, headers={"accept-encoding": CODINGS})
        # Some senders of deflate leave out zlib's head, against the RFC.
        kinds = (zlib.MAX_WBITS, -zlib.MAX_WBITS) if name == "deflate" else (zlib.MAX_WBITS + 16,)
        found = next((out for kind in kinds if (out := _inflate(raw, kind, limit)) is not None), None)
        if found is None:
            why = f"The header Content-Encoding says {name}, but the body is not {name}."
            raise InvalidRequest(why, param="content-encoding", code="invalid_value")
        raw = found
    return raw


def _inflate(raw: bytes, kind: int, limit: int) -> bytes | None:
    """None if `raw` is not whole or not of this kind. Raises BodyTooLarge."""
    out = b""
    for _ in range(MAX_MEMBERS):
        decoder = zlib.decompressobj(kind)
        try:
            out += decoder.decompress(raw, limit + 1 - len(out))
        except zlib.error:
            return None
        if len(out) > limit:
            raise errors.BodyTooLarge(f"The body is larger than {limit} bytes when it is decoded.")
        if not decoder.eof:
            return None
        raw = decoder.unused_data  # gzip may have several members
        if not raw:
            return out
    return None


async def receive_body(
    headers: Mapping[str, str], receive: Receive, limit: int, why: str, put: Callable[[bytes], object]
) -> None:
    """Give the body to `put` as it arrives. Raises ClientDisconnected, and BodyTooLarge with `why` beyond the limit."""
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > limit:
        raise errors.BodyTooLarge(why)
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.ClientDisconnected("The client disconnected before the body was complete.")
        data, more = message.get("body", b""), message.get("more_body", False)
        size += len(data)
        if size > limit:
            raise errors.BodyTooLarge(why)
        put(data)


def check_transfer(headers: Mapping[str, str]) -> None:
    """Raises InvalidRequest (501) for a transfer coding other than chunked: RFC 9112, section 6.1."""
    if headers.get("transfer-encoding", "chunked").strip().lower() != "chunked":
        why = "The only supported transfer coding is chunked."
        raise InvalidRequest(why, status=501, headers={"connection": "close"})


def check_json(headers: Mapping[str, str]) -> None:
    """Raises UnsupportedMediaType."""
    given = headers.get("content-type", "")
    if given != JSON and given.partition(";")[0].strip().lower() != JSON:
        raise UnsupportedMediaType("The body must be application/json, and the header `content-type` must say so.")


async def read_json(page: PageRequest) -> dict[str, Any]:
    """The JSON object of a page's body. Raises UnsupportedMediaType and InvalidRequest."""
    check_json(page.headers)
    return await parse_body(await page.read())


async def parse_body(raw: bytes) -> dict[str, Any]:
    """`canonical.parse`, in a thread for a long body."""
    return await off_loop(len(raw), parse, raw)


def read_query(page: PageRequest, known: Collection[str]) -> dict[str, str]:
    """The fields of the query string. Raises InvalidRequest for unknown ones."""
    try:
        fields = parse_qs(page.query.decode("latin-1"), max_num_fields=50)
    except ValueError:
        raise InvalidRequest("The query has more than 50 fields.", param="query") from None
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"Unknown field `{name[:60]}`. Fields: {', '.join(sorted(known))}.", param=name[:60])
    return {name: values[-1] for name, values in fields.items()}


def read_deadline(value: str, started_at: float) -> float:
    """time.perf_counter() of the caller's deadline, by the header DEADLINE. Raises InvalidRequest."""
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 0 < int(value) <= MAX_DEADLINE_MS):
        why = f"The header {DEADLINE} must be whole milliseconds from 1 to {MAX_DEADLINE_MS}."
        raise InvalidRequest(why, param=DEADLINE, code="invalid_value")
    return started_at + int(value) / 1000


def check_operator(headers: Mapping[str, str], keys: Authenticator, *, local: bool = False) -> None:
    """The operator's pages need the admin key, and no web page may call them, whatever its origin. Raises
    OriginNotAllowed, PathNotFound while there is no admin key, and InvalidKey. local: the page needs no key if no keys
    are required and only this machine can reach the proxy."""
    if "origin" in headers:
        raise errors.OriginNotAllowed("Web pages may not call the operator's pages.")
    if local and not keys.required:
        return
    if not keys.has_admin:
        raise errors.PathNotFound("The operator's pages are off: set PROXY_ADMIN_KEY_FILE.")
    if not keys.is_admin(headers):
        raise errors.InvalidKey("The operator's pages need the admin key: `Authorization: Bearer …`.")

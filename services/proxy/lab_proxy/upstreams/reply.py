"""The answer of an upstream call: its headers for the caller, its body whole or in chunks. Knows no retries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson

from ..errors import ProxyError, UpstreamBroken, UpstreamDown, UpstreamTimeout
from ..settings import Settings
from ..telemetry.record import UpstreamCall
from .http1 import Answer, Broken, ConnectTimeout, Failed, Unreachable
from .routes import Target

MAX_ANSWER_BYTES = 256 * 1024 * 1024


_FORWARDED_PREFIX = "x-ratelimit-"


_FORWARDED = frozenset({
    "retry-after", "x-model-revision", "x-should-retry", "openai-processing-ms", "openai-version",
})  # fmt: skip


class UpstreamResponse:
    """A 2xx answer whose body was not read yet."""

    def __init__(self, answer: Answer, target: Target, call: UpstreamCall, settings: Settings, redact: bytes) -> None:
        self._answer = answer
        self._settings = settings
        self._redact = redact
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
            return raw, orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(
                f"The upstream `{self.target.upstream}` answered {self._answer.status} with "
                f"{_content_type(self._answer)} instead of JSON: check its base URL."
            ) from None

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
        except (Failed, TimeoutError) as error:
            self.call.outcome = "broken"
            raise network_error(self.target.upstream, error) from None
        finally:
            self.call.seconds += time.perf_counter() - began


def _ignore(_: UpstreamResponse) -> None:
    """After the end was reported."""


def forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that are forwarded to the caller: no cookies, no hop-by-hop headers, nothing about the key's owner.

    Names are in lower case.
    """
    kept = {name: value for name, value in headers.items() if name in _FORWARDED or name.startswith(_FORWARDED_PREFIX)}
    if "x-request-id" in headers:
        kept["x-upstream-request-id"] = headers["x-request-id"]
    return kept


def _content_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower() or "no content type"


async def read_whole(answer: Answer) -> bytes:
    pieces, size = [], 0
    while piece := await answer.read():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise Broken("it is too large")
        pieces.append(piece)
    return b"".join(pieces)


def network_error(name: str, error: Exception) -> ProxyError:
    """The error for a network fault, with advice."""
    where = "PROXY_MODEL_URL, `make logs`" if name == "model" else "its base URL and the network"
    if isinstance(error, ConnectTimeout):
        return UpstreamTimeout(f"The upstream `{name}` took no connection in time: check {where}.")
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(
            f"The upstream `{name}` was silent for too long: ask for less, or raise PROXY_*_TIMEOUT_SECONDS."
        )
    if isinstance(error, Unreachable):
        return UpstreamDown(
            f"The upstream `{name}` cannot be reached: check {where}; `make start` starts the lab.",
            headers={"retry-after": "2"},
        )
    return UpstreamBroken(f"The upstream `{name}` broke its answer off: check {where}.")

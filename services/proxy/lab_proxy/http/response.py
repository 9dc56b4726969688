"""Requests to pages, and responses, over ASGI. Knows ASGI messages; not the content of bodies."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from ..errors import InvalidRequest
from ..keys.identity import Identity
from ..requests.delivery import JSON, SSE
from ..telemetry.record import RequestRecord
from .uvicorn_internals import write_at_once

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WATCH_AFTER_SECONDS = 0.05
PRIVATE = {"cache-control": "no-store"}
# Headers that differ between requests and whose values need no check.
AT_ONCE = {"x-request-id"} | {
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
}


class Response:
    """One HTTP response; a ResponseWriter."""

    def __init__(self, send: Send, headers: dict[str, str], *, chunks: bool = True) -> None:
        """`headers`: sent with every answer to this request, including `x-request-id`. `chunks`: whether the client
        supports chunked transfer; a client of HTTP/1.0 gets a stream in one piece."""
        self._send = send
        self._whole: list[bytes] | None = None if chunks else []
        self._stream_headers: Mapping[str, str] = {}
        self.headers = headers
        self.record = RequestRecord()
        self.started_at = time.perf_counter()
        self.status = 0
        self.started = False
        self.ended = False

    async def send(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON, status: int = 200) -> None:
        await self._start(status, {"content-type": content_type, "content-length": str(len(body)), **headers})
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def send_prepared(self, body: bytes, headers: Mapping[str, str], head: bytes) -> None:
        own = self.headers
        if own.keys() <= AT_ONCE:
            lines = "".join([f"{name}: {value}\r\n" for name, value in own.items()])
            if write_at_once(self._send, head + lines.encode("latin-1"), body):
                self.started, self.ended, self.status = True, True, 200
                return
        await self.send(body, headers)

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        # x-accel-buffering: a reverse proxy in front must not buffer events.
        headers = {"content-type": SSE, "cache-control": "no-store", "x-accel-buffering": "no", **headers}
        if self._whole is None:
            return await self._start(200, headers)
        self.started, self.status, self._stream_headers = True, 200, headers
        return None

    async def write(self, data: bytes) -> None:
        if self._stream_headers and self._whole is not None:
            return self._whole.append(data)
        return await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        if self._stream_headers and self._whole is not None:
            return await self.send(b"".join(self._whole), self._stream_headers, SSE)
        self.ended = True
        return await self._send({"type": "http.response.body", "body": b""})

    async def send_chunks(self, headers: Mapping[str, str], content_type: str, chunks: AsyncIterator[bytes]) -> None:
        """A body that is not held in memory; `headers` contain its length."""
        await self._start(200, {"content-type": content_type, **headers})
        async for chunk in chunks:
            await self.write(chunk)
        await self.end()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        raw = [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


@dataclass(slots=True)
class PageRequest:
    method: str
    path: str
    query: bytes
    headers: Mapping[str, str]
    identity: Identity
    read: Callable[[], Awaitable[bytes]]  # the body, within its limits of size and time
    receive: Receive  # the body as it arrives, for pages with limits of their own


Page = Callable[[PageRequest, Response], Awaitable[None]]
# (method, path) -> page; a path with `{id}` matches all paths with the same beginning
Pages = Mapping[tuple[str, str], Page]


class DisconnectWatch:
    """Cancels its `with` block when the client disconnects before the end of `response`. The watching task starts late,
    because creating it is a noticeable part of the time of a short answer."""

    def __init__(self, receive: Receive, response: Response) -> None:
        self._receive, self._response = receive, response
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
        self._watching: asyncio.Task[None] | None = None
        self._disconnected = False

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._start)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        if self._watching:
            self._watching.cancel()
        if kind is not asyncio.CancelledError or not self._disconnected or self._task.uncancel():
            return False  # nothing happened, or another task has cancelled it
        self._response.record.error = "client_gone"
        return True

    def _start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._response.ended:
            self._disconnected = True
            self._task.cancel()


def read_limit(query: Mapping[str, str], default: int, most: int) -> int:
    """The field `limit` of a list. Raises InvalidRequest."""
    limit = query.get("limit", str(default))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise InvalidRequest(f"`limit` must be a number from 1 to {most}.", param="limit")
    return int(limit)


def list_page(found: list[dict[str, Any]], query: Mapping[str, str], default: int, most: int) -> bytes:
    """One page of a list, with the SDK's cursor: `after` names the last object of the previous page."""
    limit = read_limit(query, default, most)
    after = query.get("after")
    ids = [each["id"] for each in found]
    if after is not None:
        if after not in ids:
            raise InvalidRequest("`after` is not the id of an object in this list.", param="after")
        found = found[ids.index(after) + 1 :]
    shown = found[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return orjson.dumps({"object": "list", "data": shown, **ends, "has_more": len(shown) < len(found)})

"""HTTP around every request: dispatch by path, errors on the wire, bodies, streams, disconnects.

Knows HTTP. Knows nothing of models; `record` counts and logs requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ... import errors
from .body import decode_content, parse_json
from .record import TRACES, Record, Work, finish_request

log = logging.getLogger(__name__)

BODY_SECONDS = 30
LONG_BODY = 64 * 1024  # bytes; reading a longer one leaves the event loop
SETTLE_SECONDS = 60  # for the engine to end a cancelled request, which usually takes one step
OWN_HOSTS = frozenset({"localhost", "model"})

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]


class HttpService:
    """An ASGI application of exact paths.

    name, revision: of the model that it serves; None if there are several. Answers of one model name this
    process by a random id: callers can see which of several replicas answered.
    """

    def __init__(
        self,
        posts: Mapping[str, Endpoint],
        gets: Mapping[str, Endpoint] | None = None,
        *,
        hosts: Collection[str] = (),
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.set_endpoints(posts, gets or {})
        self._settling: set[asyncio.Task[None]] = set()  # a task that nothing refers to may be collected
        self._name = name
        self._hosts = {*OWN_HOSTS, *hosts}
        self._about = [(b"x-model-revision", revision.encode())] if revision else []
        self._about += [(b"x-model-replica", secrets.token_hex(4).encode())] if name else []

    def set_endpoints(self, posts: Mapping[str, Endpoint], gets: Mapping[str, Endpoint]) -> None:
        """Replace all endpoints, by path; one that ends with `/` takes every path that begins so."""
        self._endpoints = {("POST", path): endpoint for path, endpoint in posts.items()}
        self._endpoints |= {("GET", path): endpoint for path, endpoint in gets.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        if scope["type"] == "websocket":
            await refuse_websocket(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Ray Serve adds an id to a request without one, and sends the id with the answer.
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or new_id("req")
        call_id = headers.get(b"x-call-id", b"").decode("latin-1")[:128] or request_id
        record = Record(request_id, call_id, path.removeprefix("/v1/"), time.monotonic(), self._name)
        if TRACES.on and scope["method"] == "POST":
            record.span = TRACES.begin(scope["headers"])
        scope["record"] = record
        started = complete = False

        async def observed_send(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                message["headers"] = [*message["headers"], *self._about]
            elif not message.get("more_body"):
                complete = True
            if scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            response = await self._respond(HttpRequest(scope, receive), path)
            await response(scope, receive, observed_send)
        except (ClientGoneError, ClientDisconnect):
            pass
        except Exception:
            log.exception("a response was interrupted")
            if not started:
                raise
        finally:
            if complete:
                failed = record.outcome == "error" or record.status >= 400
                record.outcome = "forwarded" if record.outcome == "forwarded" else "error" if failed else "done"
            self._end(scope["method"], record)

    def _end(self, method: str, record: Record) -> None:
        """Record the request: a complete response with the tokens that it reports, an interrupted one with those
        computed until the engine ended it. Refused requests, and those that never began, count no tokens."""
        refused = 400 <= record.status < 499 or record.status == 503
        if record.outcome not in {"done", "forwarded"}:
            record.prompt_tokens = record.completion_tokens = record.cached_tokens = 0
            if record.work is not None and not refused:
                # In a task of its own: this one may be cancelled.
                task = asyncio.get_running_loop().create_task(self._settle(method, record, record.work))
                self._settling.add(task)
                return task.add_done_callback(self._settling.discard)
        return finish_request(method, record)

    async def _settle(self, method: str, record: Record, work: Work) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await work.ended.wait()
        record.prompt_tokens, record.completion_tokens, record.cached_tokens = work.used()
        finish_request(method, record)

    def _check_host(self, host: str) -> None:
        """Raise HostError unless the host is allowed. A page whose name was rebound to this address (DNS rebinding)
        still sends that name; IP addresses are safe."""
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()
        if (
            name not in self._hosts
            and "*" not in self._hosts
            and not re.fullmatch(r"[0-9.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", name)
        ):
            raise errors.HostError("This host name is not allowed: use localhost or set MODEL_ALLOWED_HOSTS.")

    async def _respond(self, http: HttpRequest, path: str) -> Response:
        try:
            if path not in ("/health", "/ready"):
                self._check_host(http.headers.get("host", ""))
            method = "GET" if http.method == "HEAD" else http.method
            if endpoint := self._endpoints.get((method, path)) or self._prefixed(method, path):
                return await endpoint(http)
            methods = {method for method, known in self._endpoints if known == path}
            if path.startswith("/v1/models/") and method == "GET":
                name = path.removeprefix("/v1/models/")
                raise errors.NotFoundError(
                    f"The model '{name[:200]}' does not exist.", param="model", code="model_not_found"
                )
            if methods:
                raise errors.MethodNotAllowedError(f"{path} allows {', '.join(sorted(methods))}, not {http.method}.")
            raise errors.NotFoundError(f"{path} is not a path of this service.", code="not_found")
        except errors.ApiError as error:
            return Json(error.body(), error.status, error.headers)
        except (ClientGoneError, ClientDisconnect):
            raise
        except Exception:
            log.exception("a request failed unexpectedly")
            fault = errors.ServerError("The model service failed on this request; its log has the trace.")
            return Json(fault.body(), fault.status)

    def _prefixed(self, method: str, path: str) -> Endpoint | None:
        found = (
            endpoint
            for (verb, begin), endpoint in self._endpoints.items()
            if verb == method and begin.endswith("/") and path.startswith(begin)
        )
        return next(found, None)


class ClientGoneError(Exception):
    """The client closed its connection."""


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientGoneError when the client disconnects.

    Cancellation by the server (Ray Serve does it, uvicorn does not) cancels `work` too.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for part in (task, gone):
            if not part.done():
                part.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await part


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class EventStream(Response):
    """Server-sent events from an iterator, which is closed when the client disconnects. An exception of the iterator
    becomes a last event with the error."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes], status: int = 200) -> None:
        self._source = source
        self.status_code, self.background = status, None
        # Proxies on the way must not buffer tokens.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("http_version") == "1.0":  # without chunked transfer: in one piece, with its length
            whole = b"".join([part async for part in self._parts(scope["record"])])
            self.headers["content-length"] = str(len(whole))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": whole})
            return

        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # Closed explicitly: otherwise an abandoned answer would keep its slot in the engine until garbage
            # collection.
            async with contextlib.aclosing(self._parts(scope["record"])) as parts:
                async for part in parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await until_disconnect(receive, stream())

    async def _parts(self, record: Record) -> AsyncGenerator[bytes]:
        try:
            async with contextlib.aclosing(self._source):
                async for part in self._source:
                    yield part
        except errors.ApiError as error:
            record.outcome = "error"
            yield sse(error.body())
        except Exception:
            if not self.headers["content-type"].startswith(self.media_type):
                raise  # the connection breaks off: JSON has no place for an error
            log.exception("a stream failed unexpectedly")
            record.outcome = "error"
            yield sse(errors.ServerError("The model service failed on this answer; its log has the trace.").body())


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


async def refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a handshake as any unknown path; servers without that extension answer 403."""
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        return await send({"type": "websocket.close"})
    error = errors.NotFoundError(f"There is no WebSocket at {scope['path']}: send HTTP requests.", code="not_found")
    headers = [(b"content-type", b"application/json")]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    return await send({"type": "websocket.http.response.body", "body": orjson.dumps(error.body())})


async def read_json(http: HttpRequest, limit: int) -> Any:
    """The body as JSON, of at most `limit` bytes, also when decoded. Raises an ApiError for a wrong type, size, coding
    or syntax."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise errors.MediaTypeError("Send the request as application/json.")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise errors.BodyTooLargeError(f"The body is larger than {limit} bytes.")
    except TimeoutError:
        raise errors.BodyTooSlowError(f"The body did not arrive within {BODY_SECONDS} s.") from None
    coding = http.headers.get("content-encoding", "")

    def read() -> Any:
        return parse_json(decode_content(b"".join(parts), coding, limit))

    return await asyncio.to_thread(read) if size > LONG_BODY or coding else read()  # few bytes may decode to many


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"

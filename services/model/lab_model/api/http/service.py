"""What happens once around every request: errors on the wire, log line, metrics, a client that leaves.

Knows HTTP; knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeVar

import orjson
from prometheus_client import Counter, Histogram
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ... import errors
from ..wire.answers import new_id
from .usage import Tally, Used

log = logging.getLogger(__name__)

BODY_SECONDS = 30
SETTLE_SECONDS = 60  # for the engine to let go of what nobody waits for: one step, as a rule
OWN_HOSTS = frozenset({"localhost", "model"})

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]

REQUESTS = Counter("model_requests_total", "Requests answered.", ["model", "endpoint", "status"])
SECONDS = Histogram(
    "model_request_seconds", "Seconds from request to the end of its answer.", ["model", "endpoint"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)  # fmt: skip
TTFT = Histogram(
    "model_ttft_seconds", "Seconds from request to its first token.", ["model"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
TOKENS = Counter(
    "model_tokens_total", "Tokens of answers, and what was computed for those that broke off.", ["model", "kind"]
)
TALLY = Tally()


class Work(Protocol):
    """What is computed for one request."""

    ended: asyncio.Event

    def used(self) -> Used:
        """So far; final when `ended` is set."""


@dataclass(slots=True)
class Record:
    """What the log line and the metrics of one request say. Never prompts, never answers."""

    request_id: str
    call_id: str  # of this request alone: a caller may use its request id again
    endpoint: str
    started: float
    model: str | None = None
    status: int = 499  # nothing was answered: the client left
    ttft: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    outcome: str = "gone"
    work: Work | None = None


class JsonLines(logging.Formatter):
    """One JSON object a line; fields of a request come in `record.fields`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"ts": f"{moment}.{record.msecs:03.0f}Z", "level": record.levelname.lower()}
        line |= {"service": "model"} | getattr(record, "fields", {"message": record.getMessage()})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        said = " ".join(f"{k}={v}" for k, v in fields.items()) if fields else record.getMessage()
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} model {record.levelname.lower()} {said}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def start_logging(form: Literal["json", "text"], pipe: Path) -> None:
    """Send this package's log into the service's pipe, or to stderr on a machine where it is not (another Ray node).

    Ray's own way from a replica's stderr to the driver's adds prefixes and a process between. Called once a process.
    """
    try:
        # Never block on the reader: a line that does not fit is lost, a request is not.
        output: TextIO = os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w", buffering=1, encoding="utf-8")
    except OSError:
        output = sys.stderr
    logging.raiseExceptions = False
    lines = logging.StreamHandler(output)
    lines.setFormatter(JsonLines() if form == "json" else TextLines())
    mine = logging.getLogger("lab_model")
    mine.handlers, mine.propagate = [lines], False
    mine.setLevel(logging.INFO)


class Service:
    """An ASGI application of exact paths; every answer but a stream's is a Response.

    `name` and `revision` are of the one model that is served, None where there are several.
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
        self._endpoints = {("POST", path): endpoint for path, endpoint in posts.items()}
        self._endpoints |= {("GET", path): endpoint for path, endpoint in (gets or {}).items()}
        self._settling: set[asyncio.Task[None]] = set()
        self._name = name
        self._hosts = {*OWN_HOSTS, *hosts}
        self._revision = [(b"x-model-revision", revision.encode())] if revision else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Ray Serve gives a request without an id one, and puts the id on the answer.
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or new_id("req")
        call_id = headers.get(b"x-call-id", b"").decode("latin-1")[:128] or request_id
        record = Record(request_id, call_id, path.removeprefix("/v1/"), time.monotonic(), self._name)
        scope["record"] = record
        started = whole = False

        async def answer(message: Message) -> None:
            nonlocal started, whole
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                message["headers"] = [*message["headers"], *self._revision]
            elif not message.get("more_body"):
                whole = True
            await send(message)

        try:
            response = await self._respond(HttpRequest(scope, receive), path)
            await response(scope, receive, answer)
        except (ClientGoneError, ClientDisconnect):
            pass
        except Exception:
            log.exception("an answer broke off")
            if not started:
                raise
        finally:
            if whole:
                failed = record.outcome == "error" or record.status >= 400
                record.outcome = "forwarded" if record.outcome == "forwarded" else "error" if failed else "done"
            self._end(scope["method"], record)

    def _end(self, method: str, record: Record) -> None:
        """Count it: a whole answer by what it tells, one that broke off by what was computed when the engine has let go
        of it. What was refused, or never begun, counts nothing."""
        refused = 400 <= record.status < 499 or record.status == 503
        if record.outcome not in {"done", "forwarded"}:
            record.prompt_tokens = record.completion_tokens = record.cached_tokens = 0
            if record.work is not None and not refused:
                # A task of its own: this one may be cancelled.
                task = asyncio.get_running_loop().create_task(self._settle(method, record, record.work))
                self._settling.add(task)
                return task.add_done_callback(self._settling.discard)
        return account(method, record)

    async def _settle(self, method: str, record: Record, work: Work) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await work.ended.wait()
        record.prompt_tokens, record.completion_tokens, record.cached_tokens = work.used()
        account(method, record)

    def _check_host(self, host: str) -> None:
        """A web page that rebound its own name to this address still sends that name; an address is no such name."""
        name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()
        if (
            name not in self._hosts
            and "*" not in self._hosts
            and not re.fullmatch(r"[0-9.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", name)
        ):
            raise errors.HostError("No such host here: use localhost, or name it in MODEL_ALLOWED_HOSTS.")

    async def _respond(self, http: HttpRequest, path: str) -> Response:
        try:
            if path not in ("/health", "/ready"):
                self._check_host(http.headers.get("host", ""))
            if endpoint := self._endpoints.get((http.method, path)):
                return await endpoint(http)
            known = {method for method, there in self._endpoints if there == path}
            if known:
                raise errors.MethodNotAllowedError(f"{path} takes {', '.join(sorted(known))}, not {http.method}.")
            raise errors.NotFoundError(f"There is no {path} here.", code="not_found")
        except errors.ApiError as error:
            return Json(error.body(), error.status, error.headers)
        except (ClientGoneError, ClientDisconnect):
            raise
        except Exception:
            log.exception("a request failed unexpectedly")
            fault = errors.ServerError("The model service failed on this request; its log has the trace.")
            return Json(fault.body(), fault.status)


def account(method: str, record: Record) -> None:
    """The log line and the metrics of a request that has ended."""
    if record.outcome == "forwarded" or (method == "GET" and record.status in (200, 503)):
        return  # another process says it; health checks and scrapes come several a second and say nothing new
    seconds = time.monotonic() - record.started
    model, status = record.model or "-", 499 if record.outcome == "gone" else record.status
    # A path nobody serves would make a label of its own for each.
    endpoint = record.endpoint if record.status != 404 else "-"
    REQUESTS.labels(model, endpoint, status).inc()
    SECONDS.labels(model, endpoint).observe(seconds)
    TOKENS.labels(model, "prompt").inc(record.prompt_tokens)
    TOKENS.labels(model, "completion").inc(record.completion_tokens)
    TALLY.put(record.call_id, Used(record.prompt_tokens, record.completion_tokens, record.cached_tokens))
    if record.ttft is not None:
        TTFT.labels(model).observe(record.ttft)
    fields = {
        "request_id": record.request_id,
        "model": record.model,
        "endpoint": record.endpoint,
        "status": status,
        "outcome": record.outcome,
        "ttft_ms": None if record.ttft is None else round(record.ttft * 1000, 1),
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.completion_tokens,
        "seconds": round(seconds, 4),
    }
    log.info("request", extra={"fields": fields})


class ClientGoneError(Exception):
    """The client left; there is nobody to answer."""


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientGoneError as soon as the client leaves; `work` is cancelled then.

    The server's own cancellation (Ray Serve does it, uvicorn does not) ends `work` the same way.
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
    """Server-sent events from an iterator that is closed when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes], status: int = 200) -> None:
        self._source = source
        self.status_code, self.background = status, None
        # No buffering on the way: a token is worth nothing late.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # Closed by name: left to the collector, an abandoned answer would keep its place for a while.
            async with contextlib.aclosing(self._source):
                async for part in self._source:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await until_gone(receive, stream())


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


async def read_json(http: HttpRequest, limit: int) -> Any:
    """The body as JSON. Raises the WireError for a wrong type, size or syntax."""
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
        raise errors.BodyTooSlowError(f"The body did not come within {BODY_SECONDS} s.") from None
    try:
        return orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise errors.BadRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None

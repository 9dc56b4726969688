"""The proxy as an ASGI application: who may come in, what lies at which path, the log line and the metrics.

Raw ASGI: this is the hot path. Knows HTTP; what an answer is made of is the exchange's affair.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import re
import time
import traceback
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from random import getrandbits  # an id is no secret
from typing import Any, Protocol, cast

import orjson

from .. import __version__, canonical, errors
from ..batches.worker import BatchWorker
from ..cache.entry import CHAT, COMPLETIONS, EMBEDDINGS
from ..cache.flight import SingleFlight
from ..cache.store import CacheControl
from ..errors import ProxyError
from ..keys.authentication import LOCAL, Identity, NoKeys
from ..ledger.reconciliation import Reconciliation
from ..requests.context import RequestContext, RequestRecord
from ..requests.executor import STALLED_CLIENT_SECONDS, Executor
from ..requests.responses import RESPONSES
from ..requests.roles import JSON, SSE, Limiter, Recorder
from ..settings import LOOPBACK, Settings
from ..telemetry.access_log import AccessLog
from ..telemetry.metrics import Metrics
from ..upstreams.client import UpstreamPool
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes
from .pages.cache import FLUSH, CachePages, Shelves

log = logging.getLogger("lab_proxy.request")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ENDPOINTS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES})
KEYED = ("/v1/", "/usage", "/cache/")  # where a virtual key is asked for, if there are any
OPERATOR = "/admin/"  # no web page's affair, wherever it comes from
UNCHECKED = frozenset({"/health", "/ready"})  # probes call by address; these pages tell a stranger nothing
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: logged only when they fail
OTHERS = frozenset({"/status", "/v1/models", "/v1/files", "/v1/batches"})  # routes that metrics tell apart
WATCHED = QUIET | {"/status"}  # answered to the last
MOST_HOSTS = 100
DEADLINE = "x-request-timeout-ms"
LONGEST_DEADLINE_MS = 24 * 3600 * 1000
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Part(Protocol):
    """What the server's lifespan starts and stops."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Doorkeeper(Part, Protocol):
    """keys.Keys as the application sees it."""

    async def authenticate(self, headers: Mapping[str, str]) -> Identity:
        """Who asks. Raises KeyRefused and KeysUnavailable."""

    def is_admin(self, headers: Mapping[str, str]) -> bool: ...


class StoreService(Shelves, Part, Protocol):
    """The cache with what its life and the status page need."""

    @property
    def up(self) -> bool: ...

    async def report(self) -> dict[str, Any]: ...


class Response:
    """One answer on its way out; the exchange's `Out` (roles)."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        """`headers`: those of every answer to this request, `x-request-id` among them."""
        self._send = send
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

    async def send_prepared(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, 200
        own = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in self.headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers + own})
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        # x-accel-buffering: a reverse proxy in front must not hold events back.
        await self._start(200, {"content-type": SSE, "cache-control": "no-store", "x-accel-buffering": "no", **headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def send_chunks(self, headers: Mapping[str, str], content_type: str, parts: AsyncIterator[bytes]) -> None:
        """A body that is not held in memory; `headers` say its length."""
        await self._start(200, {"content-type": content_type, **headers})
        async for part in parts:
            await self.write(part)
        await self.end()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        raw = [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


@dataclass(slots=True)
class PageRequest:
    """One request to a page: what lies outside of the exchange."""

    method: str
    path: str
    query: bytes
    headers: Mapping[str, str]
    identity: Identity
    read: Callable[[], Awaitable[bytes]]  # the body, within its limits of size and time
    receive: Receive  # the body as it comes, for who bounds it otherwise


Page = Callable[[PageRequest, "Response"], Awaitable[None]]
Trace = Callable[[str, RequestRecord, int, float, str], None]  # route, account, status, seconds, request id


class App:
    """Parts are handed in and started by the server's lifespan."""

    draining = False  # the server says so: new work is refused, what runs goes on

    def __init__(
        self,
        settings: Settings,
        cache: StoreService,
        upstreams: UpstreamPool,
        routes: Routes,
        metrics: Metrics,
        *,
        keys: Doorkeeper | None = None,
        limits: Limiter | None = None,
        ledger: Recorder | None = None,
        flights: SingleFlight | None = None,
        parts: Sequence[Part] = (),
        reports: Mapping[str, Callable[[], Any]] | None = None,
        trace: Trace | None = None,
        pages: Mapping[tuple[str, str], Page] | None = None,
        batches: BatchWorker | None = None,
    ) -> None:
        """`upstreams` holds one of kind `model`, whose ids are read in the background.

        `parts`: further ones with a life of their own; `pages`: further ones, by method and path. Left out: open to
        everybody, and no limits. `reports`: what the status page asks beside its own. `trace` hears of each request's
        end.
        """
        self._settings = settings
        self._keys = keys or NoKeys()
        self._model_list = local = ModelList(upstreams, settings.model_poll_seconds)
        self._cache, self._upstreams, self._routes = cache, upstreams, routes
        self._metrics = metrics
        self._access_log = AccessLog()
        self._reports = dict(reports or {})
        self._trace = trace
        metrics.watch(self._gauges)
        tally = Reconciliation(self._ask_model, lambda outcome: metrics.count("reconciled", outcome))
        self._executor = Executor(
            settings, cache, upstreams, routes, local, limits=limits, ledger=ledger, flights=flights, tally=tally
        )
        self._parts: list[Part] = [upstreams, cache, local, self._keys, *parts, tally, *([flights] if flights else [])]
        self._pages: dict[tuple[str, str], Page] = {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/status"): self._status,
            ("GET", "/metrics"): self._metrics_page,
            ("GET", "/v1/models"): self._models,
        }
        self._folders: dict[tuple[str, str], Page] = {("GET", "/v1/models/"): self._model}  # and all below
        self._pages |= CachePages(self._executor, cache, self._keys).pages()
        for (method, place), page in (pages or {}).items():
            (self._folders if place.endswith("/") else self._pages)[method, place] = page
        self.begun = self.ended = 0  # requests to the exchange: batches stand behind them
        if batches is not None:
            pages, folders = batches.serve(self._executor, self)
            self._pages |= pages
            self._folders |= folders
            self._parts.append(batches)
        self._accepted_hosts: set[str] = set()  # `host` headers that were found good
        self._hosts = LOOPBACK | {"proxy"} | set(settings.allowed_hosts)
        self._started = time.time()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            raise RuntimeError(f"unexpected ASGI scope {scope['type']}")
        return await self._request(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            await receive()
            for part in self._parts:
                stack.push_async_callback(part.stop)
                await part.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        self._access_log.flush()
        await send({"type": "lifespan.shutdown.complete"})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            said = value.decode("latin-1")
            key = name.decode("latin-1")
            headers[key] = f"{headers[key]},{said}" if key in headers else said
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{getrandbits(96):024x}"
        origin = headers.get("origin")
        always = {"x-request-id": request_id}
        foreign = origin and not scope["path"].startswith(OPERATOR)
        if origin and foreign and {origin.lower(), "*"} & set(self._settings.allowed_origins):
            always |= {"access-control-allow-origin": origin, "access-control-expose-headers": "*", "vary": "origin"}
        if self.draining:
            always["connection"] = "close"
        out = Response(send, always)
        account = out.record
        path: str = scope["path"]
        status = 0
        try:
            if self.draining and path not in WATCHED:
                raise errors.Draining
            await self._dispatch(scope, headers, receive, out)
            status = out.status or 499
        except ProxyError as error:
            status, account.error = error.status, error.code or error.type
            await out.send(error.body(), error.headers, status=status)
        except asyncio.CancelledError:
            status, account.error = 499, "cancelled"
            raise
        except Exception as error:
            status, account.error = 500, type(error).__name__
            where = "".join(traceback.format_tb(error.__traceback__))  # not the message: it may hold what was asked
            log.error("fault in the proxy: %s\n%s", account.error, where)  # noqa: TRY400
            fault = ProxyError(f"A fault in the proxy: its log names {request_id}.", code="proxy_fault")
            with suppress(TimeoutError):
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    if not out.started:
                        await out.send(fault.body(), {}, status=500)
                    elif not out.ended:
                        await out.write(b"data: " + fault.body() + b"\n\n")
                        await out.end()
        finally:
            self.tell(path, request_id, account, status, time.perf_counter() - out.started_at)

    async def _dispatch(self, scope: Message, headers: Mapping[str, str], receive: Receive, out: Response) -> None:
        method, path = scope["method"], scope["path"]
        # 1. Who may come in: a web page must not spend the user's key.
        if path not in UNCHECKED:
            self._check_caller(headers)
        if method == "OPTIONS" and headers.get("origin") and not path.startswith(OPERATOR):
            allow = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
            allow["access-control-allow-headers"] = headers.get("access-control-request-headers", "content-type")
            return await out.send(b"", allow)
        # 2. What lies here, and whose request it is.
        page = None if path in ENDPOINTS else self._page(method, path)
        keyed = path.startswith(KEYED) and not (path == FLUSH and self._keys.is_admin(headers))
        identity = await self._keys.authenticate(headers) if keyed else LOCAL
        if page is not None:
            visit = PageRequest(
                method, path, scope["query_string"], headers, identity, lambda: self._body(headers, receive), receive
            )
            return await page(visit, out)
        if method != "POST":
            raise errors.MethodNotAllowed(f"{path} takes POST.", headers={"allow": "POST"})
        if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise errors.UnsupportedMediaType(
                "The body must be application/json, and the header `content-type` must say so."
            )
        # 3. What is asked.
        due = _due(headers[DEADLINE], out.started_at) if DEADLINE in headers else None
        raw = await self._body(headers, receive, due)
        plain = "cache-control" not in headers and "x-cache-sampled" not in headers
        known = self._executor.planner.cached_plan(identity.tenant, path, raw) if plain else None
        call = RequestContext(
            identity=identity,
            endpoint=path,
            raw=raw,
            body=canonical.parse(raw) if known is None else known.body,
            request_id=out.headers["x-request-id"],
            cache_control=CacheControl.read(headers.get("cache-control", "")),
            store_sampled=headers.get("x-cache-sampled", "").lower() == "true",
            started=out.started_at,
            record=out.record,
            cached_plan=known,
            plan_cacheable=plain,
            caller_deadline=due,
        )
        if await self._executor.serve_local_hit(call, out):
            return None
        # 4. Answer it, unless the caller leaves first.
        self.begun += 1
        watch = DisconnectWatch(receive, out)
        gone = asyncio.ensure_future(watch.run())
        try:
            await self._executor.answer(call, out)
        except asyncio.CancelledError:
            if not watch.left or watch.task.uncancel():  # somebody else ends it
                raise
            out.record.error = "client_gone"
        finally:
            self.ended += 1
            gone.cancel()

    def _check_caller(self, headers: Mapping[str, str]) -> None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if origin is None and host in self._accepted_hosts:
            return
        name = host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts and "*" not in self._hosts:
            raise errors.HostNotAllowed("No such host here: use localhost, or name it in PROXY_ALLOWED_HOSTS.")
        if origin is None:
            if len(self._accepted_hosts) < MOST_HOSTS:
                self._accepted_hosts.add(host)
            return
        allowed = self._settings.allowed_origins
        if origin.lower() not in allowed and "*" not in allowed and origin.lower().partition("://")[2] != host:
            raise errors.OriginNotAllowed(
                "A web page of this origin may not call the proxy: PROXY_ALLOWED_ORIGINS lists who may."
            )

    async def _body(self, headers: Mapping[str, str], receive: Receive, due: float | None = None) -> bytes:
        """`due`: time.perf_counter() when the caller's own time is over."""
        limit = self._settings.max_body_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(limit)
        reading = _read(receive, limit)
        try:
            waiting = reading.send(None)  # mostly it is all there: then no timer is needed
        except StopIteration as read:
            whole: bytes = read.value
            return whole
        longest = self._settings.body_timeout_seconds
        left = longest if due is None else due - time.perf_counter()
        try:
            async with asyncio.timeout(min(longest, left)):
                return await _resumed(reading, waiting)
        except TimeoutError:
            if left < longest:
                raise errors.DeadlineExceeded from None
            raise errors.BodyTimeout("The body did not come in time (PROXY_BODY_TIMEOUT_SECONDS).") from None

    async def _ask_model(self, path: str, limit: float) -> tuple[int, Any]:
        return await self._upstreams.model_service.get_json(path, limit)

    # ---- pages

    def _page(self, method: str, path: str) -> Page:
        """Raises NoSuchPath and NoSuchMethod."""
        method = "GET" if method == "HEAD" else method
        pages = {verb: page for (verb, place), page in self._pages.items() if place == path}
        pages = pages or {verb: page for (verb, place), page in self._folders.items() if path.startswith(place)}
        if method in pages:
            return pages[method]
        takes = sorted(pages)
        if not takes:
            raise errors.PathNotFound(
                f"There is nothing at {path[:200]}: see /v1/models, /v1/chat/completions, /status."
            )
        raise errors.MethodNotAllowed(f"{path[:200]} takes {', '.join(takes)}.", headers={"allow": ", ".join(takes)})

    async def _health(self, _: PageRequest, out: Response) -> None:
        await out.send(b'{"status":"ok"}', {})

    async def _ready(self, _: PageRequest, out: Response) -> None:
        model = await self._model_list.ready()
        ready = model["state"] == "up"
        if self.draining:
            ready, model = False, model | {"state": "draining"}
        word = ("ready" if self._cache.up or not self._cache.enabled else "degraded") if ready else model["state"]
        said = {"status": word, "model": model["state"], "redis": "up" if self._cache.up else "down"}
        await out.send(orjson.dumps(said), {}, status=200 if ready else 503)

    async def _status(self, _: PageRequest, out: Response) -> None:
        model, redis = await asyncio.gather(self._model_list.ready(), self._cache.report())
        entries = redis.pop("entries", None)
        hits, misses = self._metrics.totals()
        cache = {"enabled": self._cache.enabled, "hits": hits, "misses": misses}
        said = {
            "proxy": {
                "version": __version__,
                "python": platform.python_version(),
                "started": int(self._started),
                "upstreams": self._upstreams.status(),
                "draining": self.draining,
                **{name: report() for name, report in self._reports.items()},
            },
            "redis": redis,
            "model": model,
            "cache": cache if entries is None else cache | {"entries": entries},
        }
        await out.send(orjson.dumps(said), {})

    async def _metrics_page(self, visit: PageRequest, out: Response) -> None:
        page, form = self._metrics.page(visit.headers.get("accept", ""))
        await out.send(page, {}, form)

    def _listed(self, who: Identity) -> dict[str, dict[str, Any]]:
        """The names that `who` may use."""
        local = self._model_list.entries
        aliases = self._routes.aliases(local)
        every = {**local, **{name: {**local[model], "id": name, "alias_of": model} for name, model in aliases.items()}}
        if who.models is None:
            return every
        return {name: each for name, each in every.items() if who.allows(name, each.get("alias_of", name))}

    async def _models(self, visit: PageRequest, out: Response) -> None:
        await out.send(orjson.dumps({"object": "list", "data": list(self._listed(visit.identity).values())}), {})

    async def _model(self, visit: PageRequest, out: Response) -> None:
        name = visit.path.removeprefix("/v1/models/")
        entry = self._listed(visit.identity).get(name)
        if entry is None and not visit.identity.allows(name):
            raise errors.ModelNotAllowed(f"This key is not for the model `{name[:200]}`.", param="model")
        if entry is None:
            self._routes.resolve(name, self._model_list.entries)  # says why not, or that an upstream takes the name
            raise errors.ModelNotFound(f"`{name[:200]}` goes to an upstream, which is not asked for its list.", name)
        await out.send(orjson.dumps(entry), {})

    def _gauges(self) -> dict[str, dict[tuple[str, ...], float]]:
        return {
            "in_flight": {(): float(self.begun - self.ended)},
            "draining": {(): float(self.draining)},
            "redis_up": {(): float(self._cache.up)} if self._cache.enabled else {},
            "breaker_open": {(name,): float(is_open) for name, is_open in self._upstreams.breaker_states().items()},
        }

    # ---- the record of a request

    def tell(self, path: str, request_id: str, account: RequestRecord, status: int, seconds: float) -> None:
        route = path if path in ENDPOINTS or path in QUIET or path in OTHERS else "other"
        self._metrics.record(route, account, status, seconds, request_id)
        if self._trace is not None and path in ENDPOINTS:
            self._trace(route, account, status, seconds, request_id)
        if route in QUIET and status < 400:
            return
        self._access_log.write(route, request_id, account, status, seconds)


def _due(given: str, began: float) -> float:
    """When the caller's time is over, by the header that says how much it is. Raises InvalidRequest."""
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 0 < int(given) <= LONGEST_DEADLINE_MS):
        raise errors.InvalidRequest(
            f"The header {DEADLINE} is whole milliseconds from 1 to {LONGEST_DEADLINE_MS}.",
            param=DEADLINE,
            code="invalid_value",
        )
    return began + int(given) / 1000


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.ClientDisconnected("The caller left before the body was whole.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)


@types.coroutine
def _resumed(begun: Coroutine[Any, Any, bytes], waiting: Any) -> Generator[Any, Any, bytes]:
    """Await a coroutine whose first step is made: `waiting` is what it waits for."""
    while True:
        try:
            try:
                said = yield waiting
            except BaseException as error:  # the coroutine's to handle
                waiting = begun.throw(error)
            else:
                waiting = begun.send(said)
        except StopIteration as done:
            whole: bytes = done.value
            return whole


def _too_large(limit: int) -> errors.BodyTooLarge:
    return errors.BodyTooLarge(f"The body is larger than {limit} bytes (PROXY_MAX_BODY_BYTES).")


class DisconnectWatch:
    """Cancels the task that made it when the caller leaves before the end of `out`."""

    def __init__(self, receive: Receive, out: Response) -> None:
        self._receive, self._out = receive, out
        self.task = cast("asyncio.Task[None]", asyncio.current_task())
        self.left = False

    async def run(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._out.ended:
            self.left = True
            self.task.cancel()

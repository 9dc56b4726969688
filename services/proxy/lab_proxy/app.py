"""The proxy as an ASGI application: who may come in, what lies at which path, the log line and the metrics.

Raw ASGI: this is the hot path. Knows HTTP; what an answer is made of is the exchange's affair.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from . import __version__, canonical, errors
from .cache import Wishes
from .entry import CHAT, COMPLETIONS, EMBEDDINGS
from .errors import ProxyError
from .exchange import JSON, SSE, STALLED_CLIENT_SECONDS, Account, Call, Exchange, Store
from .routes import Routes
from .settings import LOOPBACK, Settings
from .upstream import LocalModels, Upstream

log = logging.getLogger("lab_proxy.request")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TENANT = "local"  # without virtual keys there is one tenant
ENDPOINTS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS})
UNCHECKED = frozenset({"/health", "/ready"})  # probes call by address; these pages tell a stranger nothing
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds: logged only when they fail
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MOST_MODELS = 200  # names that /metrics tells apart: a caller may invent any number of them
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Part(Protocol):
    """What the server's lifespan starts and stops."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class StoreService(Store, Part, Protocol):
    """The cache with what its life and the status page need."""

    @property
    def up(self) -> bool: ...

    async def report(self) -> dict[str, Any]: ...


class Metrics:
    """What /metrics tells. One instance for one application, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by = ("route", "model", "cache")
        self.requests = Counter("lab_proxy_requests", "Requests answered.", (*by, "status"), registry=self.registry)
        self.seconds = Histogram(
            "lab_proxy_request_seconds", "Time to the end of the answer.", by, registry=self.registry, buckets=_BUCKETS
        )
        self.ttft = Histogram(
            "lab_proxy_ttft_seconds",
            "Time to the first token of a stream.",
            by,
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self.tokens = Counter(
            "lab_proxy_tokens", "Tokens of answers, by where they came from.", ("model", "source", "kind"),
            registry=self.registry,
        )  # fmt: skip
        self.redis_errors = Counter(
            "lab_proxy_redis_errors", "Operations that redis failed.", ("operation",), registry=self.registry
        )
        self.hits = 0
        self.misses = 0
        self._models = {""}

    def record(self, route: str, account: Account, status: int, seconds: float) -> None:
        model = account.model
        if account.known and len(self._models) <= MOST_MODELS:
            self._models.add(model)
        if model not in self._models:
            model = "other"
        labels = (route, model, account.cache)
        self.requests.labels(*labels, str(status)).inc()
        self.seconds.labels(*labels).observe(seconds)
        if account.ttft is not None:
            self.ttft.labels(*labels).observe(account.ttft)
        if account.prompt_tokens or account.completion_tokens:
            source = "cache" if account.cache == "hit" else "upstream"
            self.tokens.labels(model, source, "prompt").inc(account.prompt_tokens)
            self.tokens.labels(model, source, "completion").inc(account.completion_tokens)
        self.hits += account.cache == "hit"
        self.misses += account.cache in {"miss", "request", "partial"}


class Response:
    """One answer on its way out; the exchange's `Out`."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        """`headers`: those of every answer to this request, `x-request-id` among them."""
        self._send = send
        self.headers = headers
        self.account = Account()
        self.began = time.perf_counter()
        self.status = 0
        self.started = False
        self.ended = False

    async def whole(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON, status: int = 200) -> None:
        await self._start(status, {"content-type": content_type, "content-length": str(len(body)), **headers})
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def head(self, headers: Mapping[str, str]) -> None:
        # x-accel-buffering: a reverse proxy in front must not hold events back.
        await self._start(200, {"content-type": SSE, "cache-control": "no-store", "x-accel-buffering": "no", **headers})

    async def piece(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started, self.status = True, status
        raw = [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class App:
    """Parts are handed in and started by the server's lifespan."""

    def __init__(
        self,
        settings: Settings,
        cache: StoreService,
        upstreams: Mapping[str, Upstream],
        routes: Routes,
        *,
        local: LocalModels,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._cache, self._upstreams, self._routes, self._local = cache, upstreams, routes, local
        self._metrics = metrics
        self._exchange = Exchange(settings, cache, upstreams, routes, local)
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
            parts: list[Part] = [*self._upstreams.values(), self._cache, self._local]
            for part in parts:
                stack.push_async_callback(part.stop)
                await part.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            said = value.decode("latin-1")
            key = name.decode("latin-1")
            headers[key] = f"{headers[key]},{said}" if key in headers else said
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        origin = headers.get("origin")
        always = {"x-request-id": request_id}
        if origin and {origin.lower(), "*"} & set(self._settings.allowed_origins):
            always |= {"access-control-allow-origin": origin, "access-control-expose-headers": "*", "vary": "origin"}
        out = Response(send, always)
        account = out.account
        path: str = scope["path"]
        status = 0
        try:
            await self._dispatch(scope["method"], path, headers, receive, out)
            status = out.status or 499
        except ProxyError as error:
            status, account.error = error.status, error.code or error.type
            await out.whole(error.body(), error.headers, status=status)
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
                        await out.whole(fault.body(), {}, status=500)
                    elif not out.ended:
                        await out.piece(b"data: " + fault.body() + b"\n\n")
                        await out.end()
        finally:
            self._tell(path, request_id, account, status, time.perf_counter() - out.began)

    async def _dispatch(
        self, method: str, path: str, headers: Mapping[str, str], receive: Receive, out: Response
    ) -> None:
        # 1. Who may come in: a web page must not spend the user's key.
        if path not in UNCHECKED:
            self._check_caller(headers)
        if method == "OPTIONS" and headers.get("origin"):
            allow = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
            allow["access-control-allow-headers"] = headers.get("access-control-request-headers", "content-type")
            return await out.whole(b"", allow)
        # 2. What lies here.
        if path not in ENDPOINTS:
            page = self._page(path)
            if page is None:
                raise errors.NoSuchPath(
                    f"There is nothing at {path[:200]}: see /v1/models, /v1/chat/completions, /status."
                )
            if method not in {"GET", "HEAD"}:
                raise errors.NoSuchMethod(f"{path[:200]} takes GET.", headers={"allow": "GET"})
            return await page(out)
        if method != "POST":
            raise errors.NoSuchMethod(f"{path} takes POST.", headers={"allow": "POST"})
        if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise errors.NotJson("The body must be application/json, and the header `content-type` must say so.")
        # 3. What is asked.
        raw = await self._body(headers, receive)
        call = Call(
            tenant=TENANT,
            endpoint=path,
            raw=raw,
            body=canonical.parse(raw),
            request_id=out.headers["x-request-id"],
            wishes=Wishes.read(headers.get("cache-control", "")),
            store_sampled=headers.get("x-cache-sampled", "").lower() == "true",
            started=out.began,
            account=out.account,
        )
        # 4. Answer it, unless the caller leaves first.
        work = asyncio.ensure_future(self._exchange.answer(call, out))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not out.ended:
                out.account.error = "client_gone"
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            else:
                await work
        finally:
            gone.cancel()
            work.cancel()

    def _check_caller(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "").lower()
        name = host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts and "*" not in self._hosts:
            raise errors.HostRefused("No such host here: use localhost, or name it in PROXY_ALLOWED_HOSTS.")
        origin = headers.get("origin")
        if origin is None:
            return
        allowed = self._settings.allowed_origins
        if origin.lower() not in allowed and "*" not in allowed and origin.lower().partition("://")[2] != host:
            raise errors.OriginRefused(
                "A web page of this origin may not call the proxy: PROXY_ALLOWED_ORIGINS lists who may."
            )

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        refusal = errors.BodyTooLarge(f"The body is larger than {limit} bytes (PROXY_MAX_BODY_BYTES).")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise refusal
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise errors.CallerGone("The caller left before the body was whole.")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise refusal
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise errors.BodyTooSlow("The body did not come in time (PROXY_BODY_TIMEOUT_SECONDS).") from None

    # ---- pages

    def _page(self, path: str) -> Callable[[Response], Awaitable[None]] | None:
        pages = {
            "/health": self._health,
            "/ready": self._ready,
            "/status": self._status,
            "/metrics": self._metrics_page,
            "/v1/models": self._models,
        }
        if path.startswith("/v1/models/"):
            return lambda out: self._model(path.removeprefix("/v1/models/"), out)
        return pages.get(path)

    async def _health(self, out: Response) -> None:
        await out.whole(b'{"status":"ok"}', {})

    async def _ready(self, out: Response) -> None:
        model = await self._local.ready()
        ready = model["state"] == "up"
        word = ("ready" if self._cache.up or not self._cache.enabled else "degraded") if ready else model["state"]
        said = {"status": word, "model": model["state"], "redis": "up" if self._cache.up else "down"}
        await out.whole(orjson.dumps(said), {}, status=200 if ready else 503)

    async def _status(self, out: Response) -> None:
        model, redis = await asyncio.gather(self._local.ready(), self._cache.report())
        entries = redis.pop("entries", None)
        upstreams = [{"name": name, "configured": each.access.configured} for name, each in self._upstreams.items()]
        cache = {"enabled": self._cache.enabled, "hits": self._metrics.hits, "misses": self._metrics.misses}
        said = {
            "proxy": {
                "version": __version__,
                "python": platform.python_version(),
                "started": int(self._started),
                "upstreams": upstreams,
            },
            "redis": redis,
            "model": model,
            "cache": cache if entries is None else cache | {"entries": entries},
        }
        await out.whole(orjson.dumps(said), {})

    async def _metrics_page(self, out: Response) -> None:
        await out.whole(generate_latest(self._metrics.registry), {}, "text/plain; version=0.0.4; charset=utf-8")

    def _listed(self) -> dict[str, dict[str, Any]]:
        local = self._local.entries
        aliases = self._routes.aliases(local)
        return {**local, **{name: {**local[model], "id": name, "alias_of": model} for name, model in aliases.items()}}

    async def _models(self, out: Response) -> None:
        await out.whole(orjson.dumps({"object": "list", "data": list(self._listed().values())}), {})

    async def _model(self, name: str, out: Response) -> None:
        entry = self._listed().get(name)
        if entry is None:
            self._routes.resolve(name, self._local.entries)  # says why not, or that an upstream takes the name
            raise errors.NoSuchModel(f"`{name[:200]}` goes to an upstream, which is not asked for its list.", name)
        await out.whole(orjson.dumps(entry), {})

    # ---- the record of a request

    def _tell(self, path: str, request_id: str, account: Account, status: int, seconds: float) -> None:
        route = path if path in ENDPOINTS or path in QUIET or path in {"/status", "/v1/models"} else "other"
        self._metrics.record(route, account, status, seconds)
        if route in QUIET and status < 400:
            return
        said = {
            "request_id": request_id,
            "route": route,
            "model": account.model,
            "upstream": account.upstream,
            "cache": account.cache,
            "status": status,
            "ttft_ms": None if account.ttft is None else round(account.ttft * 1000, 1),
            "tokens": account.prompt_tokens + account.completion_tokens,
            "seconds": round(seconds, 4),
        }
        said |= {"error": account.error} if account.error else {}
        log.log(logging.WARNING if status >= 500 else logging.INFO, "request", extra={"said": said})


def create_app(
    settings: Settings, cache: StoreService, upstreams: Mapping[str, Upstream], routes: Routes, metrics: Metrics
) -> App:
    """The application from its parts. `upstreams` holds one of kind `model`, whose ids are read in the background."""
    model = next(upstream for upstream in upstreams.values() if upstream.access.kind == "model")
    return App(
        settings, cache, upstreams, routes, local=LocalModels(model, settings.model_poll_seconds), metrics=metrics
    )


async def _gone(receive: Receive) -> None:
    """Returns when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        pass

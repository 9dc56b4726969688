"""The ASGI app: guards, authentication, dispatch to pages and to the executor, errors, and the record of each request.

Raw ASGI, because this is the hot path. Knows HTTP; does not produce answers.
"""

import asyncio
import logging
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from random import getrandbits  # an id is no secret
from typing import Protocol

from .. import errors
from ..cache.policy import CacheControl
from ..endpoints import ADMIN_TOO, ALWAYS_SERVED, ENDPOINTS, KEYED, MONITORED, OPERATE_MODELS, OPERATOR, UNCHECKED
from ..errors import ProxyError
from ..keys.authentication import Authenticator
from ..keys.identity import LOCAL
from ..redis.connection import RedisError
from ..requests.context import RequestContext, Traffic
from ..requests.executor import STALLED_CLIENT_SECONDS, Executor
from ..settings import LOOPBACK, Settings
from ..telemetry.observer import Observer
from .guards import (
    DEADLINE,
    BodyReader,
    CallerGuard,
    check_json,
    check_operator,
    check_transfer,
    parse_body,
    read_deadline,
)
from .response import DisconnectWatch, Message, Page, PageRequest, Pages, Receive, Response, Send

log = logging.getLogger("lab_proxy.request")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Part(Protocol):
    """A part that the app's lifespan starts and stops."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class App:
    def __init__(
        self,
        settings: Settings,
        executor: Executor,
        *,
        keys: Authenticator,
        traffic: Traffic,
        observer: Observer,
        pages: Pages,
        parts: Sequence[Part],
    ) -> None:
        """`parts` are started in this order, and stopped in the reverse order."""
        self._settings, self._executor, self._keys = settings, executor, keys
        self._traffic, self._observer, self._parts = traffic, observer, parts
        self._pages = {place: page for place, page in pages.items() if "{" not in place[1]}
        self._prefixes = {(verb, path.partition("{")[0]): page for (verb, path), page in pages.items() if "{" in path}
        self._guard, self._bodies = CallerGuard(settings), BodyReader(settings)

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
        self._observer.flush()
        await send({"type": "lifespan.shutdown.complete"})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        # 1. Headers of the request, and those of every response to it.
        headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            value = raw_value.decode("latin-1")
            name = raw_name.decode("latin-1")
            headers[name] = f"{headers[name]},{value}" if name in headers else value
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{getrandbits(96):024x}"
        origin = headers.get("origin")
        always = {"x-request-id": request_id}
        if origin and not scope["path"].startswith(OPERATOR) and self._guard.allows_origin(origin):
            always |= {"access-control-allow-origin": origin, "access-control-expose-headers": "*", "vary": "origin"}
        draining = self._traffic.draining
        if draining:
            always["connection"] = "close"
        # 2. The response, or an error.
        response = Response(send, always, chunks=scope.get("http_version") != "1.0")
        record = response.record
        path: str = scope["path"]
        if self._observer.traces is not None and path in ENDPOINTS:
            record.span = self._observer.traces.begin(headers)
        status = 0
        try:
            if draining and path not in ALWAYS_SERVED:
                raise errors.Draining
            await self._dispatch(scope, headers, receive, response)
            status = response.status or 499
        except ProxyError as error:
            status, record.error = error.status, error.code or error.type
            await response.send(error.body(), error.headers, status=status)
        except asyncio.CancelledError:
            status, record.error = 499, "cancelled"
            raise
        except Exception as error:
            status, record.error = 500, type(error).__name__
            where = "".join(traceback.format_tb(error.__traceback__))  # not the message: it may contain a prompt
            log.error("fault in the proxy: %s\n%s", record.error, where)  # noqa: TRY400
            fault = ProxyError(f"The proxy has a fault: see its log for {request_id}.", code="proxy_fault")
            with suppress(TimeoutError):
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    if not response.started:
                        await response.send(fault.body(), {}, status=500)
                    elif not response.ended:
                        await response.write(b"data: " + fault.body() + b"\n\n")
                        await response.end()
        finally:
            self._observer.observe(path, request_id, record, status, time.perf_counter() - response.started_at)

    async def _dispatch(self, scope: Message, headers: Mapping[str, str], receive: Receive, response: Response) -> None:
        method, path = scope["method"], scope["path"]
        if "transfer-encoding" in headers:
            check_transfer(headers)
        # 1. Host and origin.
        if path not in UNCHECKED:
            self._guard.check(headers)
        if method == "OPTIONS" and headers.get("origin") and not path.startswith(OPERATOR):
            allow = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
            allow["access-control-allow-headers"] = headers.get("access-control-request-headers", "content-type")
            return await response.send(b"", allow)
        # 2. The page, and the caller.
        page = None if path in ENDPOINTS else self._page(method, path)
        keyed = path.startswith(KEYED) or (path in MONITORED and not self._settings.metrics_public)
        keyed = keyed and not (path in ADMIN_TOO and self._keys.is_admin(headers))
        identity = await self._keys.authenticate(headers) if keyed else LOCAL
        if page is not None:
            if path.startswith(OPERATOR):
                local = path.startswith(OPERATE_MODELS) and self._settings.host in LOOPBACK
                check_operator(headers, self._keys, local=local)
            read = partial(self._bodies.read, headers, receive)
            request = PageRequest(method, path, scope["query_string"], headers, identity, read, receive)
            try:
                return await page(request, response)
            except RedisError:
                if response.started:
                    raise
                why = "Redis is down or refuses commands, and it stores the keys and the usage."
                raise errors.KeysUnavailable(why, headers={"retry-after": "2"}) from None
        if method != "POST":
            raise errors.MethodNotAllowed(f"{path} allows POST only.", headers={"allow": "POST"})
        check_json(headers)
        # 3. The request.
        deadline = read_deadline(headers[DEADLINE], response.started_at) if DEADLINE in headers else None
        raw = await self._bodies.read(headers, receive, deadline)
        record = response.record
        record.tenant, record.began_at, record.read_at = identity.tenant, response.started_at, time.perf_counter()
        plain = "cache-control" not in headers and "x-cache-sampled" not in headers
        cached = self._executor.planner.cached_plan(identity.tenant, path, raw) if plain else None
        asked = RequestContext(
            identity=identity,
            endpoint=path,
            raw=raw,
            body=await parse_body(raw) if cached is None else cached.request.body,
            request_id=response.headers["x-request-id"],
            cache_control=CacheControl.read(headers.get("cache-control", "")),
            store_sampled=headers.get("x-cache-sampled", "").lower() == "true",
            started=response.started_at,
            record=record,
            cached_plan=cached,
            plan_cacheable=plain,
            caller_deadline=deadline,
        )
        if await self._executor.serve_local_hit(asked, response):
            return None
        # 4. The answer, unless the client disconnects.
        self._observer.timings.begin(asked.request_id, record)
        self._traffic.started += 1
        try:
            with DisconnectWatch(receive, response):
                await self._executor.answer(asked, response)
                await asyncio.sleep(0)  # uvloop writes at the end of its turn: before the request is counted as ended
        finally:
            self._traffic.ended += 1

    def _page(self, method: str, path: str) -> Page:
        """Raises PathNotFound and MethodNotAllowed."""
        method = "GET" if method == "HEAD" else method
        pages = {verb: page for (verb, place), page in self._pages.items() if place == path}
        pages = pages or {verb: page for (verb, place), page in self._prefixes.items() if path.startswith(place)}
        if not pages:
            why = f"{path[:200]} is not a path of this proxy: see /v1/models, /v1/chat/completions, /status."
            raise errors.PathNotFound(why)
        if method not in pages:
            allowed = ", ".join(sorted(pages))
            raise errors.MethodNotAllowed(f"{path[:200]} allows {allowed} only.", headers={"allow": allowed})
        return pages[method]

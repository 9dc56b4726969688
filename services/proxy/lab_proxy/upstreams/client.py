"""HTTP client of one upstream: one request, with retries and a bound on every wait.

Maps all faults of network and upstream to the errors of this package. Knows nothing of the cache or callers.
"""

import asyncio
import contextlib
import io
import itertools
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from .. import __version__
from ..errors import CircuitOpen, ProxyError, UpstreamBroken, UpstreamLimited, UpstreamRefused
from ..long_bodies import loads, off_loop
from ..settings import Settings
from ..telemetry.metrics import Metrics
from ..telemetry.record import UpstreamCall
from ..telemetry.traces import Traces
from .breaker import CircuitBreaker
from .reply import (
    FAILURES,
    MAX_ERROR_BYTES,
    UNSENT,
    Answer,
    UpstreamResponse,
    forwarded_headers,
    network_error,
    read_whole,
)
from .routes import Target, UpstreamConfig

KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn and others close idle connections
LONGEST_WAIT_SECONDS = 2.0  # a longer Retry-After is passed on to the caller
BACKOFF_SECONDS = 0.1  # before the first retry, doubled for each further one; half of it is jitter
MAX_PAGE_BYTES = 8 * 1024 * 1024  # of a page about the upstream itself, such as its list of models
MAX_LINE_BYTES = 65_536  # status line or one header of an answer
CALLERS_FAULT = frozenset({400, 413, 422})  # not 404, which can also mean a wrong base URL
PASSING = frozenset({502, 503, 504})  # temporary errors of gateways: nothing was generated, so a retry is safe


@dataclass(slots=True)
class UpstreamRequest:
    endpoint: str
    request_id: str
    stream: bool
    deadline: float  # time.perf_counter() at which the whole answer is due
    body: Callable[[Target], bytes]
    on_call: Callable[[UpstreamCall], None] = lambda _: None  # called at the end of each call
    caller_deadline: float | None = None  # the caller's own; sent to the model service, not enforced here
    admit: Callable[[UpstreamCall, UpstreamConfig], Awaitable[None]] | None = None  # before each call; may raise
    size: int = 0  # bytes of the caller's body
    on_begin: Callable[[UpstreamCall], None] = lambda _: None  # called at the beginning of each call
    span: Any = None  # the request's, of OpenTelemetry


class UpstreamFault(Exception):  # noqa: N818 - it never leaves this room
    """Why there is no answer. `retry_after`: seconds before a retry at the same upstream; None: no retry."""

    def __init__(self, error: ProxyError, *, retry_after: float | None, fallback: bool, failed: bool) -> None:
        """`fallback`: another upstream may succeed. `failed`: the upstream is at fault, not the request."""
        super().__init__()
        self.error, self.retry_after, self.fallback, self.failed = error, retry_after, fallback, failed


class _StaleConnection(aiohttp.ServerDisconnectedError):
    """Data arrived on an idle connection: it is closed, and nothing was sent on it."""


class _Request(aiohttp.ClientRequest):
    async def send(self, conn: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        """Refuse a connection on which data arrived before the request: aiohttp would take it for the answer."""
        if conn.protocol is None or conn.protocol.should_close:
            raise _StaleConnection
        return await super().send(conn)


class UpstreamClient:
    """One OpenAI-compatible API. Needs a running event loop; its connections are kept and reused."""

    def __init__(
        self, config: UpstreamConfig, settings: Settings, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self.config = config
        self._traces = traces
        self._settings = settings
        self._metrics = metrics
        self._key = (config.key or "").encode()
        self._urls: dict[str, URL] = {}
        self._call_prefix, self._numbers = secrets.token_hex(8), itertools.count(1)
        self.breakers: dict[str, CircuitBreaker] = {}
        base = URL(config.base_url)
        self._base = str(base.with_user(None)).rstrip("/")
        self._headers = {"user-agent": f"llm-lab-proxy/{__version__}", "accept-encoding": "identity"}
        if config.key:
            self._headers["authorization"] = f"Bearer {config.key}"
        elif base.user is not None:
            self._headers["authorization"] = aiohttp.encode_basic_auth(base.user, base.password or "")
        # The session has no headers of its own: aiohttp would send them to a forward proxy too. Nor does it read the
        # environment, where `trust_env` would also find ~/.netrc.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            request_class=_Request,
            proxy=config.forward_proxy,
            timeout=aiohttp.ClientTimeout(connect=settings.connect_timeout_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

    async def stop(self) -> None:
        await self._session.close()

    async def send(self, request: UpstreamRequest, target: Target) -> UpstreamResponse:
        """The answer's head, after retries where they may help. The caller closes it. Raises UpstreamFault.
        `request.on_call` gets every call at its end."""
        breaker = self._breaker(target.model)
        body = await off_loop(request.size, request.body, target)
        last: UpstreamFault | None = None
        turn = 0
        while True:
            if wait := breaker.wait():
                why = f"The upstream `{self.config.name}` failed too often: the proxy tries it again in {wait:.0f} s."
                error = CircuitOpen(why, headers={"retry-after": str(max(1, round(wait + 0.499)))})
                raise last or UpstreamFault(error, retry_after=None, fallback=True, failed=False)
            if last:
                self._metrics.count("upstream_retries", self.config.name)
            call, began = UpstreamCall(self.config.name, target.model, time.time()), breaker.began()
            if self.config.native:
                call.id = f"{self._call_prefix}.{next(self._numbers)}"
            request.on_begin(call)
            if request.admit is not None and target.config.cap is not None:
                try:
                    await request.admit(call, target.config)
                except ProxyError as error:  # the upstream's cap
                    raise last or UpstreamFault(error, retry_after=None, fallback=True, failed=False) from None
            try:
                reply = await self._send_once(request, target, body, call)
            except UpstreamFault as fault:
                call.outcome = "failed" if fault.failed else "refused"
                (breaker.failed if fault.failed else breaker.succeeded)(began)
                pause = BACKOFF_SECONDS * 2**turn
                pause = max(fault.retry_after or 0.0, random.uniform(pause / 2, pause))  # noqa: S311 - jitter
                turn += 1
                late = time.perf_counter() + pause >= request.deadline
                if fault.retry_after is None or turn > self._settings.upstream_retries or late:
                    raise
                last = fault
            else:
                breaker.succeeded(began)
                reply.on_close = partial(self._on_close, request, breaker, began)
                return reply
            finally:
                if not call.answered:
                    call.outcome = call.outcome or "cancelled"  # the caller disconnected: not the upstream's failure
                    self._finish_call(request, call)
            await asyncio.sleep(pause)

    def _on_close(self, request: UpstreamRequest, breaker: CircuitBreaker, began: int, reply: UpstreamResponse) -> None:
        call = reply.call
        if call.outcome == "broken":
            breaker.failed(began, answered=True)
        call.outcome = call.outcome or ("ok" if reply.complete else "cancelled")
        self._finish_call(request, call)

    async def get_json(self, path: str, limit: float) -> tuple[int, Any]:
        """Status and parsed body of a GET at the upstream's root, within `limit` seconds. Raises UpstreamDown,
        UpstreamTimeout or UpstreamBroken."""
        return await self._exchange_json("GET", path, None, limit)

    async def post_json(self, path: str, body: Any, limit: float) -> tuple[int, Any]:
        """The same of a POST with a JSON body."""
        return await self._exchange_json("POST", path, orjson.dumps(body), limit)

    async def _exchange_json(self, method: str, path: str, body: bytes | None, limit: float) -> tuple[int, Any]:
        headers = {"accept": "application/json"} | ({"content-type": "application/json"} if body is not None else {})
        try:
            async with asyncio.timeout(limit):
                answer = await self._ask(method, path, headers, body)
                try:
                    raw = await read_whole(answer, MAX_PAGE_BYTES)
                finally:
                    answer.close()
        except FAILURES as error:
            raise network_error(self.config.name, error) from None
        try:
            return answer.status, await off_loop(len(raw), loads, raw)
        except ValueError:
            raise UpstreamBroken(f"`{self.config.name}` answers {path} without valid JSON.") from None

    async def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> Answer:
        """Raises aiohttp.ClientError. A POST that may have been worked on is not repeated."""
        url = self._urls.get(path)
        if url is None:
            url = URL(self._base + path, encoded=True)
            if method == "POST":  # few paths; a GET's has ids
                self._urls[path] = url
        headers = self._headers | headers
        while True:
            data = io.BytesIO(body) if body and len(body) > 2**20 else body  # aiohttp warns of more in one piece
            with contextlib.suppress(_StaleConnection):
                sent = self._session.request(method, url, headers=headers, data=data, allow_redirects=False)
                return Answer(await sent)

    async def _send_once(
        self, request: UpstreamRequest, target: Target, body: bytes, call: UpstreamCall
    ) -> UpstreamResponse:
        config, settings = self.config, self._settings
        since = time.perf_counter()
        left = max(0.0, request.deadline - since)
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if request.stream else "application/json",
            "x-request-id": request.request_id,
        }
        if config.native:
            own = left if request.caller_deadline is None else min(left, request.caller_deadline - since)
            headers["x-request-timeout-ms"] = str(max(1, int(own * 1000)))
            headers["x-call-id"] = call.id
        if request.span is not None and self._traces is not None:
            trace = self._traces.begin_call(request.span, request.endpoint, call)
            if config.kind == "model":  # a paid upstream is not told
                headers |= trace
        # JSON arrives when it is complete: the total time bounds it.
        limit = min(left, settings.first_byte_timeout_seconds) if request.stream else left
        try:
            path = self._path(request.endpoint, target.model)
            async with asyncio.timeout(limit):
                answer = await self._ask("POST", path, headers, body)
            call.status = answer.status
            if answer.status >= 300:
                try:
                    async with asyncio.timeout(limit - (time.perf_counter() - since)):
                        self._refuse(answer, await read_whole(answer, MAX_ERROR_BYTES))
                finally:
                    answer.close()
        except FAILURES as error:
            unsent = isinstance(error, UNSENT)
            # No retry after a timeout: no time is left, and the upstream may still be working.
            timed_out = isinstance(error, TimeoutError) and not unsent
            mapped = network_error(config.name, error)
            if unsent:
                call.id = ""  # nothing was sent: there is no usage to report
            raise UpstreamFault(mapped, retry_after=None if timed_out else 0.0, fallback=True, failed=True) from None
        finally:
            call.seconds += time.perf_counter() - since
        call.answered = True
        reply = UpstreamResponse(answer, target, call, settings, self._key)
        if reply.headers.get("x-upstream-request-id") == request.request_id:
            del reply.headers["x-upstream-request-id"]
        return reply

    def _path(self, endpoint: str, model: str) -> str:
        if self.config.native:
            return f"/m/{quote(model, safe='')}{endpoint}"
        return endpoint if self.config.kind == "model" else endpoint[3:]

    def _refuse(self, answer: Answer, raw: bytes) -> NoReturn:
        name, status = self.config.name, answer.status
        headers = forwarded_headers(answer.headers)
        envelope: dict[str, Any] | None = None
        with contextlib.suppress(orjson.JSONDecodeError):
            parsed = orjson.loads(raw)
            found = parsed.get("error") if status >= 400 and isinstance(parsed, dict) else None
            if isinstance(found, dict):
                envelope = found
            elif status in CALLERS_FAULT and isinstance(parsed, dict):  # TGI: {"error": text}; FastAPI: {"detail": …}
                text = next((parsed[each] for each in ("error", "message", "detail") if parsed.get(each)), None)
                if text is not None:
                    text = text if isinstance(text, str) else orjson.dumps(text).decode()
                    why = f"The upstream `{name}` refuses the request: {text[:1000]}"
                    envelope = {"message": why, "type": "invalid_request_error", "param": None, "code": None}
                    raw = orjson.dumps({"error": envelope})
        # 1. The caller's error.
        error: ProxyError
        if status == 401:
            why = "check PROXY_OPENAI_API_KEY or the key file in the routes file."
            why = f"The upstream `{name}` does not accept the proxy's key: {why}"
            error = UpstreamBroken(why, code="upstream_key_refused")
        elif envelope is not None:
            error = UpstreamRefused(status, raw.replace(self._key, b"[redacted]") if self._key else raw, headers)
        elif status == 429:
            error = UpstreamLimited(f"The upstream `{name}` has reached its rate limit.", headers=headers)
        else:
            why = f"answered {status} without OpenAI's error object: check its base URL."
            kept = {header: value for header, value in headers.items() if header == "retry-after"}
            error = UpstreamBroken(f"The upstream `{name}` {why}", headers=kept)
        # 2. Whether to retry. A 500 may have done work: only if the upstream says so itself.
        # The caller's deadline is not the upstream's fault.
        late = envelope is not None and envelope.get("code") == "deadline_exceeded"
        wish = headers.get("x-should-retry", "").lower()
        may = status >= 500 and not late and (wish == "true" or (status in PASSING and wish != "false"))
        wait = _seconds(headers.get("retry-after"))
        retry_after = wait if may and wait <= LONGEST_WAIT_SECONDS else None
        failed = status >= 500 and not late
        raise UpstreamFault(error, retry_after=retry_after, fallback=failed or status == 429, failed=failed)

    def _breaker(self, model: str) -> CircuitBreaker:
        """One for each model of the model service, which may be down alone; one for each other upstream."""
        name = f"{self.config.name}/{model}" if self.config.kind == "model" else self.config.name
        found = self.breakers.get(name)
        if found is None:
            found = self.breakers[name] = CircuitBreaker(lambda: self._metrics.count("breaker_opened", name))
        return found

    def _finish_call(self, request: UpstreamRequest, call: UpstreamCall) -> None:
        self._metrics.count("upstream_calls", call.upstream, call.outcome)
        if call.span is not None and self._traces is not None:
            self._traces.end_call(call)
        request.on_call(call)


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After; infinite for a date or an invalid value, 0 without one."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        return float("inf")

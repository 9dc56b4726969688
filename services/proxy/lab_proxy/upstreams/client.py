"""Upstreams and their answers, whole or in pieces, with a bound on every wait.

Who fails before its first byte is asked again, then another in its place, then nobody for a while. Turns every fault
of network and upstream into the errors of this package. Knows nothing of the cache or the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote

import orjson

from .. import __version__
from ..cache.entry import EMBEDDINGS
from ..errors import (
    CircuitOpen,
    ProxyError,
    UpstreamBroken,
    UpstreamDown,
    UpstreamLimited,
    UpstreamRefused,
    UpstreamTimeout,
)
from ..settings import Settings
from ..telemetry.metrics import Metrics
from .breaker import CircuitBreaker
from .http1 import Answer, Broken, ConnectTimeout, Failed, Origin, Unreachable
from .routes import Routes, Target, UpstreamConfig

MAX_ANSWER_BYTES = 256 * 1024 * 1024
KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn and others close: a reused connection is not a closed one
LONGEST_WAIT_SECONDS = 2.0  # a longer Retry-After is the caller's to wait for
BACKOFF_SECONDS = 0.1  # before the first retry, doubled before each further one; half of it is jitter
PASSING = frozenset({502, 503, 504})  # said by who stands before an engine: nothing was made, so it may be asked again
_PASSED = "x-ratelimit-"
_PASSED_NAMES = frozenset({
    "retry-after", "x-model-revision", "x-should-retry", "openai-processing-ms", "openai-version",
})  # fmt: skip


@dataclass(slots=True)
class UpstreamCall:
    """One call that an upstream really got: what is billed, counted and traced. Times are seconds."""

    upstream: str
    model: str
    began: float  # time.time()
    seconds: float = 0.0  # waited for the upstream, to the answer's end
    status: int = 0  # 0: there was no answer
    outcome: str = ""  # ok, refused (4xx), failed (5xx, no answer), broken (after its first byte), cancelled
    answered: bool = False  # a 2xx: what came of it is the caller's answer
    id: str = ""  # of this call alone, by which the model service tells what it used; others tell nothing

    @property
    def possibly_processed(self) -> bool:
        """It gave no answer, and may have been worked on all the same: it was cut off, or failed on the way."""
        return bool(self.id) and not self.answered and self.status in {0, 500, 504}


@dataclass(slots=True)
class UpstreamRequest:
    """One request as upstreams are asked it."""

    endpoint: str
    request_id: str
    stream: bool
    deadline: float  # time.perf_counter() at which the whole answer is due
    body: Callable[[Target], bytes]
    on_call: Callable[[UpstreamCall], None] = lambda _: None  # hears of each real call when it is over
    caller_deadline: float | None = (
        None  # like `deadline`, the caller's own, for upstreams that know of such; nobody waits by it
    )


class _Fault(Exception):  # noqa: N818 - it never leaves this module
    """Why there is no answer. `again`: seconds after which the same upstream may be asked; None: it may not."""

    def __init__(self, error: ProxyError, *, again: float | None, elsewhere: bool, failed: bool) -> None:
        """`elsewhere`: another upstream may do better. `failed`: it tells against the upstream, not the request."""
        super().__init__()
        self.error, self.again, self.elsewhere, self.failed = error, again, elsewhere, failed


class UpstreamResponse:
    """A 2xx answer whose body has not been read."""

    def __init__(self, answer: Answer, target: Target, call: UpstreamCall, settings: Settings, redact: bytes) -> None:
        self._answer = answer
        self._settings = settings
        self._redact = redact
        self.call = call
        self.target = target  # who answered: what is kept of the answer belongs to it, not to who was asked first
        self.headers = passed_on(answer.headers)
        self.revision = answer.headers.get("x-model-revision")
        self.is_stream = _content_type(answer) == "text/event-stream"
        self.complete = False
        self.on_close: Callable[[UpstreamResponse], None] = _nobody

    async def json(self) -> tuple[bytes, Any]:
        """The body, as it came and parsed. Raises UpstreamBroken when it is not JSON."""
        with self._reading():
            raw = await _whole(self._answer)
        self.complete = True
        try:
            return raw, orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(
                f"The upstream `{self.target.upstream}` answered {self._answer.status} with "
                f"{_content_type(self._answer)} instead of JSON: check its base URL."
            ) from None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises UpstreamTimeout after too long a silence, UpstreamBroken for a broken end."""
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
        """Read to the end, which is near: the connection can then be used again."""
        with contextlib.suppress(ProxyError, TimeoutError):
            async with asyncio.timeout(1):
                async for _ in self.chunks():
                    pass
        self.complete = True
        self.call.outcome = ""

    def redact(self, data: bytes) -> bytes:
        """`data` without the upstream's key, should an error message repeat it."""
        return data.replace(self._redact, b"[redacted]") if self._redact else data

    def close(self) -> None:
        """The end, for good or ill: told once."""
        self._answer.close()
        done, self.on_close = self.on_close, _nobody
        done(self)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """The time of one wait for the body, and what its failure says of the call."""
        began = time.perf_counter()
        try:
            yield
        except (Failed, TimeoutError) as error:
            self.call.outcome = "broken"
            raise _told(self.target.upstream, error) from None
        finally:
            self.call.seconds += time.perf_counter() - began


class UpstreamClient:
    """One OpenAI-compatible API. Made where an event loop runs; its connections are kept and reused."""

    def __init__(self, access: UpstreamConfig, settings: Settings, metrics: Metrics) -> None:
        self.config = access
        self._settings = settings
        self._metrics = metrics
        self._key = (access.key or "").encode()
        self._ways: dict[tuple[str, str], str] = {}
        self._me, self._numbers = secrets.token_hex(8), itertools.count(1)
        self.breakers: dict[str, CircuitBreaker] = {}
        headers = {"user-agent": f"llm-lab-proxy/{__version__}", "accept-encoding": "identity"}
        if access.key:
            headers["authorization"] = f"Bearer {access.key}"
        self._origin = Origin(
            access.base_url, headers, connect_timeout=settings.connect_timeout_seconds, keepalive=KEEPALIVE_SECONDS
        )

    async def stop(self) -> None:
        await self._origin.stop()

    async def send(self, question: UpstreamRequest, target: Target) -> UpstreamResponse:
        """The answer's head, asked for again where that may help. Who gets it closes it.

        Raises _Fault. Every real call is told to `question.on_call` when it is over.
        """
        breaker = self._breaker(target.model)
        body = question.body(target)
        last: _Fault | None = None
        turn = 0
        while True:
            if wait := breaker.wait():
                raise last or _closed_to(self.config.name, wait)
            if last:
                self._metrics.count("upstream_retries", self.config.name)
            call, began = UpstreamCall(self.config.name, target.model, time.time()), breaker.began()
            if self.config.kind == "model":
                call.id = f"{self._me}.{next(self._numbers)}"
            try:
                reply = await self._once(question, target, body, call)
            except _Fault as fault:
                call.outcome = "failed" if fault.failed else "refused"
                (breaker.failed if fault.failed else breaker.succeeded)(began)
                pause = BACKOFF_SECONDS * 2**turn
                pause = max(fault.again or 0.0, random.uniform(pause / 2, pause))  # noqa: S311 - jitter
                turn += 1
                late = time.perf_counter() + pause >= question.deadline
                if fault.again is None or turn > self._settings.upstream_retries or late:
                    raise
                last = fault
            else:
                breaker.succeeded(began)
                reply.on_close = partial(self._over, question, breaker, began)
                return reply
            finally:
                if not call.answered:
                    call.outcome = call.outcome or "cancelled"  # the caller left: it tells nothing of the upstream
                    self._tell(question, call)
            await asyncio.sleep(pause)

    def _over(self, question: UpstreamRequest, breaker: CircuitBreaker, began: int, reply: UpstreamResponse) -> None:
        """An answer was read, or let go of."""
        call = reply.call
        if call.outcome == "broken":
            breaker.failed(began, answered=True)
        call.outcome = call.outcome or ("ok" if reply.complete else "cancelled")
        self._tell(question, call)

    async def get_json(self, path: str, limit: float) -> tuple[int, Any]:
        """Status and parsed body of a GET at the upstream's root, within `limit` seconds.

        Raises UpstreamDown, UpstreamTimeout or UpstreamBroken.
        """
        try:
            async with asyncio.timeout(limit):
                answer = await self._origin.ask("GET", path, {"accept": "application/json"}, within=limit)
                try:
                    raw = await _whole(answer)
                finally:
                    answer.close()
        except (Failed, TimeoutError) as error:
            raise _told(self.config.name, error) from None
        try:
            return answer.status, orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(f"`{self.config.name}` answers {path} with something that is not JSON.") from None

    async def _once(
        self, question: UpstreamRequest, target: Target, body: bytes, call: UpstreamCall
    ) -> UpstreamResponse:
        access, settings = self.config, self._settings
        since = time.perf_counter()
        left = max(0.0, question.deadline - since)
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if question.stream else "application/json",
            "x-request-id": question.request_id,
        }
        if access.kind == "model":
            own = left if question.caller_deadline is None else min(left, question.caller_deadline - since)
            headers["x-request-timeout-ms"] = str(max(1, int(own * 1000)))
            headers["x-call-id"] = call.id
        # JSON has its first byte when it is whole: the total bounds it.
        limit = min(left, settings.first_byte_timeout_seconds) if question.stream else left
        try:
            way = self._path(question.endpoint, target.model)
            answer = await self._origin.ask("POST", way, headers, body, within=limit)
            call.status = answer.status
            if answer.status >= 300:
                try:
                    async with asyncio.timeout(limit - (time.perf_counter() - since)):
                        self._refuse(answer, await _whole(answer))
                finally:
                    answer.close()
        except (Failed, TimeoutError) as error:
            unheard = isinstance(error, Unreachable)
            silent = isinstance(error, TimeoutError) and not unheard  # its time is spent, and it may still be at work
            told = _told(access.name, error)
            if unheard:
                call.id = ""  # nobody there who could tell
            raise _Fault(told, again=None if silent else 0.0, elsewhere=True, failed=True) from None
        finally:
            call.seconds += time.perf_counter() - since
        call.answered = True
        reply = UpstreamResponse(answer, target, call, settings, self._key)
        if reply.headers.get("x-upstream-request-id") == question.request_id:
            del reply.headers["x-upstream-request-id"]
        return reply

    def _path(self, endpoint: str, model: str) -> str:
        """The path below the base URL."""
        if self.config.kind != "model":
            return endpoint[3:]
        found = self._ways.get((endpoint, model))
        if found is None:
            found = self._ways[endpoint, model] = f"/m/{quote(model, safe='')}{endpoint}"
        return found

    def _refuse(self, answer: Answer, raw: bytes) -> NoReturn:
        """Raise what a status from 300 says."""
        name, status = self.config.name, answer.status
        headers = passed_on(answer.headers)
        envelope: dict[str, Any] | None = None
        with contextlib.suppress(orjson.JSONDecodeError):
            said = orjson.loads(raw)
            if status >= 400 and isinstance(said, dict) and isinstance(said.get("error"), dict):
                envelope = said["error"]
        # 1. What the caller hears.
        error: ProxyError
        if status == 401:
            error = UpstreamBroken(
                f"The upstream `{name}` does not accept the proxy's key: check PROXY_OPENAI_API_KEY "
                "or the key file in the routes file.",
                code="upstream_key_refused",
            )
        elif envelope is not None:
            error = UpstreamRefused(status, raw.replace(self._key, b"[redacted]") if self._key else raw, headers)
        elif status == 429:
            error = UpstreamLimited(f"The upstream `{name}` takes no more requests for now.", headers=headers)
        else:
            error = UpstreamBroken(
                f"The upstream `{name}` answered {status} with something that is not OpenAI's error: "
                "check its base URL.",
                headers={"retry-after": headers["retry-after"]} if "retry-after" in headers else {},
            )
        # 2. Whether it may be asked again. A 500 was at work when it fell: only where it says itself that it may.
        late = envelope is not None and envelope.get("code") == "deadline_exceeded"  # the caller's time, not its fault
        wish = headers.get("x-should-retry", "").lower()
        may = status >= 500 and not late and (wish == "true" or (status in PASSING and wish != "false"))
        wait = _seconds(headers.get("retry-after"))
        again = wait if may and wait <= LONGEST_WAIT_SECONDS else None
        failed = status >= 500 and not late
        raise _Fault(error, again=again, elsewhere=failed or status == 429, failed=failed)

    def _breaker(self, model: str) -> CircuitBreaker:
        """The model service's models are applications of their own, each of which may be down; others have one."""
        name = f"{self.config.name}/{model}" if self.config.kind == "model" else self.config.name
        found = self.breakers.get(name)
        if found is None:
            found = self.breakers[name] = CircuitBreaker(lambda: self._metrics.count("breaker_opened", name))
        return found

    def _tell(self, question: UpstreamRequest, call: UpstreamCall) -> None:
        self._metrics.count("upstream_calls", call.upstream, call.outcome)
        question.on_call(call)


class PendingResponse:
    """One question to upstreams, and its answer's life."""

    __slots__ = ("_question", "_reply", "_targets", "_upstreams")

    def __init__(self, upstreams: UpstreamPool, targets: Sequence[Target], question: UpstreamRequest) -> None:
        self._upstreams, self._targets, self._question = upstreams, targets, question
        self._reply: UpstreamResponse | None = None

    async def __aenter__(self) -> UpstreamResponse:
        self._reply = await self._upstreams.send_first(self._targets, self._question)
        return self._reply

    async def __aexit__(self, *_: object) -> None:
        if self._reply is not None:
            self._reply.close()


class UpstreamPool:
    """Every upstream of the routes file, and who stands in for whom. Requests in flight keep what they began with."""

    def __init__(self, routes: Routes, settings: Settings, metrics: Metrics) -> None:
        self._routes = routes
        self._settings = settings
        self._metrics = metrics
        self._clients: dict[UpstreamConfig, UpstreamClient] = {}

    async def start(self) -> None: ...

    async def stop(self) -> None:
        for upstream in self._clients.values():
            await upstream.stop()

    @property
    def model_service(self) -> UpstreamClient:
        """The model service."""
        return self._client(next(access for access in self._routes.upstreams.values() if access.kind == "model"))

    def send(self, targets: Sequence[Target], question: UpstreamRequest) -> PendingResponse:
        """`async with` it: the first of `targets` that answers. `reply.target` says which, and so does the header
        `x-model-fallback`. Leaving the block early closes the connection: so an upstream learns to stop.

        Raises what the first one said where all fail: UpstreamDown, CircuitOpen, UpstreamTimeout, UpstreamBroken,
        UpstreamLimited, or UpstreamRefused with its own envelope.
        """
        return PendingResponse(self, targets, question)

    async def send_first(self, targets: Sequence[Target], question: UpstreamRequest) -> UpstreamResponse:
        """The same answer, to be closed by who gets it."""
        heard: _Fault | None = None
        for target in targets:
            if target is not targets[0] and not _stands_in(target, targets[0], question.endpoint):
                continue
            try:
                reply = await self._client(target.config).send(question, target)
            except _Fault as fault:
                heard = heard or fault
                if not fault.elsewhere or time.perf_counter() >= question.deadline:
                    break
                continue
            if heard is not None:
                reply.headers["x-model-fallback"] = f"{target.upstream}/{target.model}"
                self._metrics.count("fallbacks", targets[0].upstream, target.upstream)
            return reply
        raise heard.error if heard else UpstreamDown("Nobody can be asked.")

    def status(self) -> list[dict[str, Any]]:
        """For the status page, without a key: who there is, and whose breaker is open."""
        told = []
        for name, access in self._routes.upstreams.items():
            found = self._clients.get(access)
            broken = sorted(which for which, each in found.breakers.items() if each.is_open) if found else []
            told.append({"name": name, "configured": access.configured} | ({"open": broken} if broken else {}))
        return told

    def breaker_states(self) -> dict[str, bool]:
        """Which breakers there are, and whether each is open."""
        return {name: each.is_open for upstream in self._clients.values() for name, each in upstream.breakers.items()}

    def on_routes_reloaded(self) -> None:
        """The routes file was read anew: let go of upstreams that it does not know, when their last answer is over."""
        kept = set(self._routes.upstreams.values())
        for access in [access for access in self._clients if access not in kept]:
            asyncio.get_running_loop().call_later(self._settings.total_timeout_seconds, self._retire, access)

    def _retire(self, access: UpstreamConfig) -> None:
        if access in self._clients and access not in self._routes.upstreams.values():
            gone = asyncio.ensure_future(self._clients.pop(access).stop())
            gone.add_done_callback(lambda _: None)

    def _client(self, access: UpstreamConfig) -> UpstreamClient:
        found = self._clients.get(access)
        if found is None:
            found = self._clients[access] = UpstreamClient(access, self._settings, self._metrics)
        return found


def _stands_in(target: Target, first: Target, endpoint: str) -> bool:
    if endpoint == EMBEDDINGS:
        return target.model == first.model  # vectors of two models do not compare
    if endpoint == "/v1/responses":
        return target.config.responses
    return target.kind != "embedding"


def _closed_to(name: str, wait: float) -> _Fault:
    error = CircuitOpen(
        f"The upstream `{name}` failed too often: it is asked again in {wait:.0f} s.",
        headers={"retry-after": str(max(1, round(wait + 0.499)))},
    )
    return _Fault(error, again=None, elsewhere=True, failed=False)


def _nobody(_: UpstreamResponse) -> None:
    """Who hears of an answer's end when somebody has."""


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After; a date or nonsense is too long to wait for, none is 0."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        return float("inf")


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The few headers of an upstream that concern the caller: no cookie, no hop-by-hop header, no owner of the key.

    Names in lower case, here as there.
    """
    kept = {name: value for name, value in headers.items() if name in _PASSED_NAMES or name.startswith(_PASSED)}
    if "x-request-id" in headers:
        kept["x-upstream-request-id"] = headers["x-request-id"]
    return kept


def _content_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower() or "no content type"


async def _whole(answer: Answer) -> bytes:
    pieces, size = [], 0
    while piece := await answer.read():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise Broken("it is too large")
        pieces.append(piece)
    return b"".join(pieces)


def _told(name: str, error: Exception) -> ProxyError:
    """A network fault as this package's error, with what to do."""
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

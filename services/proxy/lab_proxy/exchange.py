"""One request's way: look it up, else ask the upstream, pass the answer on, store what is whole.

Owns the order of these steps and what the answer says of them. Knows HTTP only as `Out`, redis only as `Store`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from random import choice, randrange
from typing import Any, Literal, Protocol

import orjson

from . import canonical, entry, responses
from .cache import BATCH, Ask, Wishes, entry_name, sample_key
from .entry import EMBEDDINGS, Entry
from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotAllowed,
    NoSuchModel,
    NotCached,
    ProxyError,
    UpstreamBroken,
    UpstreamDown,
    UpstreamRefused,
    UpstreamTimeout,
)
from .flight import Flight, FlightLost, Flights, Seat
from .keys import Identity
from .ledger import Charge, day_of
from .local import LocalModels
from .recall import Known, Recall, Shown
from .responses import RESPONSES
from .routes import Routes, Target
from .settings import Settings
from .tally import Tally, Used
from .upstream import Question, RealCall, Reply, Upstreams

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
STALLED_CLIENT_SECONDS = 5.0  # to take the last event of a stream whose time is up
REFRESH = Wishes(no_cache=True)
MOST_INPUTS = 2048  # OpenAI's limit of embedding inputs
MOST_FLIGHTS = 4  # that a request boards before it flies alone
STREAM_ERROR = "stream-error"  # how a flight ended whose last event is the upstream's error


class Store(Protocol):
    """The cache as the exchange sees it; cache.Cache is one."""

    enabled: bool
    secret: bytes

    def stamp(self, tenant: str, model: str) -> str: ...

    def grew(self, key: str, entry: Entry, size: int) -> None: ...

    def near(self, key: str, stamp: str, now: float) -> Entry | None: ...

    async def read(self, keys: Sequence[str], *asks: Ask, stamp: str = "") -> list[Entry | None] | None: ...

    async def write(self, entries: Mapping[str, Entry]) -> str | None: ...


class Admission(Ask, Protocol):
    """One request's claim on its key's limits (limits.Admission). It rides along with the cache's read."""

    headers: dict[str, str]

    def settle(self, tokens: int) -> None:
        """The request is over and used so many tokens of an upstream. Called once or more often, always."""

    def correct(self, tokens: int) -> None:
        """It really used so many, if it is over."""


class Limiter(Protocol):
    """limits.Limits as the exchange sees it."""

    def admission(  # noqa: PLR0917 all that a limit can be about
        self,
        identity: Identity,
        endpoint: str,
        model: str,
        body: Mapping[str, Any],
        size_bytes: int,
        upstream: str,
        *,
        at_once: bool = False,
    ) -> Admission | None: ...

    async def ask(self, admission: Admission) -> None:
        """The same question where the cache cannot carry it."""


class Recorder(Protocol):
    """ledger.Ledger as the exchange sees it: never waits, never fails."""

    def record(self, charge: Charge) -> None: ...

    def correct(self, charge: Charge, prompt: int, completion: int, cached: int) -> None: ...


class NoLimits:
    """What stands in for limits where there are none."""

    def admission(self, *_: Any, **__: Any) -> None:
        return None

    async def ask(self, admission: Admission) -> None: ...


class Out(Protocol):
    """Where the answer goes."""

    headers: dict[str, str]  # of every answer to this request
    started: bool
    ended: bool

    async def whole(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON) -> None: ...

    async def head(self, headers: Mapping[str, str]) -> None: ...

    async def piece(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class Quick(Out, Protocol):
    """An Out that takes what is ready to go."""

    async def ready(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """A whole answer whose own headers are made."""


@dataclass(slots=True)
class Account:
    """What the log line and the metrics tell of one request. Never a prompt, an answer or a key."""

    model: str = ""
    known: bool = False  # `model` is one of the model service's, or an upstream answered to the name
    upstream: str = ""
    cache: str = ""
    error: str = ""
    ttft: float | None = None  # seconds
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that the upstream had in a cache of its own; of a Response alone
    asked: bool = False  # an upstream was really asked: its tokens count
    billed: int = 0  # tokens of the real calls that are in the ledger
    upstream_seconds: float = 0.0  # waited for upstreams
    calls: list[RealCall] = field(default_factory=list)  # that upstreams really got for this request

    def called(self, call: RealCall) -> None:
        self.calls.append(call)
        self.upstream_seconds += call.seconds

    @property
    def spent(self) -> int:
        """Tokens that this request cost."""
        return self.billed or (self.prompt_tokens + self.completion_tokens if self.asked else 0)

    def count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = usage.get("prompt_tokens") or 0
            self.completion_tokens = usage.get("completion_tokens") or 0


@dataclass(slots=True)
class Call:
    """One parsed request."""

    identity: Identity
    endpoint: str
    raw: bytes
    body: dict[str, Any]
    request_id: str
    wishes: Wishes
    store_sampled: bool
    started: float  # time.perf_counter()
    account: Account = field(default_factory=Account)
    admission: Admission | None = None
    known: Known | None = None  # decided before, about the same bytes
    plain: bool = False  # its headers ask nothing of the cache
    half: bool = False  # at half price: a line of a batch
    due: float | None = None  # time.perf_counter() when the caller's own time is over, where it said so

    @property
    def tenant(self) -> str:
        return self.identity.tenant


@dataclass(slots=True)
class _Way:
    """What was decided about one call before anybody was asked."""

    call: Call
    target: Target
    stream: bool
    usage: bool
    bypass: str | None
    forward: str = "miss"
    stamp: str = ""  # the epoch in which this request began: what it stores is of then
    form: bytes = b""  # canonical, under the target's revision
    admitted: bool = False  # the limits were asked
    since: float = 0.0  # time.perf_counter() when the upstream was asked once more, on behalf of others
    key: str = ""  # of `form`; empty for embeddings, which have one for each input, and where there is a bypass
    samples: int = 1  # answers that are kept side by side
    slot: int = 0  # which of them this request's answer becomes
    shared: bool = False  # others may board the flight that asks for it

    @property
    def keys(self) -> list[str]:
        """The key of each sample: the first has the request's own."""
        return [sample_key(self.key, slot) for slot in range(self.samples)]

    @property
    def _alias(self) -> dict[str, str]:
        said = {"x-model-alias": self.target.alias} if self.target.alias else {}
        return said | {"x-model-auto": self.target.auto} if self.target.auto else said

    def said(self, outcome: str | None = None) -> dict[str, str]:
        """Headers of an answer that came from an upstream. `outcome`: `stored`, or why not."""
        if self.bypass:
            status = f"llm-lab; fwd=bypass; detail={self.bypass}"
        else:
            end = {None: "", "stored": "; stored"}.get(outcome, f"; detail={outcome}")
            status = f"llm-lab; fwd={self.forward}{end}"
        return {"cache-status": status, **self._alias}

    def followed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers of an answer that another request's upstream call gives; `headers`: those of that call."""
        kept = {name: headers[name] for name in ("x-model-revision", "x-model-fallback") if name in headers}
        return {"cache-status": f"llm-lab; fwd={self.forward}; collapsed", **kept, **self._alias}

    def found(self, ttl: int, age: int, key: str | None, failed: int | None = None) -> dict[str, str]:
        """Headers of an answer from the cache. `failed`: it stands in for this status of the upstream's."""
        status = f"llm-lab; hit; ttl={ttl - age}" + (f'; key="{key}"' if key else "")
        if failed is not None:
            status = f"llm-lab; fwd=stale; fwd-status={failed}"
        revision = {"x-model-revision": self.target.revision} if self.target.revision else {}
        return {"cache-status": status, "age": str(age), **revision, **self._alias}


@dataclass(frozen=True, slots=True)
class Weighed:
    """What the cache makes of a request: its canonical form, where its answer would lie, and why not."""

    form: bytes
    keys: list[str]
    stamp: str
    bypass: str | None


@dataclass(slots=True)
class _Inputs:
    """The inputs of one embeddings request, each different one once: as given, in canonical form, and their keys."""

    unique: list[Any]
    texts: list[bytes]
    keys: list[str]
    order: list[int] = field(default_factory=list)  # which of them stands at each place of the request


class Exchange:
    def __init__(
        self,
        settings: Settings,
        cache: Store,
        upstreams: Upstreams,
        routes: Routes,
        local: LocalModels,
        *,
        limits: Limiter | None = None,
        ledger: Recorder | None = None,
        flights: Flights | None = None,
        tally: Tally | None = None,
    ) -> None:
        self._tally = tally
        self._flights = flights or Flights(None, limit=settings.cache_max_entry_bytes)
        self._limits = limits or NoLimits()
        self._ledger = ledger
        self._total = settings.total_timeout_seconds
        self._cache = cache
        self._upstreams = upstreams
        self._routes = routes
        self._local = local
        self._recall = Recall()
        self._refreshes: set[asyncio.Task[None]] = set()

    def recall(self, tenant: str, endpoint: str, raw: bytes) -> Known | None:
        """What was decided about the same bytes, if it still holds."""
        return self._recall.get((tenant, endpoint, raw), self._generation)

    @property
    def _generation(self) -> tuple[int, int]:
        return self._routes.generation, self._local.generation

    async def near(self, call: Call, out: Quick) -> bool:
        """Answer from what this process holds, if it can: the way of most hits, and it waits for nothing but limits.

        Raises what these say. False: nothing was done.
        """
        known = call.known
        if known is None or not known.key or known.samples > 1:
            return False
        target, account = known.target, call.account
        now = time.time()
        found = self._cache.near(known.key, self._cache.stamp(call.identity.tenant, target.model), now)
        if found is None:
            return False
        age = found.age(now)
        if age >= found.ttl:
            return False
        account.model, account.upstream, account.known = target.model, target.upstream, True
        try:
            self._claim(call, target, at_once=True)
            if call.admission is not None:
                await self._cache.read((), call.admission)
                out.headers.update(call.admission.headers)
            account.cache = "hit"
            account.count(found.about.get("usage"))
            shown = known.shown
            if shown is None or shown.entry is not found or shown.age != age:
                shown = known.shown = self._shown(call, known, found, age)
            mark = b'"id":"%s","created":%d,' % (entry.new_id(call.endpoint).encode(), now)
            if known.stream:
                account.ttft = time.perf_counter() - call.started
            await out.ready(mark.join(shown.pieces), shown.headers)
        except ProxyError as error:
            account.error = error.code or error.type
            raise
        finally:
            self._charge(call)
        return True

    def _shown(self, call: Call, known: Known, found: Entry, age: int) -> Shown:
        if known.stream:
            pieces = found.replays.get(known.usage)
            if pieces is None:
                pieces = found.replays[known.usage] = entry.replay_pieces(call.endpoint, found.body, known.usage)
                self._cache.grew(known.key, found, sum(map(len, pieces)))
        else:
            pieces = [b"{", found.body[1:]]
        mark = len(b'"id":"","created":,') + len(entry.new_id(call.endpoint)) + 10  # digits, until the year 2286
        size = sum(map(len, pieces)) + mark * (len(pieces) - 1)
        headers = {"content-type": SSE if known.stream else JSON, "content-length": str(size)}
        headers |= _Way(call, known.target, known.stream, known.usage, None).found(found.ttl, age, known.key)
        return Shown(found, age, [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()], pieces)

    async def weigh(self, call: Call) -> Weighed:
        """What the cache would make of `call`, without asking anybody. Raises what `answer` raises before it asks."""
        way = await self._way(call)
        self._permit(call, way.target)
        revision = way.target.revision
        units = entry.inputs(call.body.get("input")) if call.endpoint == EMBEDDINGS else None
        if units is None:
            form = self._form(way, revision)
            keys = way.keys if way.key else [canonical.key_of(self._cache.secret, form)]
            return Weighed(form, keys, way.stamp, way.bypass)
        given = list(dict.fromkeys(canonical.encode(unit) for unit in units[:MOST_INPUTS]))
        form = canonical.with_input(self._form(way, revision, without="input"), b",".join(given))
        return Weighed(form, self._keys(way, revision, given), way.stamp, way.bypass)

    def model_of(self, name: str) -> str:
        """The model that a name stands for."""
        return self._routes.aliases(self._local.entries).get(name, name)

    async def answer(self, call: Call, out: Out) -> None:
        """Answer `call` on `out`. Faults are raised before the first byte; after it they end the stream."""
        left = self._total if call.due is None else call.due - time.perf_counter()
        try:
            try:
                async with asyncio.timeout(min(self._total, left)):
                    way = await self._way(call)
                    self._claim(call, way.target)
                    answers = {EMBEDDINGS: self._embed, RESPONSES: self._relay}
                    await answers.get(call.endpoint, self._generate)(way, out)
            except TimeoutError:
                if left < self._total:
                    raise DeadlineExceeded from None
                raise UpstreamTimeout("The answer took too long: PROXY_TOTAL_TIMEOUT_SECONDS is the limit.") from None
        except ProxyError as error:
            call.account.error = error.code or error.type
            if not out.started:
                raise
            try:
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    await out.piece(b"data: " + error.body() + b"\n\n")
                    await out.end()
            except TimeoutError:  # it does not read: whatever is sent more would wait too
                call.account.error = "client_stalled"
        finally:
            if call.admission is not None:
                call.admission.settle(call.account.spent)
            self._charge(call)

    def _permit(self, call: Call, target: Target) -> None:
        if not call.identity.allows(target.model, *([target.alias] if target.alias else [])):
            raise ModelNotAllowed(f"This key is not for the model `{target.alias or target.model}`.", param="model")

    def _claim(self, call: Call, target: Target, *, at_once: bool = False) -> None:
        """Permission first, then the claim on the limits: both before anything of the cache is given out."""
        self._permit(call, target)
        call.admission = self._limits.admission(
            call.identity, call.endpoint, target.model, call.body, len(call.raw), target.upstream, at_once=at_once
        )

    def _charge(self, call: Call) -> None:
        account = call.account
        source: Literal["upstream", "hit", "collapsed"]
        if account.asked:
            # Real calls are billed at their end, by `_bill`; some vectors of the answer may come from the cache.
            saved = account.prompt_tokens - account.billed
            if self._ledger is not None and call.endpoint == EMBEDDINGS and account.billed and saved > 0:
                who, half = call.identity, call.half
                self._ledger.record(
                    Charge(who, account.upstream, account.model, "hit", saved, request=False, half=half)
                )
            if call.endpoint != RESPONSES:
                return
            source = "upstream"
        elif account.cache in {"hit", "stale"}:
            source = "hit"
        elif account.cache == "collapsed" and account.prompt_tokens + account.completion_tokens:
            source = "collapsed"
        else:
            return
        if self._ledger is not None:
            prompt, completion, cached = account.prompt_tokens, account.completion_tokens, account.cached_tokens
            untold = source == "upstream" and not prompt + completion  # a Response that broke off before its usage
            self._ledger.record(
                Charge(
                    call.identity, account.upstream, account.model, source, len(call.raw) // 4 if untold else prompt,
                    completion, cached, estimated=untold, half=call.half,
                )
            )  # fmt: skip

    async def _way(self, call: Call) -> _Way:
        if call.known is not None:
            return self._again(call, call.known)
        try:
            generation, way = self._generation, self._decide(call)
        except NoSuchModel as unknown:
            # Loaded since the last look, or still loading: only the service itself can tell.
            await self._local.look_again(unknown.model)
            generation, way = self._generation, self._decide(call)
        if way.bypass is None and call.endpoint != EMBEDDINGS:
            way.form = self._form(way, way.target.revision)
            way.key = canonical.key_of(self._cache.secret, way.form)
        if call.plain:
            known = Known(call.body, way.target, way.stream, way.usage, way.bypass, way.form, way.key, way.samples)
            self._recall.put((call.tenant, call.endpoint, call.raw), known, generation)
        return way

    def _again(self, call: Call, known: Known) -> _Way:
        target = known.target
        call.account.model, call.account.upstream, call.account.known = target.model, target.upstream, target.versioned
        stamp = self._cache.stamp(call.tenant, target.model)
        return _Way(
            call,
            target,
            known.stream,
            known.usage,
            known.bypass,
            stamp=stamp,
            form=known.form,
            key=known.key,
            samples=known.samples,
        )

    def _decide(self, call: Call) -> _Way:
        body = call.body
        model, stream, options = body.get("model"), body.get("stream"), body.get("stream_options")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("`model` must be the name of a model: see /v1/models.", param="model")
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("`stream` must be true or false.", param="stream")
        if options is not None and (not isinstance(options, dict) or not stream):
            raise InvalidRequest("`stream_options` is an object and goes with `stream: true`.", param="stream_options")
        n = body.get("n")
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise InvalidRequest("`n` must be a whole number from 1.", param="n")
        target = self._routes.resolve(model, self._local.entries, body)
        call.account.model, call.account.upstream = target.model, target.upstream
        call.account.known = target.versioned
        kind = self._local.entries.get(target.model, {}).get("kind") if target.versioned else None
        if kind and (kind == "embedding") != (call.endpoint == EMBEDDINGS):
            raise InvalidRequest(f"`{model}` is of kind {kind}, which {call.endpoint} does not take.", param="model")
        bypass = None if self._cache.enabled else "disabled"
        if call.wishes.no_store:
            bypass = "no-store"
        if call.endpoint == RESPONSES:
            responses.check(body, target)
            bypass = bypass or "endpoint"
        bypass = bypass or entry.why_bypass(
            call.endpoint, body, target.temperature.get(call.endpoint), target.keep_sampled or call.store_sampled
        )
        forward = "request" if call.wishes.no_cache else "miss"
        stamp = self._cache.stamp(call.tenant, target.model)
        way = _Way(call, target, bool(stream), bool((options or {}).get("include_usage")), bypass, forward, stamp)
        if target.samples > 1 and bypass is None:
            kept_anyway = entry.why_bypass(call.endpoint, body, target.temperature.get(call.endpoint), False) is None
            way.samples = 1 if kept_anyway else target.samples
        return way

    def _form(self, way: _Way, revision: str | None, *, without: str = "") -> bytes:
        """The canonical form of the whole request, or of what is left `without` a field."""
        call, target = way.call, way.target
        if way.form and not without and revision == target.revision:
            return way.form
        body = {name: value for name, value in call.body.items() if name != without} if without else call.body
        return canonical.form(
            tenant=call.tenant,
            upstream=target.upstream,
            model=target.model,
            revision=revision,
            endpoint=call.endpoint,
            body=canonical.comparable(body, target.model, target.defaults.get(call.endpoint, {})),
        )

    def _key(self, way: _Way, revision: str | None, *, without: str = "") -> str:
        """The key of that form."""
        return canonical.key_of(self._cache.secret, self._form(way, revision, without=without))

    def _keys(self, way: _Way, revision: str | None, inputs: Iterable[bytes]) -> list[str]:
        """One key for each canonical input."""
        return canonical.input_keys(self._cache.secret, self._key(way, revision, without="input"), inputs)

    async def _lookup(self, way: _Way, keys: Sequence[str], out: Out, *riders: Ask) -> list[Entry | None]:
        """What is stored under `keys` and fresh enough for this caller, who is within the limits: else it raises."""
        found: list[Entry | None] = [None] * len(keys)
        skips = way.bypass is not None or way.call.wishes.no_cache
        admission = None if way.admitted else way.call.admission
        way.admitted = True  # limits are asked once, however often the cache is
        asks = [*riders] if admission is None else [admission, *riders]
        if not self._cache.enabled and admission is not None:
            await self._limits.ask(admission)
        elif not skips or asks:
            read = await self._cache.read([] if skips else keys, *asks, stamp=way.stamp)
            if skips:
                pass
            elif read is None:
                way.bypass = "redis"
            else:
                now, limit, target = time.time(), way.call.wishes.max_age, way.target
                longest = [0 if limit is not None else target.swr if each and each.grace else 0 for each in read]
                found = [
                    each if each and each.age(now) < each.ttl + more else None
                    for each, more in zip(read, longest, strict=True)
                ]
                if limit is not None and any(e and e.age(now) > limit for e in found):
                    way.forward = "request"
                    found = [e if e and e.age(now) <= limit else None for e in found]
        if admission is not None:
            out.headers.update(admission.headers)
        way.call.account.cache = "bypass" if way.bypass else way.forward
        if way.call.wishes.only_if_cached and way.samples > 1 and any(found):
            found = [each or next(filter(None, found)) for each in found]
        if way.call.wishes.only_if_cached and not all(found):
            way.call.account.cache = "miss"
            raise NotCached(
                "Nothing fresh is cached for this request, and `only-if-cached` forbids to ask an upstream.",
                headers={"cache-status": "llm-lab; detail=only-if-cached"},
            )
        return found

    def _revision(self, way: _Way, reply: Reply) -> tuple[bool, str | None]:
        """Whether it is known which revision made this answer, and which."""
        if not reply.target.versioned:
            return True, None
        self._local.learn(reply.target.model, reply.revision)
        return reply.revision is not None, reply.revision

    # ---- chat and text

    async def _generate(self, way: _Way, out: Out) -> None:
        async def serve(found: list[Entry]) -> None:
            one = choice(found)  # noqa: S311 no secret
            if one.age(time.time()) >= one.ttl:
                self._refresh(way)
            await self._hit(way, one, out)

        async def ask(looked: list[Entry | None], flight: Flight) -> None:
            empty = [slot for slot, each in enumerate(looked) if each is None]
            way.slot = choice(empty) if way.call.wishes.no_cache else empty[0]  # noqa: S311 no secret
            await self._ask(way, flight)

        try:
            await self._board(way, out, way.keys, self._flight(way, way.key), serve=serve, ask=ask)
        except (UpstreamDown, UpstreamTimeout, UpstreamBroken, UpstreamRefused) as error:
            stale = await self._stale(way) if error.status >= 500 and not out.started else None
            if stale is None:
                raise
            await self._hit(way, stale, out, failed=error.status)

    async def _stale(self, way: _Way) -> Entry | None:
        """What may stand in where the upstream fails. Looked for by everybody who heard of the failure."""
        wishes, allowed = way.call.wishes, way.target.stale_if_error
        if not allowed or way.bypass or wishes.no_cache or wishes.max_age is not None:
            return None
        now = time.time()
        found = await self._cache.read(way.keys, stamp=way.stamp) or []
        return next((each for each in found if each and each.age(now) < each.ttl + allowed), None)

    def _refresh(self, way: _Way) -> None:
        """Fetch anew in the background, once for all who get the stale answer meanwhile."""
        call = replace(
            way.call, account=Account(), admission=None, wishes=REFRESH, started=time.perf_counter(), due=None
        )
        task = asyncio.ensure_future(self._refreshed(replace(way, call=call, admitted=True)))
        self._refreshes.add(task)
        task.add_done_callback(self._refreshes.discard)

    async def _refreshed(self, way: _Way) -> None:
        way.slot = randrange(way.samples)  # noqa: S311 no secret
        with suppress(ProxyError, FlightLost, TimeoutError):
            async with asyncio.timeout(self._total):
                with self._flights.board(f"{way.key}:{way.stamp}:refresh") as seat:
                    if not seat.first:
                        return
                    lease = seat.lease(())
                    if lease is not None:
                        await self._cache.read((), lease)
                    seat.depart(lease, partial(self._fetch, way, partial(self._ask, way)))
                    async for _ in seat.parts():
                        pass

    async def _board(
        self,
        way: _Way,
        out: Out,
        keys: list[str],
        name: str,
        *,
        serve: Callable[[list[Entry]], Awaitable[None]],
        ask: Callable[[list[Entry | None], Flight], Awaitable[None]],
    ) -> None:
        """What is stored under `keys` by `serve`; else what `ask` has from the upstream, once for all on board."""
        # What is stored may be too old for this request, and then is no reason to stay.
        aged = way.call.wishes.max_age is not None or way.target.swr > 0 or way.target.stale_if_error > 0
        for turn in range(MOST_FLIGHTS + 1):
            # 1. A seat: who wants the same at the same time flies together, who was out of luck too often alone.
            way.shared = bool(name) and turn < MOST_FLIGHTS
            with self._flights.board(name if turn < MOST_FLIGHTS else "") as seat:
                try:
                    # 2. The cache: the first on board looks for all.
                    if seat.first:
                        names = [entry_name(key) for key in keys] if name else []
                        lease = seat.lease(names, anyway=turn > 0 or aged) if len(keys) <= BATCH else None
                        looked = await self._lookup(way, keys, out, *([lease] if lease else []))
                        found = [each for each in looked if each is not None]
                        if len(found) == len(keys):
                            seat.flight.land(found)
                            return await serve(found)
                        seat.depart(lease, partial(self._fetch, way, partial(ask, looked)))
                    else:
                        if way.call.admission is not None:
                            await self._lookup(way, [], out)
                        landed = await seat.found()
                        if landed is not None:
                            return await serve(landed)
                    # 3. The answer on its way, whoever asks the upstream for it.
                    return await self._deliver(way, seat, out)
                except FlightLost:
                    if out.started:
                        raise UpstreamBroken("Who asked the upstream is gone: the answer is not whole.") from None
        raise UpstreamDown("The proxy is ending: ask again.", headers={"retry-after": "1"})

    def _flight(self, way: _Way, key: str) -> str:
        """The name of the flight that this request may share; empty: none. Who has the same name wants the same of the
        upstream, and may have the same answer from the cache."""
        wishes = way.call.wishes
        if way.bypass or not key or wishes.no_cache or wishes.only_if_cached:
            return ""
        mode = "stream" if way.stream else "json"
        if way.usage and not way.target.access.stream_usage:
            mode += ":usage"
        if wishes.max_age is not None:
            mode += f":{wishes.max_age}"
        stand_ins = [f":{each.upstream}/{each.model}" for each in self._targets(way)[1:]]
        return ":".join((key, way.stamp, mode)) + "".join(stand_ins)

    async def _fetch(self, way: _Way, ask: Callable[[Flight], Awaitable[None]], flight: Flight) -> None:
        """The flight's own task: ask the upstream, pass on what comes. One more try where others wait too."""
        try:
            await ask(flight)
        except ProxyError as error:
            if flight.begun or error.status < 500 or not flight.shared:
                raise
            way.since = time.perf_counter()
            await ask(flight)

    def _counting(self, way: _Way, target: Target) -> bytes:
        """The body for `target`, who is always asked to count a stream's tokens."""
        call = way.call
        options = call.body.get("stream_options") or {}
        asked = isinstance(options.get("include_usage", False), bool)  # else the upstream says what is wrong with it
        if not (way.stream and target.access.stream_usage and asked and not way.usage):
            return self._renamed(way)(target)
        changed = {"model": target.model, "stream_options": {**options, "include_usage": True}}
        return canonical.dump(call.body | changed)

    async def _ask(self, way: _Way, flight: Flight) -> None:
        call, account = way.call, way.call.account
        gathered = entry.Gathered(call.endpoint)
        targets = self._targets(way)
        question = self._question(way, partial(self._counting, way))
        stamps = {each.model: self._cache.stamp(call.tenant, each.model) for each in targets[1:]}

        def called(real: RealCall) -> None:
            account.called(real)
            if real.answered or real.lost:
                self._bill(call, real, gathered.usage, gathered.pieces)

        async with self._upstreams.ask(targets, replace(question, on_call=called)) as reply:
            account.known = account.asked = True
            kept = self._answered(way, reply, stamps)
            name = reply.target.upstream
            if way.stream and reply.streams:
                return await self._stream(kept, reply, flight, gathered)
            if reply.streams:
                raise UpstreamBroken(f"The upstream `{name}` streams where nobody asked it to.")
            raw, answer = await reply.json()
            if not isinstance(answer, dict):
                raise UpstreamBroken(f"The upstream `{name}` answered with JSON that is no object.")
            if way.stream and not isinstance(answer.get("choices"), list):
                raise UpstreamBroken(f"The upstream `{name}` answered without choices.")
            gathered.usage = answer.get("usage")
            account.count(gathered.usage)
            # Stored before its end is passed on, so that who asks again finds it. What the call cost is written down
            # while redis works: in the turn after the next, for the next one sends.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, reply.close)
            outcome = await self._store(kept, reply, answer)
            flight.begin({"streams": False, "headers": reply.headers})
            await flight.put(raw)
            return flight.end(outcome)

    async def _stream(self, way: _Way, reply: Reply, flight: Flight, gathered: entry.Gathered) -> None:
        """A live stream, event by event."""
        call, account, events = way.call, way.call.account, entry.Events()
        name = reply.target.upstream
        account.prompt_tokens = len(call.raw) // 4  # until the upstream has told
        flight.begin({"streams": True, "headers": reply.headers})
        async for piece in reply.pieces():
            try:
                for event in events.feed(piece):
                    data = entry.event_data(event)
                    if data == b"[DONE]":
                        outcome = await self._store(way, reply, gathered.answer())
                        await flight.put(event)
                        flight.end(outcome)
                        return await reply.drain()
                    if data is not None:
                        chunk = orjson.loads(data)
                        if chunk.get("error") is not None:
                            await flight.put(reply.redacted(event))
                            flight.end(STREAM_ERROR)
                            return await reply.drain()
                        gathered.feed(chunk)
                        if entry.tells(chunk):
                            account.completion_tokens = gathered.pieces = gathered.pieces + 1
                            account.ttft = account.ttft or time.perf_counter() - call.started
                        account.count(gathered.usage)
                    await flight.put(event)
            except (ValueError, TypeError, AttributeError, KeyError):
                raise UpstreamBroken(f"The upstream `{name}` streams something that is not OpenAI's.") from None
        raise UpstreamBroken(f"The upstream `{name}` ended its stream without [DONE]: the answer is not whole.")

    def _answered(self, way: _Way, reply: Reply, stamps: Mapping[str, str]) -> _Way:
        """The way of who answered: what a stand-in says is kept as its own."""
        target, call = reply.target, way.call
        if target is way.target or way.bypass:
            return way
        temperature, sampled = target.temperature.get(call.endpoint), target.keep_sampled or call.store_sampled
        bypass = entry.why_bypass(call.endpoint, call.body, temperature, sampled)
        return replace(way, target=target, bypass=bypass, stamp=stamps[target.model], form=b"", key="")

    def _bill(self, call: Call, real: RealCall, usage: Any, pieces: int) -> None:
        """One real call, by the usage that its upstream told, else by the pieces that came of it until the model tells
        more. One that was not answered costs what the model tells."""
        if self._ledger is None:
            return
        account = call.account
        if isinstance(usage, dict):
            prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
            cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
        else:
            prompt, completion, cached = len(call.raw) // 4, pieces, 0
        charge = Charge(
            call.identity, real.upstream, real.model, "upstream", prompt, completion, cached,
            estimated=not isinstance(usage, dict), half=call.half,
        )  # fmt: skip
        if real.answered:
            account.billed += prompt + completion
            self._ledger.record(charge)
        if charge.estimated and real.id and self._tally is not None:
            self._tally.expect(real.id, partial(self._reconcile, call, real, charge))
        elif call.admission is not None:
            call.admission.correct(account.spent)  # who asked may have left before those who wanted the same

    def _reconcile(self, call: Call, real: RealCall, charge: Charge, used: Used) -> None:
        """The model has told what a call that broke off really used."""
        if self._ledger is None:
            return
        account, tokens = call.account, used.prompt + used.completion
        if real.answered:
            account.billed += tokens - charge.prompt - charge.completion
            self._ledger.correct(charge, *used)
        elif tokens:
            account.billed += tokens
            day = day_of(real.began)
            self._ledger.record(
                Charge(call.identity, real.upstream, real.model, "upstream", *used, half=call.half, day=day)
            )
        if call.admission is not None:
            call.admission.correct(account.spent)

    async def _deliver(self, way: _Way, seat: Seat, out: Out) -> None:
        """What one caller gets of a flight: who asked has the upstream's own events, others theirs."""
        call, account = way.call, way.call.account
        if not seat.first:
            account.cache = "collapsed"
        head = await seat.head()
        mine = account.asked
        if mine:
            headers = head["headers"] | way.said()
        else:
            account.cache, account.known = "collapsed", True
            headers = way.followed(head["headers"])
        if not head["streams"]:
            return await self._deliver_whole(way, seat, headers, head.get("usage"), out)
        events = entry.Verbatim(way.usage) if mine else entry.Renewed(call.endpoint, way.usage, int(time.time()))
        async for parts in seat.parts():
            passed = b"".join([events.passed(event) for event in parts])
            if not mine:
                account.completion_tokens = events.pieces
                account.count(events.told)
                if events.pieces and account.ttft is None:
                    account.ttft = time.perf_counter() - call.started
            if passed:
                if not out.started:
                    await out.head(headers)
                await out.piece(passed)
        if seat.outcome == STREAM_ERROR:
            account.error = "upstream_stream_error"
        return await out.end()

    async def _deliver_whole(self, way: _Way, seat: Seat, headers: dict[str, str], usage: Any, out: Out) -> None:
        call, account = way.call, way.call.account
        raw = b"".join([part async for parts in seat.parts() for part in parts])
        if account.asked:
            headers |= way.said(seat.outcome)
            if not way.stream:
                return await out.whole(raw, headers)
        if call.endpoint == EMBEDDINGS:  # nothing of its own, and it may be large
            account.count(usage)
            return await out.whole(raw, headers)
        answer = orjson.loads(raw)
        account.count(answer.get("usage"))
        if way.stream:
            return await self._replay(way, answer, headers, out)
        fresh = {"id": entry.new_id(call.endpoint), "created": int(time.time())}
        own = answer | {name: value for name, value in fresh.items() if name in answer}
        return await out.whole(canonical.dump(own), headers)

    async def _hit(self, way: _Way, found: Entry, out: Out, failed: int | None = None) -> None:
        """`failed`: the status of an upstream's failure, for which a stale answer stands in."""
        account, endpoint = way.call.account, way.call.endpoint
        account.cache, account.known = "hit" if failed is None else "stale", True
        account.count(found.about.get("usage"))
        headers = way.found(found.ttl, found.age(time.time()), way.key, failed)
        if way.stream:
            return await self._replay(way, orjson.loads(found.body), headers, out)
        return await out.whole(entry.renewed(found.body, entry.new_id(endpoint), int(time.time())), headers)

    async def _replay(self, way: _Way, answer: Mapping[str, Any], headers: Mapping[str, str], out: Out) -> None:
        endpoint = way.call.endpoint
        events = entry.replay(endpoint, answer, entry.new_id(endpoint), int(time.time()), way.usage)
        way.call.account.ttft = time.perf_counter() - way.call.started
        await out.whole(b"".join(events), headers, SSE)

    async def _store(self, way: _Way, reply: Reply, answer: Mapping[str, Any]) -> str | None:
        """`stored`, or why the answer is not."""
        if way.bypass:
            return None
        unfit = entry.why_unfit(way.call.endpoint, way.call.body, answer)
        known, revision = self._revision(way, reply)
        if unfit or not known:
            return unfit or "revision"
        target, form = way.target, self._form(way, revision)
        key = way.key if form is way.form else canonical.key_of(self._cache.secret, form)
        kept = entry.of_answer(answer, target.ttl, time.time(), way.stamp)
        kept.hold(form, max(target.swr, target.stale_if_error))
        return await self._cache.write({sample_key(key, way.slot): kept}) or "stored"

    # ---- responses

    async def _relay(self, way: _Way, out: Out) -> None:
        call = way.call
        await self._lookup(way, [""], out)
        async with self._upstreams.ask(self._targets(way), self._question(way, self._renamed(way))) as reply:
            call.account.known = call.account.asked = True
            await responses.relay(reply, out, call.account, reply.headers | way.said(), call.started)

    def _targets(self, way: _Way) -> list[Target]:
        """Who may be asked, in this order."""
        allows = way.call.identity.allows
        return [way.target, *(each for each in way.target.fallbacks if allows(each.model))]

    def _question(self, way: _Way, body: Callable[[Target], bytes]) -> Question:
        call = way.call
        deadline = (way.since or call.started) + self._total
        # Others may want an answer that can be shared for longer: who asked leaves it to them, or it is cancelled.
        due = None if way.shared else call.due
        return Question(call.endpoint, call.request_id, way.stream, deadline, body, call.account.called, due)

    def _renamed(self, way: _Way) -> Callable[[Target], bytes]:
        """The body as it came, or with the name of who is asked."""
        call = way.call
        return lambda target: (
            call.raw if call.body["model"] == target.model else canonical.dump(call.body | {"model": target.model})
        )

    # ---- embeddings

    async def _embed(self, way: _Way, out: Out) -> None:
        call, account = way.call, way.call.account
        units = entry.inputs(call.body.get("input"))
        if units and len(units) > MOST_INPUTS:
            raise InvalidRequest(f"`input` holds {len(units)} inputs: at most {MOST_INPUTS} at once.", param="input")
        if way.bypass or units is None:
            await self._lookup(way, [""], out)
            raw, answer, reply = await self._vectors(way, None)
            if isinstance(answer, dict):
                account.count(answer.get("usage"))
            return await out.whole(raw, reply.headers | way.said())
        # Each different input once, in the order of its first appearance.
        given = [canonical.encode(unit) for unit in units]
        first = dict(zip(given, units, strict=True))
        places = {text: place for place, text in enumerate(first)}
        texts = list(first)
        inputs = _Inputs(list(first.values()), texts, self._keys(way, way.target.revision, texts))
        inputs.order = [places[text] for text in given]
        key = inputs.keys[0]
        if len(given) > 1:
            key = sha256("".join(inputs.keys[place] for place in inputs.order).encode()).hexdigest()
        return await self._board(
            way,
            out,
            inputs.keys,
            self._flight(way, key),
            serve=lambda found: self._embedded(way, inputs, found, out),
            ask=lambda found, flight: self._ask_vectors(way, inputs, [*found], flight),
        )

    async def _embedded(self, way: _Way, inputs: _Inputs, found: list[Entry], out: Out) -> None:
        account, now = way.call.account, time.time()
        account.cache, account.known = "hit", True
        oldest = min(found, key=lambda each: each.ttl - each.age(now))
        headers = way.found(oldest.ttl, oldest.age(now), inputs.keys[0] if len(inputs.keys) == 1 else None)
        body, usage = entry.to_vectors(found, inputs.order)
        account.count(usage)
        return await out.whole(body, headers)

    async def _ask_vectors(self, way: _Way, inputs: _Inputs, found: list[Entry | None], flight: Flight) -> None:
        account, unique, texts = way.call.account, inputs.unique, inputs.texts
        missing = [place for place, kept in enumerate(found) if kept is None]
        # 1. What is missing; everything, should the model have changed under the vectors that were found.
        if len(missing) < len(unique):
            way.forward = account.cache = "partial"
        asked = None if len(missing) == len(inputs.order) else [unique[place] for place in missing]
        raw, answer, reply = await self._vectors(way, asked)
        known, revision = self._revision(way, reply)
        if reply.target is not way.target or (known and revision != way.target.revision):
            way.target = replace(reply.target, revision=revision)
            if len(missing) < len(unique):
                way.forward = account.cache = "miss"
                missing = list(range(len(unique)))
                stands_in = {name: said for name, said in reply.headers.items() if name == "x-model-fallback"}
                raw, answer, reply = await self._vectors(way, unique)
                reply.headers |= stands_in
                if reply.revision != revision:
                    raise UpstreamBroken("The model changed twice while it answered: ask again.")
        fresh = self._entries(way, answer, [unique[place] for place in missing])
        rest = self._form(way, revision, without="input")
        for place, made in zip(missing, fresh, strict=True):
            made.hold(canonical.with_input(rest, texts[place]), 0)
        for place, made in zip(missing, fresh, strict=True):
            found[place] = made
        # 2. Stored under the revision that the answer carries.
        written = dict(zip(self._keys(way, revision, [texts[p] for p in missing]), fresh, strict=True))
        outcome = (None if way.bypass else await self._cache.write(written) or "stored") if known else "revision"
        body, usage = entry.to_vectors([e for e in found if e], inputs.order)
        account.count(usage)
        flight.begin({"streams": False, "headers": reply.headers, "usage": usage})
        await flight.put(raw if asked is None else body)
        flight.end(outcome)

    async def _vectors(self, way: _Way, units: list[Any] | None) -> tuple[bytes, Any, Reply]:
        """The upstream's answer for `units`; None: for the request as it came."""
        call, body = way.call, self._renamed(way)
        answer: Any = None
        if units is not None:
            asked = call.body | {"input": units}
            body = lambda target: canonical.dump(asked | {"model": target.model})  # noqa: E731 - as the one above

        def called(real: RealCall) -> None:
            call.account.called(real)
            if real.answered or real.lost:
                self._bill(call, real, answer.get("usage") if isinstance(answer, dict) else None, 0)

        question = replace(self._question(way, body), on_call=called)
        async with self._upstreams.ask(self._targets(way), question) as reply:
            call.account.known = call.account.asked = True
            raw, answer = await reply.json()
            return raw, answer, reply

    def _entries(self, way: _Way, answer: Any, units: list[Any]) -> list[Entry]:
        try:
            return entry.of_vectors(answer, units, way.target.ttl, time.time(), way.stamp)
        except ValueError:
            raise UpstreamBroken(f"The upstream `{way.target.upstream}` did not answer one vector per input.") from None


def _count(usage: Any, name: str) -> int:
    """A count of tokens as an upstream told it; 0 for nonsense."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0

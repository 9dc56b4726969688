"""One request's way: look it up, else ask the upstream, pass the answer on, store what is whole.

Owns the order of these steps and what the answer says of them. Knows HTTP only as `Out`, redis only as `Store`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import orjson

from . import canonical, entry
from .cache import Wishes
from .entry import EMBEDDINGS, Entry
from .errors import InvalidRequest, NoSuchModel, NotCached, ProxyError, UpstreamBroken, UpstreamTimeout
from .routes import Routes, Target
from .settings import Settings
from .upstream import LocalModels, Reply, Upstream

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
STALLED_CLIENT_SECONDS = 5.0  # to take the last event of a stream whose time is up
MOST_INPUTS = 2048  # OpenAI's limit of embedding inputs


class Store(Protocol):
    """The cache as the exchange sees it; cache.Cache is one."""

    enabled: bool
    secret: bytes

    async def read(self, keys: Sequence[str]) -> list[Entry | None] | None: ...

    async def write(self, entries: Mapping[str, Entry]) -> str | None: ...


class Out(Protocol):
    """Where the answer goes."""

    started: bool
    ended: bool

    async def whole(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON) -> None: ...

    async def head(self, headers: Mapping[str, str]) -> None: ...

    async def piece(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


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

    def count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.prompt_tokens = usage.get("prompt_tokens") or 0
            self.completion_tokens = usage.get("completion_tokens") or 0


@dataclass(slots=True)
class Call:
    """One parsed request."""

    tenant: str
    endpoint: str
    raw: bytes
    body: dict[str, Any]
    request_id: str
    wishes: Wishes
    store_sampled: bool
    started: float  # time.perf_counter()
    account: Account = field(default_factory=Account)


@dataclass(slots=True)
class _Way:
    """What was decided about one call before anybody was asked."""

    call: Call
    target: Target
    stream: bool
    usage: bool
    bypass: str | None
    forward: str = "miss"

    @property
    def _alias(self) -> dict[str, str]:
        return {"x-model-alias": self.target.alias} if self.target.alias else {}

    def said(self, outcome: str | None = None) -> dict[str, str]:
        """Headers of an answer that came from an upstream. `outcome`: `stored`, or why not."""
        if self.bypass:
            status = f"llm-lab; fwd=bypass; detail={self.bypass}"
        else:
            end = {None: "", "stored": "; stored"}.get(outcome, f"; detail={outcome}")
            status = f"llm-lab; fwd={self.forward}{end}"
        return {"cache-status": status, **self._alias}

    def found(self, ttl: int, age: int, key: str | None) -> dict[str, str]:
        """Headers of an answer from the cache."""
        status = f"llm-lab; hit; ttl={ttl - age}" + (f'; key="{key}"' if key else "")
        revision = {"x-model-revision": self.target.revision} if self.target.revision else {}
        return {"cache-status": status, "age": str(age), **revision, **self._alias}


class Exchange:
    def __init__(
        self, settings: Settings, cache: Store, upstreams: Mapping[str, Upstream], routes: Routes, local: LocalModels
    ) -> None:
        self._total = settings.total_timeout_seconds
        self._cache = cache
        self._upstreams = upstreams
        self._routes = routes
        self._local = local

    async def answer(self, call: Call, out: Out) -> None:
        """Answer `call` on `out`. Faults are raised before the first byte; after it they end the stream."""
        try:
            try:
                async with asyncio.timeout(self._total):
                    way = await self._way(call)
                    await (self._embed(way, out) if call.endpoint == EMBEDDINGS else self._generate(way, out))
            except TimeoutError:
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

    async def _way(self, call: Call) -> _Way:
        try:
            return self._decide(call)
        except NoSuchModel as unknown:
            # Loaded since the last look, or still loading: only the service itself can tell.
            await self._local.look_again(unknown.model)
            return self._decide(call)

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
        target = self._routes.resolve(model, self._local.entries)
        call.account.model, call.account.upstream = target.model, target.upstream
        call.account.known = target.versioned
        kind = self._local.entries.get(target.model, {}).get("kind") if target.versioned else None
        if kind and (kind == "embedding") != (call.endpoint == EMBEDDINGS):
            raise InvalidRequest(f"`{model}` is of kind {kind}, which {call.endpoint} does not take.", param="model")
        bypass = None if self._cache.enabled else "disabled"
        if call.wishes.no_store:
            bypass = "no-store"
        bypass = bypass or entry.why_bypass(
            call.endpoint, body, target.temperature.get(call.endpoint), target.keep_sampled or call.store_sampled
        )
        forward = "request" if call.wishes.no_cache else "miss"
        return _Way(call, target, bool(stream), bool((options or {}).get("include_usage")), bypass, forward)

    def _key(self, way: _Way, revision: str | None, *, without: str = "") -> str:
        """The key of the whole request, or of what is left `without` a field."""
        call, target = way.call, way.target
        body = {name: value for name, value in call.body.items() if name != without} if without else call.body
        return canonical.key(
            self._cache.secret,
            tenant=call.tenant,
            upstream=target.upstream,
            model=target.model,
            revision=revision,
            endpoint=call.endpoint,
            body=canonical.comparable(body, target.model, target.defaults.get(call.endpoint, {})),
        )

    def _keys(self, way: _Way, revision: str | None, inputs: Iterable[bytes]) -> list[str]:
        """One key for each canonical input."""
        return canonical.input_keys(self._cache.secret, self._key(way, revision, without="input"), inputs)

    async def _lookup(self, way: _Way, keys: Sequence[str]) -> list[Entry | None]:
        """What is stored under `keys` and fresh enough for this caller."""
        found: list[Entry | None] = [None] * len(keys)
        if way.bypass is None and not way.call.wishes.no_cache:
            read = await self._cache.read(keys)
            if read is None:
                way.bypass = "redis"
            else:
                found, now, limit = read, time.time(), way.call.wishes.max_age
                if limit is not None and any(e and e.age(now) > limit for e in found):
                    way.forward = "request"
                    found = [e if e and e.age(now) <= limit else None for e in found]
        way.call.account.cache = "bypass" if way.bypass else way.forward
        if way.call.wishes.only_if_cached and not all(found):
            way.call.account.cache = "miss"
            raise NotCached(
                "Nothing fresh is cached for this request, and `only-if-cached` forbids to ask an upstream.",
                headers={"cache-status": "llm-lab; detail=only-if-cached"},
            )
        return found

    def _revision(self, way: _Way, reply: Reply) -> tuple[bool, str | None]:
        """Whether it is known which revision made this answer, and which."""
        if not way.target.versioned:
            return True, None
        self._local.learn(way.target.model, reply.revision)
        return reply.revision is not None, reply.revision

    # ---- chat and text

    async def _generate(self, way: _Way, out: Out) -> None:
        call, target = way.call, way.target
        # 1. The cache.
        key = self._key(way, target.revision) if way.bypass is None else ""
        found = (await self._lookup(way, [key]))[0]
        if found is not None:
            return await self._hit(way, found, key, out)
        # 2. The upstream, always asked to count a stream's tokens.
        body = call.raw
        upstream = self._upstreams[target.upstream]
        options = call.body.get("stream_options") or {}
        asked = isinstance(options.get("include_usage", False), bool)  # else the upstream says what is wrong with it
        count = way.stream and upstream.access.stream_usage and asked and not way.usage
        if count or target.alias:
            changed = call.body | {"model": target.model}
            body = canonical.dump(
                changed | {"stream_options": {**options, "include_usage": True}} if count else changed
            )
        async with upstream.post(call.endpoint, target.model, body, call.request_id, way.stream) as reply:
            call.account.known = True
            # 3. The answer, whole or as it comes; stored before its end is passed on, so that who asks again finds it.
            if way.stream and reply.streams:
                return await self._stream(way, reply, out)
            if reply.streams:
                raise UpstreamBroken(f"The upstream `{target.upstream}` streams where nobody asked it to.")
            raw, answer = await reply.json()
            if not isinstance(answer, dict):
                raise UpstreamBroken(f"The upstream `{target.upstream}` answered with JSON that is no object.")
            call.account.count(answer.get("usage"))
            headers = reply.headers | way.said(await self._store(way, reply, answer))
            if not way.stream:
                return await out.whole(raw, headers)
            if not isinstance(answer.get("choices"), list):
                raise UpstreamBroken(f"The upstream `{target.upstream}` answered without choices.")
            return await self._replay(way, answer, headers, out)

    async def _hit(self, way: _Way, found: Entry, key: str, out: Out) -> None:
        account = way.call.account
        account.cache, account.known = "hit", True
        account.count(found.about.get("usage"))
        headers = way.found(found.ttl, found.age(time.time()), key)
        if way.stream:
            return await self._replay(way, orjson.loads(found.body), headers, out)
        identity = entry.new_id(way.call.endpoint)
        return await out.whole(entry.renewed(found.body, identity, int(time.time())), headers)

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
        kept = entry.of_answer(answer, way.target.ttl, time.time())
        return await self._cache.write({self._key(way, revision): kept}) or "stored"

    async def _stream(self, way: _Way, reply: Reply, out: Out) -> None:
        call, account = way.call, way.call.account
        events, gathered = entry.Events(), entry.Gathered(call.endpoint)
        headers = reply.headers | way.said()
        name = way.target.upstream
        async for piece in reply.pieces():
            try:
                passed, end = _sift(way, reply, events.feed(piece), gathered)
            except (ValueError, TypeError, AttributeError, KeyError):
                raise UpstreamBroken(f"The upstream `{name}` streams something that is not OpenAI's.") from None
            if gathered.told and account.ttft is None:
                account.ttft = time.perf_counter() - call.started
            account.count(gathered.usage)
            if end == "done":
                await self._store(way, reply, gathered.answer())
            if passed:
                if not out.started:
                    await out.head(headers)
                await out.piece(passed)
            if end:
                await out.end()
                account.error = "upstream_stream_error" if end == "error" else ""
                return await reply.drain()
        raise UpstreamBroken(f"The upstream `{name}` ended its stream without [DONE]: the answer is not whole.")

    # ---- embeddings

    async def _embed(self, way: _Way, out: Out) -> None:
        call, account = way.call, way.call.account
        units = entry.inputs(call.body.get("input"))
        if units and len(units) > MOST_INPUTS:
            raise InvalidRequest(f"`input` holds {len(units)} inputs: at most {MOST_INPUTS} at once.", param="input")
        if way.bypass or units is None:
            await self._lookup(way, [""])
            raw, answer, reply = await self._vectors(way, None)
            if isinstance(answer, dict):
                account.count(answer.get("usage"))
            return await out.whole(raw, reply.headers | way.said())
        # 1. Each different input once, in the order of its first appearance.
        given = [canonical.encode(unit) for unit in units]
        first = dict(zip(given, units, strict=True))
        places = {text: place for place, text in enumerate(first)}
        order, texts, unique = [places[text] for text in given], list(first), list(first.values())
        keys = self._keys(way, way.target.revision, texts)
        found = await self._lookup(way, keys)
        missing = [place for place, kept in enumerate(found) if kept is None]
        now = time.time()
        if not missing:
            account.cache, account.known = "hit", True
            kept = [e for e in found if e]
            oldest = min(kept, key=lambda e: e.ttl - e.age(now))
            headers = way.found(oldest.ttl, oldest.age(now), keys[0] if len(keys) == 1 else None)
            body, usage = entry.to_vectors(kept, order)
            account.count(usage)
            return await out.whole(body, headers)
        # 2. What is missing; everything, should the model have changed under the vectors that were found.
        if len(missing) < len(unique):
            way.forward = account.cache = "partial"
        asked = None if len(missing) == len(units) else [unique[place] for place in missing]
        raw, answer, reply = await self._vectors(way, asked)
        known, revision = self._revision(way, reply)
        if known and revision != way.target.revision:
            way.target = replace(way.target, revision=revision)
            if len(missing) < len(unique):
                way.forward = account.cache = "miss"
                missing = list(range(len(unique)))
                raw, answer, reply = await self._vectors(way, unique)
                if reply.revision != revision:
                    raise UpstreamBroken("The model changed twice while it answered: ask again.")
        fresh = self._entries(way, answer, [unique[place] for place in missing])
        for place, made in zip(missing, fresh, strict=True):
            found[place] = made
        # 3. Stored under the revision that the answer carries.
        written = dict(zip(self._keys(way, revision, [texts[p] for p in missing]), fresh, strict=True))
        outcome = (None if way.bypass else await self._cache.write(written) or "stored") if known else "revision"
        body, usage = entry.to_vectors([e for e in found if e], order)
        account.count(usage)
        return await out.whole(raw if asked is None else body, reply.headers | way.said(outcome))

    async def _vectors(self, way: _Way, units: list[Any] | None) -> tuple[bytes, Any, Reply]:
        """The upstream's answer for `units`; None: for the request as it came."""
        call, target = way.call, way.target
        body = call.raw
        if units is not None or target.alias:
            body = canonical.dump(call.body | {"model": target.model} | ({} if units is None else {"input": units}))
        upstream = self._upstreams[target.upstream]
        async with upstream.post(call.endpoint, target.model, body, call.request_id, stream=False) as reply:
            call.account.known = True
            raw, answer = await reply.json()
            return raw, answer, reply

    def _entries(self, way: _Way, answer: Any, units: list[Any]) -> list[Entry]:
        try:
            return entry.of_vectors(answer, units, way.target.ttl, time.time())
        except ValueError:
            raise UpstreamBroken(f"The upstream `{way.target.upstream}` did not answer one vector per input.") from None


def _sift(way: _Way, reply: Reply, events: list[bytes], gathered: entry.Gathered) -> tuple[bytes, str]:
    """What of these events the caller gets, and how the stream ends with them: `done`, `error`, or not yet."""
    passed: list[bytes] = []
    for event in events:
        data = entry.event_data(event)
        if data == b"[DONE]":
            return b"".join([*passed, event]), "done"
        if data is None:
            passed.append(event)
            continue
        chunk = orjson.loads(data)
        if chunk.get("error") is not None:
            return b"".join([*passed, reply.redacted(event)]), "error"
        gathered.feed(chunk)
        passed.append(entry.asked_for(event, chunk, way.usage))
    return b"".join(passed), ""

"""One request's way: look it up, else ask the upstream, pass the answer on, store what is whole.

Owns the order of these steps. Knows HTTP only as `Out`, redis only as `Store`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import choice, randrange

from ..cache import entry
from ..cache.entry import EMBEDDINGS, Entry
from ..cache.flight import Flight, FlightLost, SingleFlight
from ..cache.store import BATCH, CacheControl, PipelinedCommand, entry_name
from ..errors import (
    DeadlineExceeded,
    NotCached,
    ProxyError,
    UpstreamBroken,
    UpstreamDown,
    UpstreamRefused,
    UpstreamTimeout,
)
from ..ledger.reconciliation import Reconciliation
from ..settings import Settings
from ..upstreams.client import UpstreamPool
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes, Target
from . import responses
from .billing import Billing
from .completions import CompletionFetch
from .context import RequestContext, RequestRecord
from .delivery import deliver, hit
from .embeddings import EmbeddingFetch
from .plan_cache import CachedPlan, PreparedHit
from .planner import Plan, Planner, permit
from .responses import RESPONSES
from .roles import JSON, SSE, Limiter, NoLimits, Quick, Recorder, ResponseWriter, Store

STALLED_CLIENT_SECONDS = 5.0  # to take the last event of a stream whose time is up
REFRESH = CacheControl(no_cache=True)
MOST_FLIGHTS = 4  # that a request boards before it flies alone


class Executor:
    def __init__(
        self,
        settings: Settings,
        cache: Store,
        upstreams: UpstreamPool,
        routes: Routes,
        local: ModelList,
        *,
        limits: Limiter | None = None,
        ledger: Recorder | None = None,
        flights: SingleFlight | None = None,
        tally: Reconciliation | None = None,
    ) -> None:
        self._flights = flights or SingleFlight(None, limit=settings.cache_max_entry_bytes)
        self._limits = limits or NoLimits()
        self._total = settings.total_timeout_seconds
        self._cache = cache
        self._upstreams = upstreams
        self.planner = Planner(cache, routes, local)  # also for who wants to know what would be decided
        self._billing = Billing(ledger, tally)
        self._completions = CompletionFetch(
            cache, upstreams, local, self.planner, self._billing, total_seconds=self._total
        )
        self._embeddings = EmbeddingFetch(cache, upstreams, self.planner, self._billing, self._completions)
        self._refreshes: set[asyncio.Task[None]] = set()

    async def serve_local_hit(self, call: RequestContext, out: Quick) -> bool:
        """Answer from what this process holds, if it can: the way of most hits, and it waits for nothing but limits.

        Raises what these say. False: nothing was done.
        """
        known = call.cached_plan
        if known is None or not known.key or known.samples > 1:
            return False
        target, account = known.target, call.record
        now = time.time()
        found = self._cache.get_local(known.key, self._cache.epoch(call.identity.tenant, target.model), now)
        if found is None:
            return False
        age = found.age(now)
        if age >= found.ttl:
            return False
        account.model, account.upstream, account.model_known = target.model, target.upstream, True
        try:
            self._claim(call, target, at_once=True)
            if call.admission is not None:
                await self._cache.read((), call.admission)
                out.headers.update(call.admission.headers)
            account.cache = "hit"
            account.set_usage(found.metadata.get("usage"))
            shown = known.prepared_hit
            if shown is None or shown.entry is not found or shown.age != age:
                shown = known.prepared_hit = self._shown(call, known, found, age)
            mark = b'"id":"%s","created":%d,' % (entry.new_id(call.endpoint).encode(), now)
            if known.stream:
                account.ttft = time.perf_counter() - call.started
            await out.send_prepared(mark.join(shown.pieces), shown.headers)
        except ProxyError as error:
            account.error = error.code or error.type
            raise
        finally:
            self._billing.close_request(call)
        return True

    def _shown(self, call: RequestContext, known: CachedPlan, found: Entry, age: int) -> PreparedHit:
        if known.stream:
            pieces = found.replays.get(known.include_usage)
            if pieces is None:
                pieces = found.replays[known.include_usage] = entry.replay_pieces(
                    call.endpoint, found.body, known.include_usage
                )
                self._cache.resize(known.key, found, sum(map(len, pieces)))
        else:
            pieces = [b"{", found.body[1:]]
        mark = len(b'"id":"","created":,') + len(entry.new_id(call.endpoint)) + 10  # digits, until the year 2286
        size = sum(map(len, pieces)) + mark * (len(pieces) - 1)
        headers = {"content-type": SSE if known.stream else JSON, "content-length": str(size)}
        headers |= Plan(call, known.target, known.stream, known.include_usage, None).hit_headers(
            found.ttl, age, known.key
        )
        return PreparedHit(found, age, [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()], pieces)

    async def answer(self, call: RequestContext, out: ResponseWriter) -> None:
        """Answer `call` on `out`. Faults are raised before the first byte; after it they end the stream."""
        left = self._total if call.caller_deadline is None else call.caller_deadline - time.perf_counter()
        try:
            try:
                async with asyncio.timeout(min(self._total, left)):
                    way = await self.planner.plan(call)
                    self._claim(call, way.target)
                    answers = {EMBEDDINGS: self._embed, RESPONSES: self._relay}
                    await answers.get(call.endpoint, self._generate)(way, out)
            except TimeoutError:
                if left < self._total:
                    raise DeadlineExceeded from None
                raise UpstreamTimeout("The answer took too long: PROXY_TOTAL_TIMEOUT_SECONDS is the limit.") from None
        except ProxyError as error:
            call.record.error = error.code or error.type
            if not out.started:
                raise
            try:
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    await out.write(b"data: " + error.body() + b"\n\n")
                    await out.end()
            except TimeoutError:  # it does not read: whatever is sent more would wait too
                call.record.error = "client_stalled"
        finally:
            if call.admission is not None:
                call.admission.settle(call.record.upstream_tokens)
            self._billing.close_request(call)

    def _claim(self, call: RequestContext, target: Target, *, at_once: bool = False) -> None:
        """Permission first, then the claim on the limits: both before anything of the cache is given out."""
        permit(call, target)
        call.admission = self._limits.admission(
            call.identity, call.endpoint, target.model, call.body, len(call.raw), target.upstream, at_once=at_once
        )

    async def _lookup(
        self, way: Plan, keys: Sequence[str], out: ResponseWriter, *riders: PipelinedCommand
    ) -> list[Entry | None]:
        """What is stored under `keys` and fresh enough for this caller, who is within the limits: else it raises."""
        found: list[Entry | None] = [None] * len(keys)
        skips = way.bypass is not None or way.request.cache_control.no_cache
        admission = None if way.limits_checked else way.request.admission
        way.limits_checked = True  # limits are asked once, however often the cache is
        asks = [*riders] if admission is None else [admission, *riders]
        if not self._cache.enabled and admission is not None:
            await self._limits.ask(admission)
        elif not skips or asks:
            read = await self._cache.read([] if skips else keys, *asks, stamp=way.epoch)
            if skips:
                pass
            elif read is None:
                way.bypass = "redis"
            else:
                now, limit, target = time.time(), way.request.cache_control.max_age, way.target
                longest = [
                    0 if limit is not None else target.stale_while_revalidate if each and each.grace else 0
                    for each in read
                ]
                found = [
                    each if each and each.age(now) < each.ttl + more else None
                    for each, more in zip(read, longest, strict=True)
                ]
                if limit is not None and any(e and e.age(now) > limit for e in found):
                    way.forward = "request"
                    found = [e if e and e.age(now) <= limit else None for e in found]
        if admission is not None:
            out.headers.update(admission.headers)
        way.request.record.cache = "bypass" if way.bypass else way.forward
        if way.request.cache_control.only_if_cached and way.samples > 1 and any(found):
            found = [each or next(filter(None, found)) for each in found]
        if way.request.cache_control.only_if_cached and not all(found):
            way.request.record.cache = "miss"
            raise NotCached(
                "Nothing fresh is cached for this request, and `only-if-cached` forbids to ask an upstream.",
                headers={"cache-status": "llm-lab; detail=only-if-cached"},
            )
        return found

    # ---- chat and text

    async def _generate(self, way: Plan, out: ResponseWriter) -> None:
        async def serve(found: list[Entry]) -> None:
            one = choice(found)  # noqa: S311 no secret
            if one.age(time.time()) >= one.ttl:
                self._refresh(way)
            await hit(way, one, out)

        async def ask(looked: list[Entry | None], flight: Flight) -> None:
            empty = [slot for slot, each in enumerate(looked) if each is None]
            way.slot = choice(empty) if way.request.cache_control.no_cache else empty[0]  # noqa: S311 no secret
            await self._completions.fetch(way, flight)

        try:
            await self._share(way, out, way.keys, self.planner.flight_name(way, way.key), serve=serve, ask=ask)
        except (UpstreamDown, UpstreamTimeout, UpstreamBroken, UpstreamRefused) as error:
            stale = await self._stale(way) if error.status >= 500 and not out.started else None
            if stale is None:
                raise
            await hit(way, stale, out, failed=error.status)

    async def _stale(self, way: Plan) -> Entry | None:
        """What may stand in where the upstream fails. Looked for by everybody who heard of the failure."""
        wishes, allowed = way.request.cache_control, way.target.stale_if_error
        if not allowed or way.bypass or wishes.no_cache or wishes.max_age is not None:
            return None
        now = time.time()
        found = await self._cache.read(way.keys, stamp=way.epoch) or []
        return next((each for each in found if each and each.age(now) < each.ttl + allowed), None)

    def _refresh(self, way: Plan) -> None:
        """Fetch anew in the background, once for all who get the stale answer meanwhile."""
        call = replace(
            way.request,
            record=RequestRecord(),
            admission=None,
            cache_control=REFRESH,
            started=time.perf_counter(),
            caller_deadline=None,
        )
        task = asyncio.ensure_future(self._refreshed(replace(way, request=call, limits_checked=True)))
        self._refreshes.add(task)
        task.add_done_callback(self._refreshes.discard)

    async def _refreshed(self, way: Plan) -> None:
        way.slot = randrange(way.samples)  # noqa: S311 no secret
        with suppress(ProxyError, FlightLost, TimeoutError):
            async with asyncio.timeout(self._total):
                with self._flights.join(f"{way.key}:{way.epoch}:refresh") as seat:
                    if not seat.first:
                        return
                    lease = seat.lease(())
                    if lease is not None:
                        await self._cache.read((), lease)
                    seat.start(lease, partial(self._fetch, way, partial(self._completions.fetch, way)))
                    async for _ in seat.parts():
                        pass

    async def _share(
        self,
        way: Plan,
        out: ResponseWriter,
        keys: list[str],
        name: str,
        *,
        serve: Callable[[list[Entry]], Awaitable[None]],
        ask: Callable[[list[Entry | None], Flight], Awaitable[None]],
    ) -> None:
        """What is stored under `keys` by `serve`; else what `ask` has from the upstream, once for all on board."""
        # What is stored may be too old for this request, and then is no reason to stay.
        aged = (
            way.request.cache_control.max_age is not None
            or way.target.stale_while_revalidate > 0
            or way.target.stale_if_error > 0
        )
        for turn in range(MOST_FLIGHTS + 1):
            # 1. A seat: who wants the same at the same time flies together, who was out of luck too often alone.
            way.shareable = bool(name) and turn < MOST_FLIGHTS
            with self._flights.join(name if turn < MOST_FLIGHTS else "") as seat:
                try:
                    # 2. The cache: the first on board looks for all.
                    if seat.first:
                        names = [entry_name(key) for key in keys] if name else []
                        lease = seat.lease(names, anyway=turn > 0 or aged) if len(keys) <= BATCH else None
                        looked = await self._lookup(way, keys, out, *([lease] if lease else []))
                        found = [each for each in looked if each is not None]
                        if len(found) == len(keys):
                            seat.flight.resolve_from_cache(found)
                            return await serve(found)
                        seat.start(lease, partial(self._fetch, way, partial(ask, looked)))
                    else:
                        if way.request.admission is not None:
                            await self._lookup(way, [], out)
                        landed = await seat.cached_entries()
                        if landed is not None:
                            return await serve(landed)
                    # 3. The answer on its way, whoever asks the upstream for it.
                    return await deliver(way, seat, out)
                except FlightLost:
                    if out.started:
                        raise UpstreamBroken("Who asked the upstream is gone: the answer is not whole.") from None
        raise UpstreamDown("The proxy is ending: ask again.", headers={"retry-after": "1"})

    async def _fetch(self, way: Plan, ask: Callable[[Flight], Awaitable[None]], flight: Flight) -> None:
        """The flight's own task: ask the upstream, pass on what comes. One more try where others wait too."""
        try:
            await ask(flight)
        except ProxyError as error:
            if flight.has_head or error.status < 500 or not flight.shared:
                raise
            way.retried_at = time.perf_counter()
            await ask(flight)

    # ---- responses

    async def _relay(self, way: Plan, out: ResponseWriter) -> None:
        call = way.request
        await self._lookup(way, [""], out)
        async with self._upstreams.send(
            way.targets, self._completions.upstream_request(way, self._completions.renamed_body(way))
        ) as reply:
            call.record.model_known = call.record.upstream_called = True
            await responses.relay(reply, out, call.record, reply.headers | way.miss_headers(), call.started)

    # ---- embeddings

    async def _embed(self, way: Plan, out: ResponseWriter) -> None:
        inputs = self._embeddings.inputs(way)
        if inputs is None:
            await self._lookup(way, [""], out)
            raw, answer, reply = await self._embeddings.fetch(way, None)
            if isinstance(answer, dict):
                way.request.record.set_usage(answer.get("usage"))
            return await out.send(raw, reply.headers | way.miss_headers())
        return await self._share(
            way,
            out,
            inputs.keys,
            self.planner.flight_name(way, inputs.key),
            serve=lambda found: self._embeddings.serve(way, inputs, found, out),
            ask=lambda found, flight: self._embeddings.fetch_missing(way, inputs, [*found], flight),
        )

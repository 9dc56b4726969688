"""Execution of one request: plan, limits, cache lookup, flight, upstream call, delivery, billing.

Owns the order of these steps. Knows HTTP only as a ResponseWriter.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from random import choice, randrange

from .. import errors
from ..cache import entry, streams
from ..cache.entry import PREPARED_BYTES, Entry, PreparedHit
from ..cache.flight import Flight, FlightLost
from ..cache.policy import CacheControl
from ..cache.single_flight import SingleFlight
from ..cache.store import Cache, entry_name
from ..endpoints import ENDPOINTS
from ..errors import ProxyError, UpstreamBroken, UpstreamDown, UpstreamTimeout
from ..keys.limits import Limits
from ..ledger.ledger import Ledger
from ..ledger.reconciliation import Reconciliation
from ..long_bodies import off_loop
from ..redis.client import PipelinedCommand
from ..settings import Settings
from ..telemetry.record import RequestRecord, UpstreamCall
from ..upstreams.failover import UpstreamPool
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Routes, Target
from . import responses
from .billing import Billing
from .completions import CompletionFetch
from .context import Plan, RequestContext
from .delivery import JSON, SSE, ResponseWriter, deliver, deliver_hit
from .embeddings import EmbeddingFetch
from .planner import Planner, check_permission
from .tasks import TaskFetch

STALLED_CLIENT_SECONDS = 5.0  # time for a client to read the last event of a stream that has timed out
REFRESH = CacheControl(no_cache=True)
MAX_FLIGHTS = 4  # flights that a request joins before it continues without sharing

Serve = Callable[[list[Entry]], Awaitable[None]]
Fetch = Callable[[list[Entry | None], Flight], Awaitable[None]]


class Executor:
    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        upstreams: UpstreamPool,
        routes: Routes,
        models: ModelList,
        *,
        limits: Limits,
        ledger: Ledger,
        flights: SingleFlight,
        reconciliation: Reconciliation,
    ) -> None:
        self._flights, self._limits = flights, limits
        self._total = settings.total_timeout_seconds
        self._cache, self._upstreams = cache, upstreams
        self.planner = Planner(cache, routes, models)  # also for previews
        self._billing = Billing(ledger, reconciliation, lambda name: name == upstreams.model_config.name)
        shared = (self.planner, self._billing)
        self._completions = CompletionFetch(cache, upstreams, models, *shared, limits=limits, total_seconds=self._total)
        self._embeddings = EmbeddingFetch(cache, upstreams, *shared, self._completions)
        self._refreshes: set[asyncio.Task[None]] = set()
        self._tasks = TaskFetch(cache, upstreams, self.planner, self._billing, self._completions)
        self._handlers: dict[str, Callable[[Plan, ResponseWriter], Awaitable[None]]] = {
            "completions": self._generate,
            "embeddings": partial(self._by_input, self._embeddings),
            "tasks": partial(self._by_input, self._tasks),
            "responses": self._relay,
        }

    async def serve_local_hit(self, request: RequestContext, writer: ResponseWriter) -> bool:
        """Answer from this process's local copies if possible, as for most hits. Waits only for limits. False: nothing
        was done. Raises the ProxyErrors of permission and limits."""
        cached = request.cached_plan
        if cached is None or not cached.key or cached.samples > 1:
            return False
        target, record = cached.target, request.record
        now = time.time()
        found = self._cache.get_local(cached.key, self._cache.epoch(request.identity.tenant, target.model), now)
        if found is None:
            return False
        age = found.age(now)
        if age >= found.ttl:
            return False
        record.model, record.upstream, record.model_known = target.model, target.upstream, True
        try:
            await self._claim(request, target, at_once=True)
            if request.admission is not None:
                await self._cache.read((), request.admission)
                writer.headers.update(request.admission.headers)
            record.cache = "hit"
            record.set_usage(found.metadata.get("usage"))
            form = (cached.stream, cached.include_usage, target.alias, target.auto)
            prepared = found.prepared.get(form)
            if prepared is None or prepared.age != age:
                prepared = await self._prepare_hit(request.endpoint, cached, found, age, prepared)
                if form not in found.prepared:
                    size = PREPARED_BYTES + sum(map(sys.getsizeof, (prepared.pieces, *prepared.pieces)))
                    self._cache.resize(cached.key, found, size)
                found.prepared[form] = prepared
            identity = b'"id":"%s","created":%d,' % (entry.new_id(request.endpoint).encode(), now)
            if cached.stream:
                record.ttft = time.perf_counter() - request.started
            await writer.send_prepared(identity.join(prepared.pieces), prepared.headers, prepared.head)
        except ProxyError as error:
            record.error = error.code or error.type
            raise
        finally:
            if request.admission is not None:
                request.admission.settle(0)
            self._billing.close_request(request)
        return True

    async def _prepare_hit(
        self, endpoint: str, cached: Plan, found: Entry, age: int, before: PreparedHit | None
    ) -> PreparedHit:
        """A hit with its headers, to be kept with the entry as a part of its bytes. `before`: of an earlier second."""
        if before is not None:
            pieces = before.pieces
        elif cached.stream:
            what = (endpoint, found.body, cached.include_usage)
            pieces = await off_loop(len(found.body), streams.replay_pieces, *what)
        else:
            pieces = [b"{", found.body[1:]]
        identity = len(b'"id":"","created":,') + len(entry.new_id(endpoint)) + 10  # digits, until year 2286
        size = sum(map(len, pieces)) + identity * (len(pieces) - 1)
        headers = {"content-type": SSE if cached.stream else JSON, "content-length": str(size)}
        headers |= cached.hit_headers(found.ttl, age, cached.key)
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        return PreparedHit(age, headers, head, pieces)

    async def answer(self, request: RequestContext, writer: ResponseWriter) -> None:
        """Answer a request. Errors before the first byte are raised; later ones end the stream."""
        record = request.record
        left = self._total if request.caller_deadline is None else request.caller_deadline - time.perf_counter()
        try:
            try:
                async with asyncio.timeout(min(self._total, left)):
                    try:
                        plan = await self.planner.plan(request)
                    except errors.ModelNotFound:
                        await self._limits.count(request.identity)
                        raise
                    record.planned_at = time.perf_counter()
                    await self._claim(request, plan.target)
                    await self._handlers[ENDPOINTS[request.endpoint].handler](plan, writer)
            except TimeoutError:
                if left < self._total:
                    raise errors.DeadlineExceeded from None
                raise UpstreamTimeout("The answer took longer than PROXY_TOTAL_TIMEOUT_SECONDS.") from None
        except ProxyError as error:
            record.error = error.code or error.type
            if not writer.started:
                raise
            try:
                async with asyncio.timeout(STALLED_CLIENT_SECONDS):
                    await writer.write(b"data: " + error.body() + b"\n\n")
                    await writer.end()
            except TimeoutError:  # the client does not read: anything more would wait too
                record.error = "client_stalled"
        finally:
            if request.admission is not None:
                request.admission.settle(record.upstream_tokens)
            self._billing.close_request(request)

    async def _claim(self, request: RequestContext, target: Target, *, at_once: bool = False) -> None:
        """Check the permission and claim the limits, before an entry of the cache is served."""
        check_permission(request, target)
        if not request.identity.limited:
            return
        what = (request.identity, request.endpoint, target.model, request.body, len(request.raw), target.upstream)
        request.admission = await self._limits.admission(*what, at_once=at_once)

    async def _lookup(
        self, plan: Plan, keys: Sequence[str], writer: ResponseWriter, *piggyback: PipelinedCommand
    ) -> list[Entry | None]:
        """The entries under `keys` that are fresh enough for this caller. Raises if a limit refuses the request."""
        request, directives = plan.request, plan.request.cache_control
        found: list[Entry | None] = [None] * len(keys)
        skip = plan.bypass is not None or directives.no_cache
        admission = None if plan.limits_checked else request.admission
        plan.limits_checked = True  # once for each request, however often it reads the cache
        commands = [*piggyback] if admission is None else [admission, *piggyback]
        if not self._cache.enabled and admission is not None:
            await self._limits.check(admission)
        elif not skip or commands:
            read = await self._cache.read([] if skip else keys, *commands, epoch=plan.epoch)
            if skip:
                pass
            elif read is None:
                plan.bypass = "redis"
            else:
                now, limit, target = time.time(), directives.max_age, plan.target
                stale = 0 if limit is not None else target.stale_while_revalidate
                found = [
                    each if each and each.age(now) < each.ttl + (stale if each.grace else 0) else None for each in read
                ]
                if limit is not None and any(each and each.age(now) > limit for each in found):
                    plan.forward = "request"
                    found = [each if each and each.age(now) <= limit else None for each in found]
        request.record.looked_up_at = request.record.looked_up_at or time.perf_counter()
        if admission is not None:
            writer.headers.update(admission.headers)
        request.record.cache = "bypass" if plan.bypass else plan.forward
        if directives.only_if_cached and plan.samples > 1 and any(found):
            found = [each or next(filter(None, found)) for each in found]
        if directives.only_if_cached and not all(found):
            request.record.cache = "miss"
            why = "The cache has no fresh answer, and `only-if-cached` forbids a call of the upstream."
            raise errors.NotCached(why, headers={"cache-status": "llm-lab; detail=only-if-cached"})
        return found

    # ---- handlers

    async def _generate(self, plan: Plan, writer: ResponseWriter) -> None:
        async def serve(found: list[Entry]) -> None:
            one = choice(found)  # noqa: S311 - no secret
            if one.age(time.time()) >= one.ttl:
                self._refresh(plan)
            await deliver_hit(plan, one, writer)

        async def fetch(found: list[Entry | None], flight: Flight) -> None:
            empty = [slot for slot, each in enumerate(found) if each is None]
            plan.slot = choice(empty) if plan.request.cache_control.no_cache else empty[0]  # noqa: S311 - no secret
            await self._completions.fetch(plan, flight)

        try:
            name = self.planner.flight_name(plan, plan.key)
            await self._share(plan, writer, plan.keys, name, serve=serve, fetch=fetch)
        except (UpstreamDown, UpstreamTimeout, UpstreamBroken, errors.UpstreamRefused) as error:
            stale = await self._stale_entry(plan) if error.status >= 500 and not writer.started else None
            if stale is None:
                raise
            await deliver_hit(plan, stale, writer, failed=error.status)

    async def _by_input(self, fetch: EmbeddingFetch, plan: Plan, writer: ResponseWriter) -> None:
        inputs = await off_loop(len(plan.request.raw), fetch.inputs, plan)
        if inputs is None:
            await self._lookup(plan, [""], writer)
            raw, answer, response = await fetch.fetch(plan, None)
            if isinstance(answer, dict):
                plan.request.record.set_usage(answer.get("usage"))
            return await writer.send(raw, response.headers | plan.miss_headers())
        return await self._share(
            plan,
            writer,
            inputs.keys,
            self.planner.flight_name(plan, inputs.key),
            serve=lambda found: fetch.serve(plan, inputs, found, writer),
            fetch=lambda found, flight: fetch.fetch_missing(plan, inputs, [*found], flight),
        )

    async def _relay(self, plan: Plan, writer: ResponseWriter) -> None:
        record = plan.request.record
        await self._lookup(plan, [""], writer)

        def on_call(call: UpstreamCall) -> None:
            record.add_call(call)
            call.count_tokens(record.prompt_tokens + record.completion_tokens if call.answered else 0)

        call = self._completions.upstream_request(plan, self._completions.renamed_body(plan), on_call)
        with closing(await self._upstreams.send(plan.targets, call)) as response:
            record.model_known = record.upstream_called = True
            headers = response.headers | plan.miss_headers()
            await responses.relay(response, plan.request, writer, headers)

    # ---- stale entries

    async def _stale_entry(self, plan: Plan) -> Entry | None:
        """A stale entry that may replace a failed answer. Each request of the flight looks for it."""
        directives, allowed = plan.request.cache_control, plan.target.stale_if_error
        if not allowed or plan.bypass or directives.no_cache or directives.max_age is not None:
            return None
        now = time.time()
        found = await self._cache.read(plan.keys, epoch=plan.epoch) or []
        return next((each for each in found if each and each.age(now) < each.ttl + allowed), None)

    def _refresh(self, plan: Plan) -> None:
        """Revalidate in the background, once for all requests that get the stale entry meanwhile."""
        request = replace(plan.request, record=RequestRecord(), admission=None, cache_control=REFRESH)
        request.started, request.caller_deadline = time.perf_counter(), None
        task = asyncio.ensure_future(self._run_refresh(replace(plan, request=request, limits_checked=True)))
        self._refreshes.add(task)
        task.add_done_callback(self._refreshes.discard)

    async def _run_refresh(self, plan: Plan) -> None:
        plan.slot = randrange(plan.samples)  # noqa: S311 - no secret
        with suppress(ProxyError, FlightLost, TimeoutError):
            async with asyncio.timeout(self._total):
                with self._flights.join(f"{plan.key}:{plan.epoch}:refresh") as subscriber:
                    if not subscriber.first:
                        return
                    lease = subscriber.lease(())
                    if lease is not None:
                        await self._cache.read((), lease)
                    subscriber.start(lease, partial(self._fetch, plan, partial(self._completions.fetch, plan)))
                    async for _ in subscriber.parts():
                        pass

    # ---- single flight

    async def _share(
        self, plan: Plan, writer: ResponseWriter, keys: list[str], name: str, *, serve: Serve, fetch: Fetch
    ) -> None:
        """Answer by `serve` if all `keys` have entries; else `fetch`, once for all requests of the flight `name`."""
        # Entries may be too old for this request, and then do not make an upstream call unnecessary.
        target = plan.target
        aged = bool(target.stale_while_revalidate or target.stale_if_error)
        aged = aged or plan.request.cache_control.max_age is not None
        for attempt in range(MAX_FLIGHTS + 1):
            # 1. Join the flight of identical requests. After too many lost flights the request is not shared.
            plan.shareable = bool(name) and attempt < MAX_FLIGHTS
            with self._flights.join(name if attempt < MAX_FLIGHTS else "") as subscriber:
                try:
                    # 2. The first subscriber looks into the cache for all.
                    if subscriber.first:
                        names = [entry_name(key) for key in keys] if name else []
                        lease = subscriber.lease(names, anyway=attempt > 0 or aged)
                        entries = await self._lookup(plan, keys, writer, *([lease] if lease else []))
                        found = [each for each in entries if each is not None]
                        if len(found) == len(keys):
                            subscriber.flight.resolve_from_cache(found)
                            return await serve(found)
                        subscriber.start(lease, partial(self._fetch, plan, partial(fetch, entries)))
                    else:
                        if plan.request.admission is not None:
                            await self._lookup(plan, [], writer)
                        cached = await subscriber.cached_entries()
                        if cached is not None:
                            return await serve(cached)
                    # 3. Deliver the flight, whichever request calls the upstream.
                    return await deliver(plan, subscriber, writer)
                except FlightLost:
                    if writer.started:
                        raise UpstreamBroken("The leading proxy process has ended: the answer is incomplete.") from None
        raise UpstreamDown("The proxy is shutting down: retry.", headers={"retry-after": "1"})

    async def _fetch(self, plan: Plan, fetch: Callable[[Flight], Awaitable[None]], flight: Flight) -> None:
        """The fetch of a flight. It is repeated once if other requests wait for it too."""
        try:
            await fetch(flight)
        except ProxyError as error:
            if flight.head or error.status < 500 or not flight.shared:
                raise
            plan.retried_at = time.perf_counter()
            await fetch(flight)

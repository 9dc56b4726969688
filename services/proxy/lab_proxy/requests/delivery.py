"""Delivery: sends one caller its answer, from a flight or a cache entry, as JSON or as a stream, with an id of its own.

Knows plans and wire modes. Knows HTTP only as a ResponseWriter.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

from .. import canonical
from ..cache import entry, streams
from ..cache.entry import Entry
from ..cache.flight import Subscriber
from ..endpoints import ENDPOINTS
from ..long_bodies import loads, off_loop
from .context import Plan

JSON = "application/json"
SSE = "text/event-stream; charset=utf-8"
STREAM_ERROR = "stream-error"  # outcome of a flight whose last event is the upstream's error


class ResponseWriter(Protocol):
    """Destination of an answer: an HTTP response, or a line of a batch."""

    headers: dict[str, str]  # sent with every answer to this request
    started: bool
    ended: bool

    async def send(self, body: bytes, headers: Mapping[str, str], content_type: str = JSON) -> None:
        """A whole answer."""

    async def send_prepared(self, body: bytes, headers: Mapping[str, str], head: bytes) -> None:
        """Send a whole answer with status 200. headers: all except `self.headers`; head: the same as lines of HTTP."""

    async def start_stream(self, headers: Mapping[str, str]) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


async def deliver(plan: Plan, subscriber: Subscriber, writer: ResponseWriter) -> None:
    """Deliver a flight: the upstream's own events to the request that called it, rewritten ones to the others."""
    request, record = plan.request, plan.request.record
    if not subscriber.first:
        record.cache = "collapsed"
    head = await subscriber.head()
    own = record.upstream_called
    if own:
        headers = head["headers"] | plan.miss_headers()
    else:
        record.cache, record.model_known = "collapsed", True
        headers = plan.collapsed_headers(head["headers"])
    if not head["streams"]:
        return await _deliver_json(plan, subscriber, headers, head.get("usage"), writer)
    events = streams.RewrittenEvents(request.endpoint, plan.include_usage, int(time.time()))
    async for parts in subscriber.parts():
        size = max(map(len, parts))
        if own:
            data = await off_loop(size, _passed_through, parts, plan.include_usage)
        else:
            data = await off_loop(size, _rewritten, events, parts)
            record.completion_tokens = events.content_events
            record.set_usage(events.usage)
            if events.content_events and record.ttft is None:
                record.ttft = time.perf_counter() - request.started
        if data:
            if not writer.started:
                await writer.start_stream(headers)
            await writer.write(data)
    if subscriber.outcome == STREAM_ERROR:
        record.error = "upstream_stream_error"
    return await writer.end()


async def _deliver_json(
    plan: Plan, subscriber: Subscriber, headers: dict[str, str], usage: Any, writer: ResponseWriter
) -> None:
    request, record = plan.request, plan.request.record
    raw = await subscriber.whole()
    if record.upstream_called:
        headers |= plan.miss_headers(subscriber.outcome)
        if not plan.stream:
            return await writer.send(raw, headers)
    if ENDPOINTS[request.endpoint].per_input:  # without an id of its own, and possibly large
        record.set_usage(usage)
        return await writer.send(raw, headers)
    shared = subscriber.flight.derived
    if "answer" not in shared:  # computed once for all requests of the flight
        shared["answer"] = asyncio.ensure_future(off_loop(len(raw), _without_identity, raw))
    body, usage = await asyncio.shield(shared["answer"])
    record.set_usage(usage)
    if plan.stream:
        return await _replay(plan, body, headers, writer)
    return await writer.send(entry.with_identity(body, entry.new_id(request.endpoint), int(time.time())), headers)


def _passed_through(parts: list[bytes], usage: bool) -> bytes:
    return b"".join([streams.pass_through(event, usage) for event in parts])


def _rewritten(events: streams.RewrittenEvents, parts: list[bytes]) -> bytes:
    return b"".join(map(events.rewrite, parts))


def _without_identity(raw: bytes) -> tuple[bytes, Any]:
    """An answer as an entry's body, to which each caller's own identity is added; and its usage."""
    answer = loads(raw)
    body = canonical.dump({name: value for name, value in answer.items() if name not in {"id", "created"}})
    return body, answer.get("usage")


async def deliver_hit(plan: Plan, found: Entry, writer: ResponseWriter, failed: int | None = None) -> None:
    """Deliver an entry. `failed`: status of the failed upstream call that a stale entry replaces."""
    record, endpoint = plan.request.record, plan.request.endpoint
    record.cache, record.model_known = "hit" if failed is None else "stale", True
    record.set_usage(found.metadata.get("usage"))
    headers = plan.hit_headers(found.ttl, found.age(time.time()), plan.key, failed)
    if plan.stream:
        return await _replay(plan, found.body, headers, writer)
    return await writer.send(entry.with_identity(found.body, entry.new_id(endpoint), int(time.time())), headers)


async def _replay(plan: Plan, body: bytes, headers: Mapping[str, str], writer: ResponseWriter) -> None:
    endpoint = plan.request.endpoint
    pieces = await off_loop(len(body), streams.replay_pieces, endpoint, body, plan.include_usage)
    plan.request.record.ttft = time.perf_counter() - plan.request.started
    identity = b'"id":"%s","created":%d,' % (entry.new_id(endpoint).encode(), int(time.time()))
    await writer.send(identity.join(pieces), headers, SSE)

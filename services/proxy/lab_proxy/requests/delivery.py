"""What one caller gets: the parts of a flight or an entry of the cache, as JSON or as a stream, under its own id."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from .. import canonical
from ..cache import entry
from ..cache.entry import EMBEDDINGS, Entry
from ..cache.flight import Subscriber
from .planner import Plan
from .roles import SSE, ResponseWriter

STREAM_ERROR = "stream-error"  # how a flight ended whose last event is the upstream's error


async def deliver(way: Plan, seat: Subscriber, out: ResponseWriter) -> None:
    """What one caller gets of a flight: who asked has the upstream's own events, others theirs."""
    call, account = way.request, way.request.record
    if not seat.first:
        account.cache = "collapsed"
    head = await seat.head()
    mine = account.upstream_called
    if mine:
        headers = head["headers"] | way.miss_headers()
    else:
        account.cache, account.model_known = "collapsed", True
        headers = way.collapsed_headers(head["headers"])
    if not head["streams"]:
        return await _deliver_whole(way, seat, headers, head.get("usage"), out)
    events = (
        entry.PassThroughEvents(way.include_usage)
        if mine
        else entry.RewrittenEvents(call.endpoint, way.include_usage, int(time.time()))
    )
    async for parts in seat.parts():
        passed = b"".join([events.rewrite(event) for event in parts])
        if not mine:
            account.completion_tokens = events.content_events
            account.set_usage(events.usage)
            if events.content_events and account.ttft is None:
                account.ttft = time.perf_counter() - call.started
        if passed:
            if not out.started:
                await out.start_stream(headers)
            await out.write(passed)
    if seat.outcome == STREAM_ERROR:
        account.error = "upstream_stream_error"
    return await out.end()


async def _deliver_whole(way: Plan, seat: Subscriber, headers: dict[str, str], usage: Any, out: ResponseWriter) -> None:
    call, account = way.request, way.request.record
    raw = b"".join([part async for parts in seat.parts() for part in parts])
    if account.upstream_called:
        headers |= way.miss_headers(seat.outcome)
        if not way.stream:
            return await out.send(raw, headers)
    if call.endpoint == EMBEDDINGS:  # nothing of its own, and it may be large
        account.set_usage(usage)
        return await out.send(raw, headers)
    answer = orjson.loads(raw)
    account.set_usage(answer.get("usage"))
    if way.stream:
        return await _replay(way, answer, headers, out)
    fresh = {"id": entry.new_id(call.endpoint), "created": int(time.time())}
    own = answer | {name: value for name, value in fresh.items() if name in answer}
    return await out.send(canonical.dump(own), headers)


async def hit(way: Plan, found: Entry, out: ResponseWriter, failed: int | None = None) -> None:
    """`failed`: the status of an upstream's failure, for which a stale answer stands in."""
    account, endpoint = way.request.record, way.request.endpoint
    account.cache, account.model_known = "hit" if failed is None else "stale", True
    account.set_usage(found.metadata.get("usage"))
    headers = way.hit_headers(found.ttl, found.age(time.time()), way.key, failed)
    if way.stream:
        return await _replay(way, orjson.loads(found.body), headers, out)
    return await out.send(entry.renewed(found.body, entry.new_id(endpoint), int(time.time())), headers)


async def _replay(way: Plan, answer: Mapping[str, Any], headers: Mapping[str, str], out: ResponseWriter) -> None:
    endpoint = way.request.endpoint
    events = entry.replay(endpoint, answer, entry.new_id(endpoint), int(time.time()), way.include_usage)
    way.request.record.ttft = time.perf_counter() - way.request.started
    await out.send(b"".join(events), headers, SSE)

"""Fetching a chat or text answer from an upstream: what it is sent, what is read of its answer, what of it is stored.

Puts the answer into a flight, from which every caller has it; knows none of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from .. import canonical
from ..cache import entry
from ..cache.flight import Flight
from ..cache.store import sample_key
from ..errors import UpstreamBroken
from ..upstreams.client import UpstreamCall, UpstreamPool, UpstreamRequest, UpstreamResponse
from ..upstreams.model_list import ModelList
from ..upstreams.routes import Target
from .billing import Billing
from .delivery import STREAM_ERROR
from .planner import Plan, Planner
from .roles import Store


class CompletionFetch:
    def __init__(
        self,
        cache: Store,
        upstreams: UpstreamPool,
        local: ModelList,
        ways: Planner,
        bills: Billing,
        *,
        total_seconds: float,
    ) -> None:
        self._cache = cache
        self._upstreams = upstreams
        self._local = local
        self._planner = ways
        self._billing = bills
        self._total = total_seconds

    def upstream_request(self, way: Plan, body: Callable[[Target], bytes]) -> UpstreamRequest:
        call = way.request
        deadline = (way.retried_at or call.started) + self._total
        # Others may want an answer that can be shared for longer: who asked leaves it to them, or it is cancelled.
        due = None if way.shareable else call.caller_deadline
        return UpstreamRequest(call.endpoint, call.request_id, way.stream, deadline, body, call.record.add_call, due)

    def renamed_body(self, way: Plan) -> Callable[[Target], bytes]:
        """The body as it came, or with the name of who is asked."""
        call = way.request
        return lambda target: (
            call.raw if call.body["model"] == target.model else canonical.dump(call.body | {"model": target.model})
        )

    def _body_with_usage(self, way: Plan, target: Target) -> bytes:
        """The body for `target`, who is always asked to count a stream's tokens."""
        call = way.request
        options = call.body.get("stream_options") or {}
        asked = isinstance(options.get("include_usage", False), bool)  # else the upstream says what is wrong with it
        if not (way.stream and target.config.stream_usage and asked and not way.include_usage):
            return self.renamed_body(way)(target)
        changed = {"model": target.model, "stream_options": {**options, "include_usage": True}}
        return canonical.dump(call.body | changed)

    def revision(self, way: Plan, reply: UpstreamResponse) -> tuple[bool, str | None]:
        """Whether it is known which revision made this answer, and which."""
        if not reply.target.versioned:
            return True, None
        self._local.observe_revision(reply.target.model, reply.revision)
        return reply.revision is not None, reply.revision

    async def fetch(self, way: Plan, flight: Flight) -> None:
        """Raises what keeps the answer from being one."""
        call, account = way.request, way.request.record
        gathered = entry.StreamAccumulator(call.endpoint)
        targets = way.targets
        question = self.upstream_request(way, partial(self._body_with_usage, way))
        stamps = {each.model: self._cache.epoch(call.tenant, each.model) for each in targets[1:]}

        def called(real: UpstreamCall) -> None:
            account.add_call(real)
            if real.answered or real.possibly_processed:
                self._billing.add_call(call, real, gathered.usage, gathered.content_chunks)

        async with self._upstreams.send(targets, replace(question, on_call=called)) as reply:
            account.model_known = account.upstream_called = True
            kept = self._plan_of_answerer(way, reply, stamps)
            name = reply.target.upstream
            if way.stream and reply.is_stream:
                return await self._stream(kept, reply, flight, gathered)
            if reply.is_stream:
                raise UpstreamBroken(f"The upstream `{name}` streams where nobody asked it to.")
            raw, answer = await reply.json()
            if not isinstance(answer, dict):
                raise UpstreamBroken(f"The upstream `{name}` answered with JSON that is no object.")
            if way.stream and not isinstance(answer.get("choices"), list):
                raise UpstreamBroken(f"The upstream `{name}` answered without choices.")
            gathered.usage = answer.get("usage")
            account.set_usage(gathered.usage)
            # Stored before its end is passed on, so that who asks again finds it. What the call cost is written down
            # while redis works: in the turn after the next, for the next one sends.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, reply.close)
            outcome = await self._store(kept, reply, answer)
            flight.begin({"streams": False, "headers": reply.headers})
            await flight.append(raw)
            return flight.end(outcome)

    async def _stream(
        self, way: Plan, reply: UpstreamResponse, flight: Flight, gathered: entry.StreamAccumulator
    ) -> None:
        """A live stream, event by event."""
        call, account, events = way.request, way.request.record, entry.SseParser()
        name = reply.target.upstream
        account.prompt_tokens = len(call.raw) // 4  # until the upstream has told
        flight.begin({"streams": True, "headers": reply.headers})
        async for piece in reply.chunks():
            try:
                for event in events.feed(piece):
                    data = entry.event_data(event)
                    if data == b"[DONE]":
                        outcome = await self._store(way, reply, gathered.answer())
                        await flight.append(event)
                        flight.end(outcome)
                        return await reply.drain()
                    if data is not None:
                        chunk = orjson.loads(data)
                        if chunk.get("error") is not None:
                            await flight.append(reply.redact(event))
                            flight.end(STREAM_ERROR)
                            return await reply.drain()
                        gathered.feed(chunk)
                        if entry.tells(chunk):
                            account.completion_tokens = gathered.content_chunks = gathered.content_chunks + 1
                            account.ttft = account.ttft or time.perf_counter() - call.started
                        account.set_usage(gathered.usage)
                    await flight.append(event)
            except (ValueError, TypeError, AttributeError, KeyError):
                raise UpstreamBroken(f"The upstream `{name}` streams something that is not OpenAI's.") from None
        raise UpstreamBroken(f"The upstream `{name}` ended its stream without [DONE]: the answer is not whole.")

    def _plan_of_answerer(self, way: Plan, reply: UpstreamResponse, stamps: Mapping[str, str]) -> Plan:
        """The way of who answered: what a stand-in says is kept as its own."""
        target, call = reply.target, way.request
        if target is way.target or way.bypass:
            return way
        temperature, sampled = target.default_temperature.get(call.endpoint), target.store_sampled or call.store_sampled
        bypass = entry.bypass_reason(call.endpoint, call.body, temperature, sampled)
        return replace(way, target=target, bypass=bypass, epoch=stamps[target.model], canonical_form=b"", key="")

    async def _store(self, way: Plan, reply: UpstreamResponse, answer: Mapping[str, Any]) -> str | None:
        """`stored`, or why the answer is not."""
        if way.bypass:
            return None
        unfit = entry.unstorable_reason(way.request.endpoint, way.request.body, answer)
        known, revision = self.revision(way, reply)
        if unfit or not known:
            return unfit or "revision"
        target, form = way.target, self._planner.canonical_form(way, revision)
        key = way.key if form is way.canonical_form else canonical.key_of(self._cache.secret, form)
        kept = entry.of_answer(answer, target.ttl, time.time(), way.epoch)
        kept.attach_request(form, max(target.stale_while_revalidate, target.stale_if_error))
        return await self._cache.write({sample_key(key, way.slot): kept}) or "stored"

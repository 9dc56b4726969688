"""Fetch of a chat or text answer: the request to the upstream, its answer, and the entry that is stored.

Writes the answer into a flight; does not know the flight's subscribers.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from .. import canonical
from ..cache import entry, policy, streams
from ..cache.entry import Entry
from ..cache.flight import Flight
from ..cache.key import key_of, sample_key
from ..cache.store import Cache
from ..endpoints import CHAT
from ..errors import UpstreamBroken
from ..keys.limits import Limits
from ..long_bodies import loads, off_loop
from ..telemetry.record import UpstreamCall
from ..upstreams.client import UpstreamRequest
from ..upstreams.failover import UpstreamPool
from ..upstreams.model_list import ModelList
from ..upstreams.reply import UpstreamResponse
from ..upstreams.routes import Target, UpstreamConfig
from .billing import Billing
from .context import Plan
from .delivery import STREAM_ERROR
from .planner import Planner

MOST_FRAME = 64  # largest size of a stream, as a multiple of the size of its content


class CompletionFetch:
    def __init__(
        self,
        cache: Cache,
        upstreams: UpstreamPool,
        models: ModelList,
        planner: Planner,
        billing: Billing,
        *,
        limits: Limits,
        total_seconds: float,
    ) -> None:
        self._cache, self._upstreams, self._models = cache, upstreams, models
        self._planner, self._billing = planner, billing
        self._limits, self._total = limits, total_seconds
        self._largest = MOST_FRAME * cache.max_entry_bytes  # bytes of an answer that may become an entry

    def upstream_request(
        self, plan: Plan, body: Callable[[Target], bytes], on_call: Callable[[UpstreamCall], None]
    ) -> UpstreamRequest:
        request = plan.request
        deadline = (plan.retried_at or request.started) + self._total
        # Followers may wait longer for a shared answer than this caller: the flight continues for them.
        own = None if plan.shareable else request.caller_deadline

        async def admit(call: UpstreamCall, upstream: UpstreamConfig) -> None:
            what = (request.endpoint, call.model, request.body, len(request.raw))
            claim = await self._limits.claim_call(request.identity, upstream, *what)
            if claim is not None:
                call.count_tokens = claim.count

        about = (request.endpoint, request.request_id, plan.stream, deadline)
        record = request.record
        return UpstreamRequest(
            *about, body, on_call, own, admit, len(request.raw), on_begin=record.begin_call, span=record.span
        )

    def renamed_body(self, plan: Plan) -> Callable[[Target], bytes]:
        """The body as received, or with the target's model."""
        request = plan.request
        return lambda target: (
            request.raw
            if request.body["model"] == target.model
            else canonical.dump(request.body | {"model": target.model})
        )

    def _body_with_usage(self, plan: Plan, target: Target) -> bytes:
        """The body for `target`, which always gets `include_usage` for a stream."""
        request = plan.request
        options = request.body.get("stream_options") or {}
        valid = isinstance(options.get("include_usage", False), bool)  # otherwise the upstream refuses it itself
        if not (plan.stream and target.config.stream_usage and valid and not plan.include_usage):
            return self.renamed_body(plan)(target)
        changed = {"model": target.model, "stream_options": {**options, "include_usage": True}}
        return canonical.dump(request.body | changed)

    def revision(self, plan: Plan, response: UpstreamResponse) -> tuple[bool, str | None]:
        """Whether the revision of this answer is known, and the revision."""
        if not response.target.versioned:
            return True, None
        self._models.observe_revision(response.target.model, response.revision, response.call.began)
        return response.revision is not None, response.revision

    async def fetch(self, plan: Plan, flight: Flight) -> None:
        """Fetch the answer into `flight`, and store it. Raises ProxyErrors."""
        request, record = plan.request, plan.request.record
        accumulator = streams.StreamAccumulator(request.endpoint)
        targets = plan.targets
        epochs = {each.model: self._cache.epoch(request.tenant, each.model) for each in targets[1:]}

        def on_call(call: UpstreamCall) -> None:
            self._billing.add_call(request, call, accumulator.usage, accumulator.content_chunks)

        call = self.upstream_request(plan, partial(self._body_with_usage, plan), on_call)
        with closing(await self._upstreams.send(targets, call)) as response:
            record.model_known = record.upstream_called = True
            kept = self._plan_for(plan, response, epochs)
            name = response.target.upstream
            if plan.stream and response.is_stream:
                return await self._stream(kept, response, flight, accumulator)
            if response.is_stream:
                raise UpstreamBroken(f"The upstream `{name}` streams an answer that was not requested as a stream.")
            raw, answer = await response.json()
            await off_loop(len(raw), _check, answer, name, request.endpoint if plan.stream else "")
            accumulator.usage = answer.get("usage")
            record.set_usage(accumulator.usage)
            # Stored before its end is delivered, so that the next request finds it. The call is closed, and so billed,
            # while redis works: in the loop's turn after the next, because the next one sends the commands.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, response.close)
            outcome = await self._store(kept, response, answer, len(raw))
            flight.begin({"streams": False, "headers": response.headers})
            flight.add_whole(raw)
            return flight.end(outcome)

    async def _stream(
        self, plan: Plan, response: UpstreamResponse, flight: Flight, accumulator: streams.StreamAccumulator
    ) -> None:
        request, record, parser = plan.request, plan.request.record, streams.SseParser()
        name = response.target.upstream
        record.prompt_tokens = len(request.raw) // 4  # until the upstream reports it
        flight.begin({"streams": True, "headers": response.headers})
        size = 0
        async for data in response.chunks():
            try:
                for event in parser.feed(data):
                    payload = streams.event_data(event)
                    size += len(event)
                    if payload == b"[DONE]":
                        outcome = await self._store(plan, response, accumulator.answer(), size)
                        await flight.append(event)
                        flight.end(outcome)
                        return await response.drain()
                    if payload is not None:
                        chunk = await off_loop(len(payload), loads, payload)
                        nested = payload.count(b"{") + payload.count(b"[") > canonical.MAX_DEPTH
                        if nested and canonical.too_deep(chunk):
                            raise ValueError("nested too deep")
                        if chunk.get("error") is not None:
                            await flight.append(response.redact(event))
                            flight.end(STREAM_ERROR)
                            return await response.drain()
                        accumulator.feed(chunk, keep=size <= self._largest)
                        if streams.has_content(chunk):
                            record.completion_tokens = accumulator.content_chunks = accumulator.content_chunks + 1
                            record.ttft = record.ttft or time.perf_counter() - request.started
                        record.set_usage(accumulator.usage)
                    await flight.append(event)
            except (ValueError, TypeError, AttributeError, KeyError):
                raise UpstreamBroken(f"The upstream `{name}` sent an invalid event in its stream.") from None
        raise UpstreamBroken(f"The upstream `{name}` ended its stream without [DONE]: the answer is incomplete.")

    def _plan_for(self, plan: Plan, response: UpstreamResponse, epochs: Mapping[str, str]) -> Plan:
        """The plan for the upstream that answered: the answer of a fallback is stored as its own."""
        target, request = response.target, plan.request
        if target is plan.target or plan.bypass:
            return plan
        temperature = target.default_temperature.get(request.endpoint)
        sampled = target.store_sampled or request.store_sampled
        bypass = policy.bypass_reason(request.endpoint, request.body, temperature, sampled)
        return replace(plan, target=target, bypass=bypass, epoch=epochs[target.model], canonical_form=b"", key="")

    async def _store(self, plan: Plan, response: UpstreamResponse, answer: Mapping[str, Any], size: int) -> str | None:
        """`stored`, or the reason why the answer is not stored. `size`: bytes that the upstream sent."""
        if plan.bypass:
            return None
        known, revision = self.revision(plan, response)
        if size > self._largest:
            return "size"
        entries = await off_loop(max(size, len(plan.request.raw)), self._entry, plan, answer, revision)
        if isinstance(entries, str):
            return entries
        return (await self._cache.write(entries) or "stored") if known else "revision"

    def _entry(self, plan: Plan, answer: Mapping[str, Any], revision: str | None) -> dict[str, Entry] | str:
        """The entry by its key, or why there is none."""
        unstorable = policy.unstorable_reason(plan.request.endpoint, plan.request.body, answer)
        if unstorable:
            return unstorable
        target, form = plan.target, self._planner.canonical_form(plan, revision)
        key = plan.key if form is plan.canonical_form else key_of(self._cache.secret, form)
        kept = entry.of_answer(answer, target.ttl, time.time(), plan.epoch)
        kept.attach_request(form, max(target.stale_while_revalidate, target.stale_if_error))
        return {sample_key(key, plan.slot): kept}


def _check(answer: Any, name: str, streamed: str) -> None:
    """Raises UpstreamBroken for an answer that is not OpenAI's. `name`: of the upstream. `streamed`: the endpoint of a
    request for a stream, which the answer becomes; else empty."""
    if not policy.has_choices(answer) or canonical.too_deep(answer):
        raise UpstreamBroken(f"The upstream `{name}` answered without OpenAI's choices.")
    whole = streamed != CHAT or all(isinstance(choice.get("message"), dict) for choice in answer["choices"])
    if streamed and not (whole and policy.is_well_formed(answer)):
        raise UpstreamBroken(f"The upstream `{name}` answered with fields of wrong types.")

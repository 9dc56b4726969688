"""OpenAI's Responses API, passed through: answers are not cached, their tokens are counted.

Knows the API's events as far as their end and their usage. Upstreams need `responses: true` in the routes file.
"""

import time
from collections.abc import Mapping
from typing import Any

from ..cache.streams import SseParser, event_data
from ..errors import UpstreamBroken
from ..long_bodies import loads, off_loop
from ..telemetry.record import RequestRecord, token_count
from ..upstreams.reply import UpstreamResponse
from .context import RequestContext
from .delivery import ResponseWriter

_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


async def relay(
    response: UpstreamResponse, request: RequestContext, writer: ResponseWriter, headers: Mapping[str, str]
) -> None:
    """Pass the answer on as it arrives. Raises UpstreamBroken for an incomplete stream."""
    record = request.record
    name = response.target.upstream
    if not response.is_stream:
        raw, answer = await response.json()
        if not isinstance(answer, dict):
            raise UpstreamBroken(f"The upstream `{name}` answered with JSON that is not an object.")
        _count(record, answer)
        return await writer.send(raw, headers)
    parser = SseParser()
    async for data in response.chunks():
        events, last = [], False
        try:
            for event in parser.feed(data):
                payload = event_data(event)
                fields = {}
                if payload is not None and payload != b"[DONE]":
                    fields = await off_loop(len(payload), loads, payload)
                kind = fields.get("type", "")
                if kind.endswith(".delta") and record.ttft is None:
                    record.ttft = time.perf_counter() - request.started
                _count(record, fields.get("response") or {})
                last = last or kind in _LAST_EVENTS
                events.append(response.redact(event))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UpstreamBroken(f"The upstream `{name}` sent an invalid event in its stream.") from None
        if events:
            if not writer.started:
                await writer.start_stream(headers)
            await writer.write(b"".join(events))
        if last:
            await writer.end()
            return await response.drain()
    raise UpstreamBroken(f"The upstream `{name}` ended its stream before `response.completed`: it is incomplete.")


def _count(record: RequestRecord, response: Mapping[str, Any]) -> None:
    usage = response.get("usage")
    if isinstance(usage, dict):
        record.set_usage({"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")})
        details = usage.get("input_tokens_details")
        record.cached_tokens = token_count(details, "cached_tokens")

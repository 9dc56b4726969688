"""OpenAI's Responses API on its way through: passed on as it comes, its tokens counted, never cached.

Knows the API's events as far as their end and their usage. Only upstreams that have the API are asked (routes.yaml).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from ..cache.entry import SseParser, event_data
from ..errors import InvalidRequest, UpstreamBroken
from ..upstreams.client import UpstreamResponse
from ..upstreams.routes import Target

RESPONSES = "/v1/responses"
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


class Out(Protocol):
    """Where the answer goes."""

    started: bool

    async def send(self, body: bytes, headers: Mapping[str, str]) -> None: ...

    async def start_stream(self, headers: Mapping[str, str]) -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class Account(Protocol):
    """Who is told of tokens and times."""

    ttft: float | None
    cached_tokens: int

    def set_usage(self, usage: Any) -> None: ...


def check(body: Mapping[str, Any], target: Target) -> None:
    """Raises InvalidRequest for what the proxy does not pass through."""
    if not target.config.responses:
        raise InvalidRequest(
            f"`{target.model}` is served by `{target.upstream}`, which has no Responses API: "
            "use /v1/chat/completions, or another model.",
            param="model",
        )
    if body.get("background"):
        raise InvalidRequest(
            "`background` is not supported: its answer is fetched later, and the proxy hands out no kept answers.",
            param="background",
        )


async def relay(
    reply: UpstreamResponse, out: Out, account: Account, headers: Mapping[str, str], started: float
) -> None:
    """The answer as it comes. `started`: the request's time.perf_counter(). Raises UpstreamBroken for half a stream."""
    name = reply.target.upstream
    if not reply.is_stream:
        raw, answer = await reply.json()
        if not isinstance(answer, dict):
            raise UpstreamBroken(f"The upstream `{name}` answered with JSON that is no object.")
        _count(account, answer)
        return await out.send(raw, headers)
    events = SseParser()
    async for piece in reply.chunks():
        passed, over = [], False
        try:
            for event in events.feed(piece):
                data = event_data(event)
                said = orjson.loads(data) if data not in {None, b"[DONE]"} else {}
                kind = said.get("type", "")
                if kind.endswith(".delta") and account.ttft is None:
                    account.ttft = time.perf_counter() - started
                _count(account, said.get("response") or {})
                over = over or kind in _LAST
                passed.append(reply.redact(event))
        except (ValueError, TypeError, AttributeError):
            raise UpstreamBroken(f"The upstream `{name}` streams something that is not OpenAI's.") from None
        if passed:
            if not out.started:
                await out.start_stream(headers)
            await out.write(b"".join(passed))
        if over:
            await out.end()
            return await reply.drain()
    raise UpstreamBroken(f"The upstream `{name}` ended its stream before `response.completed`: it is not whole.")


def _count(account: Account, response: Mapping[str, Any]) -> None:
    usage = response.get("usage")
    if isinstance(usage, dict):
        account.set_usage({"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")})
        details = usage.get("input_tokens_details")
        account.cached_tokens = (details.get("cached_tokens") or 0) if isinstance(details, dict) else 0

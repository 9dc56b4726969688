"""The drill counts what it should: streams from a server that ends them in each way while the step's command runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from processes import eventually_async

from bench.drill import Target, step
from bench.report import BenchError

TOKEN = {"choices": [{"delta": {"content": "one "}}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 2}}
FAULT = {"error": {"code": "upstream_error", "message": "it broke"}}


@asynccontextmanager
async def server(mode: str, replaced: Path) -> AsyncIterator[Target]:
    """A stream sends a token, and ends once `replaced` exists, in the way that `mode` names."""
    asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if mode == "refused" and asked == 1:
            return web.json_response({"error": {"code": "draining"}}, status=503)
        stream = web.StreamResponse(headers={"x-request-id": str(asked), "x-model-revision": "r1"})
        await stream.prepare(request)

        async def send(*events: object) -> None:
            for event in events:
                data = event if isinstance(event, str) else json.dumps(event)
                await stream.write(f"data: {data}\n\n".encode())

        await send(TOKEN)
        await eventually_async(replaced.exists, what="the step's command has run")
        if mode == "broken":
            assert request.transport is not None
            request.transport.abort()
        elif mode == "error event":
            await send(FAULT)
        elif mode != "without [DONE]":
            await send(TOKEN, USAGE, "[DONE]")
        return stream

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "m", {})
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("mode", "cut", "words"),
    [
        ("whole", 0, ""),
        ("refused", 0, "503: "),
        ("broken", 2, "Error: "),
        ("error event", 2, "error event upstream_error: it broke"),
        ("without [DONE]", 2, "it ends without [DONE]"),
    ],
)
async def test_a_stream_that_does_not_end_whole_is_cut(mode: str, cut: int, words: str, tmp_path: Path) -> None:
    replaced = tmp_path / "replaced"
    async with server(mode, replaced) as target:
        found = await step(mode, f"touch {replaced}", target, 2, 8)
    assert (found.during, found.failed, found.refused) == (2, 0, mode == "refused")
    assert found.cut >= cut
    assert found.passed == (not found.cut) == (cut == 0)
    assert any(words in why for why in found.why) or not words
    if not cut:
        assert found.completion_tokens == 2 * found.whole
        assert found.revisions == ["r1"]


async def test_a_step_whose_command_fails_is_no_result(tmp_path: Path) -> None:
    async with server("whole", tmp_path / "replaced") as target:
        with pytest.raises(BenchError, match="two: the command ended with 3"):
            await step("two", f"touch {tmp_path / 'replaced'}; exit 3", target, 2, 8)

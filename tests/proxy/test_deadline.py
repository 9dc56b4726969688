"""A caller's own deadline, `x-request-timeout-ms`, at the proxy: for every upstream, alone and together with others.

Upstreams that are slow never answer here, and the proxy's own limits are the shipped ones, minutes away: what ends a
request is its deadline.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fixtures_proxy import CHAT_MODEL, Bench, bench_on, events, eventually, new
from lab_proxy.upstreams.breaker import LEAST_CALLS
from processes import GENEROUS_SECONDS, eventually_async

OWN = "x-request-timeout-ms"
SOON = "1000"  # a request is at its upstream by then
NEVER = 3600  # seconds: longer than any test runs


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False) as started:
        yield started


def asked(text: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more


@pytest.mark.parametrize("given", ["soon", "0", "-5", "1.5", "9" * 30, "86400001", "100,100", ""])
def test_a_deadline_that_is_none_is_refused_by_the_proxy(bench: Bench, given: str) -> None:
    """400 that names the header, also where the answer is cached; nobody is asked."""
    text = new()
    bench.chat(text)
    bench.chat(text)
    calls = bench.calls()["total"]
    answer = bench.chat(text, headers={OWN: given})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, OWN, "invalid_value")
    assert bench.calls()["total"] == calls


def test_a_callers_own_deadline_ends_a_request_of_a_foreign_upstream(bench: Bench) -> None:
    """504 for JSON, cached or not, and the upstream is let go; an upstream that is slow for callers in a hurry is not
    taken for broken, however many they are."""
    many = LEAST_CALLS + 4

    def ask(turn: int) -> httpx2.Response:
        return bench.chat(
            model="gpt-mock-hang", headers={OWN: SOON} | ({"cache-control": "no-store"} if turn % 2 else {})
        )

    with ThreadPoolExecutor(many) as pool:
        for answer in pool.map(ask, range(many)):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["type"]) == (504, "deadline_exceeded", "server_error")
            assert answer.headers["x-should-retry"] == "false", "OpenAI's clients would try again"
            assert OWN in error["message"]
    eventually(lambda: bench.calls()["left"] == bench.calls()["total"], what="the upstream is let go of each call")
    assert OWN not in bench.calls()["last"]["headers"]
    assert bench.chat().status_code == 200, "its breaker is open"
    assert bench.chat(headers={OWN: "60000"}).status_code == 200


def test_a_callers_own_deadline_ends_a_stream_with_an_error_event(bench: Bench) -> None:
    """What came before stays; no [DONE]."""
    told = events(bench.chat(model="gpt-mock-stall", stream=True, headers={OWN: SOON}))
    assert told[0]["choices"]
    assert told[-1]["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in told
    eventually(lambda: bench.calls()["left"] == 1, what="the upstream is let go")


def test_a_deadline_holds_while_the_body_comes(bench: Bench) -> None:
    """It is counted from receipt: the body of this request never comes."""
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=GENEROUS_SECONDS) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\nx-request-timeout-ms: 200\r\n\r\n{"
        )
        answer = b""
        while b"deadline_exceeded" not in answer:
            part = slow.recv(10_000)
            assert part, answer
            answer += part
        assert b" 504 " in answer


def test_what_is_left_of_a_deadline_is_passed_to_the_model(bench: Bench) -> None:
    """Of a request that nobody else can join: with what is left of it. Others may want a shared answer for longer: the
    model gets the proxy's own bound, and the call is cancelled when nobody waits for it."""

    def passed(**headers: str) -> int:
        assert bench.chat(model=CHAT_MODEL, headers=headers).status_code == 200
        return int(bench.calls(bench.model)["last"]["headers"][OWN])

    assert 0 < passed(**{OWN: "60000", "cache-control": "no-cache"}) < 60_000
    assert 60_000 < passed(**{OWN: "60000"}) <= 600_000
    assert 60_000 < passed(**{OWN: "86400000", "cache-control": "no-cache"}) <= 600_000
    bench.control(delay=NEVER)
    assert bench.chat(model=CHAT_MODEL, headers={OWN: SOON}).status_code == 504
    eventually(lambda: bench.calls(bench.model)["left"] == 1, what="the model's call is cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_cache_f4_a_followers_own_deadline_header_holds(bench: Bench, stream: bool) -> None:
    """Of two who want the same, the one whose time is over, be it leader or follower, ends with 504, or an error event;
    the other has the whole answer, and the upstream was asked once."""
    bench.control(bench.paid, **{"held" if stream else "closed": True})
    bodies = [asked(new(), "gpt-mock", stream=stream) for _ in range(2)]
    short, long = {OWN: SOON}, {OWN: "600000"}
    async with httpx2.AsyncClient(base_url=bench.proxy.url, timeout=GENEROUS_SECONDS) as http:

        def ask(body: dict[str, Any], headers: dict[str, str]) -> asyncio.Task[httpx2.Response]:
            return asyncio.create_task(http.post("/v1/chat/completions", json=body, headers=headers))

        # 1. The second pair is led by the one in a hurry. Their leaders are upstream before the followers come.
        leaders = [ask(bodies[0], long), ask(bodies[1], short)]
        await eventually_async(lambda: asyncio.to_thread(lambda: bench.calls()["total"] == 2))
        followers = [ask(bodies[0], short), ask(bodies[1], long)]
        # 2. Their time is over while the upstream still holds its answer back.
        for cut in await asyncio.gather(followers[0], leaders[1]):
            if stream:
                assert events(cut)[-1]["error"]["code"] == "deadline_exceeded"
            else:
                assert (cut.status_code, cut.json()["error"]["code"]) == (504, "deadline_exceeded")
        bench.control(bench.paid, closed=False, held=False)
        for whole in await asyncio.gather(leaders[0], followers[1]):
            assert whole.status_code == 200
            if stream:
                assert events(whole)[-1] == "[DONE]"
    assert (bench.calls()["total"], bench.calls()["left"]) == (2, 0)

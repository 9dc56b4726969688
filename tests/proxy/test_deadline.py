"""A caller's own deadline, `x-request-timeout-ms`, at the proxy: for every upstream, alone and together with others."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fixtures_proxy import CHAT_MODEL, Bench, events, eventually, new, second

OWN = "x-request-timeout-ms"


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


@pytest.mark.parametrize("cached", [True, False])
def test_a_callers_own_deadline_ends_a_request_of_a_foreign_upstream(bench: Bench, cached: bool) -> None:
    """504 for JSON, and the upstream is let go; an upstream that is slow for one caller is not taken for broken."""
    headers = {OWN: "150"} | ({} if cached else {"cache-control": "no-store"})
    for _ in range(8):
        began = time.monotonic()
        answer = bench.chat(model="gpt-mock-hang", headers=headers)
        assert 0.1 < time.monotonic() - began < 1
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (504, "deadline_exceeded", "server_error")
        assert "x-request-timeout-ms" in error["message"]
    eventually(lambda: bench.calls()["left"] == 8, 2)
    assert OWN not in bench.calls()["last"]["headers"]
    assert bench.chat().status_code == 200, "its breaker is open"
    assert bench.chat(headers={OWN: "60000"}).status_code == 200


def test_a_callers_own_deadline_ends_a_stream_with_an_error_event(bench: Bench) -> None:
    """What came before stays; no [DONE]."""
    told = events(bench.chat(model="gpt-mock-endless", stream=True, headers={OWN: "400"}))
    assert len(told) >= 3
    assert told[-1]["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in told
    eventually(lambda: bench.calls()["left"] == 1, 2)


def test_a_deadline_holds_while_the_body_comes(bench: Bench) -> None:
    """It is counted from receipt."""
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=5) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\nx-request-timeout-ms: 200\r\n\r\n{"
        )
        began = time.monotonic()
        assert b" 504 " in slow.recv(1000)
        assert 0.1 < time.monotonic() - began < 0.8


def test_what_is_left_of_a_deadline_is_passed_to_the_model(bench: Bench) -> None:
    """Of a request that nobody else can join: with what is left of it. Others may want a shared answer for longer: the
    model gets the proxy's own bound, and the call is cancelled when nobody waits for it."""

    def passed(**headers: str) -> int:
        assert bench.chat(model=CHAT_MODEL, headers=headers).status_code == 200
        return int(bench.calls(bench.model)["last"]["headers"][OWN])

    assert 800 < passed(**{OWN: "1000", "cache-control": "no-cache"}) < 1000
    assert 1000 < passed(**{OWN: "1000"}) <= 1600
    assert 1000 < passed(**{OWN: "60000", "cache-control": "no-cache"}) <= 1600
    bench.control(delay=5)
    assert bench.chat(model=CHAT_MODEL, headers={OWN: "200"}).status_code == 504
    eventually(lambda: bench.calls(bench.model)["left"] == 1, 1)


@pytest.fixture(scope="module")
def patient(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy whose own bound is far off."""
    with second(running, tmp_path_factory.mktemp("patient")) as started:
        yield started


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hurried", ["follower", "leader"])
async def test_cache_f4_a_followers_own_deadline_header_holds(
    patient: Bench, bench: Bench, hurried: str, stream: bool
) -> None:
    """Of two who want the same, the one whose time is over ends with 504, or an error event; the other has the whole
    answer, and the upstream was asked once."""
    bench.control(bench.paid, delay=0.5 if stream else 1.5)
    body = asked(new(), "gpt-mock-slow" if stream else "gpt-mock", stream=stream)
    async with httpx2.AsyncClient(base_url=patient.proxy.url, timeout=10) as http:

        async def ask(**headers: str) -> httpx2.Response:
            return await http.post("/v1/chat/completions", json=body, headers=headers)

        short, long = {OWN: "900" if stream else "300"}, {OWN: "60000"}
        first = asyncio.create_task(ask(**(short if hurried == "leader" else long)))
        while not (await http.get(f"{bench.paid.url}/calls")).json()["total"]:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.01)
        then = asyncio.create_task(ask(**(long if hurried == "leader" else short)))
        one, other = await asyncio.gather(first, then)
    cut, whole = (one, other) if hurried == "leader" else (other, one)
    assert whole.status_code == 200
    if stream:
        assert events(whole)[-1] == "[DONE]"
        assert events(cut)[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert (cut.status_code, cut.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert bench.calls()["total"] == 1

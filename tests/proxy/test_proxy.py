"""The proxy beside its cache: where requests go, what comes back of faults, who may come in, how it starts."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_proxy import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    SHORT_TIMEOUTS,
    UPSTREAM_KEY,
    Bench,
    bench_on,
    events,
    eventually,
    mock,
    new,
    second,
    state,
)
from lab_proxy.__main__ import main
from lab_proxy.cache.single_flight import SingleFlight
from lab_proxy.cache.store import Cache
from lab_proxy.http import app as application
from lab_proxy.http.app import App, Message
from lab_proxy.http.response import Page, PageRequest, Response
from lab_proxy.keys.authentication import Authenticator
from lab_proxy.keys.limits import Limits
from lab_proxy.ledger.ledger import Ledger
from lab_proxy.ledger.prices import Prices
from lab_proxy.ledger.reconciliation import Reconciliation
from lab_proxy.redis.client import Client
from lab_proxy.requests import executor
from lab_proxy.requests.context import Traffic
from lab_proxy.requests.executor import Executor
from lab_proxy.settings import Settings
from lab_proxy.telemetry.metrics import MOST_MODELS, Metrics
from lab_proxy.telemetry.observer import Observer
from lab_proxy.telemetry.record import RequestRecord
from lab_proxy.upstreams.failover import UpstreamPool
from lab_proxy.upstreams.model_list import ModelList
from lab_proxy.upstreams.routes import Routes
from processes import free_port, python

JSON = {"content-type": "application/json"}
IDLE_SECONDS = 6.0  # httpx, and with it the openai SDK, asks on a connection that was idle for up to 5 s


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with the shipped timeouts: minutes, so that none of them ends what a test looks at."""
    with bench_on(tmp_path_factory.mktemp("bench"), short_timeouts=False, max_body_bytes="1000000") as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def idle(running: Bench) -> Iterator[tuple[socket.socket, float]]:
    """A connection that was used once, and when: it is idle while the other tests run, so that nobody waits for it."""
    with socket.create_connection(("127.0.0.1", running.proxy.port), timeout=60) as caller:
        healthy(caller)
        yield caller, time.monotonic()


def healthy(caller: socket.socket) -> None:
    """Ask once over this connection."""
    caller.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        part = caller.recv(65536)
        assert part, f"the connection was closed after {answer!r}"
        answer += part
    assert answer.startswith(b"HTTP/1.1 200")


def posted(path: str, body: Any, *headers: str) -> bytes:
    """A request as it goes over the wire."""
    raw = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(raw)}", "", ""]).encode() + raw


def logged(bench: Bench, request_id: str) -> dict[str, Any]:
    """The log line of a request."""

    def lines() -> list[str]:
        return [line for line in bench.proxy.log.read_text().splitlines() if request_id in line]

    eventually(lines, what=f"a log line of {request_id}")
    line: dict[str, Any] = json.loads(lines()[0])
    return line


def error(answer: httpx2.Response) -> dict[str, Any]:
    """The envelope's inside; every error has all four fields and a request id."""
    assert answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/json"
    inside: dict[str, Any] = answer.json()["error"]
    assert set(inside) == {"message", "type", "param", "code"}
    return inside


# ---- where a request goes


def test_names_go_to_their_upstream(bench: Bench) -> None:
    """The model's own ids straight to /m/<id>, OpenAI's names to the upstream with a key, others nowhere."""
    assert bench.chat(model=CHAT_MODEL).json()["model"] == CHAT_MODEL
    assert bench.calls(bench.model)["last"]["path"] == "/v1/chat/completions"
    assert bench.calls(bench.model)["last"]["body"]["model"] == CHAT_MODEL
    assert bench.chat(model="o3-mock").status_code == 200
    assert bench.calls()["last"]["headers"]["authorization"] == f"Bearer {UPSTREAM_KEY}"
    unknown = bench.chat(model="nobody-knows")
    assert unknown.status_code == 404
    assert (error(unknown)["code"], error(unknown)["param"]) == ("model_not_found", "model")
    assert CHAT_MODEL in error(unknown)["message"]
    assert "gpt-*" in error(unknown)["message"]


def test_a_model_of_another_kind_is_refused(bench: Bench) -> None:
    for answer in (bench.chat(model=EMBEDDING_MODEL), bench.embed("x", model=CHAT_MODEL)):
        assert answer.status_code == 400
        assert error(answer)["param"] == "model"
    assert bench.calls(bench.model)["total"] == 0


def test_aliases_stand_in_while_there_is_no_key(bench: Bench, tmp_path: Path) -> None:
    """`gpt-4o-mini` is the local model without a key: rewritten upstream, told in a header, listed; else it is not."""
    assert state(bench.chat(model="gpt-4o-mini")) == "miss stored"
    assert bench.calls()["last"]["body"]["model"] == "gpt-4o-mini"
    assert not [entry for entry in bench.http.get("/v1/models").json()["data"] if "alias_of" in entry]
    with second(bench, tmp_path, paid="") as alone:
        text = new()
        answer = alone.chat(text, model="gpt-4o-mini")
        assert answer.headers["x-model-alias"] == "gpt-4o-mini"
        assert answer.json()["model"] == CHAT_MODEL
        assert bench.calls(bench.model)["last"]["body"]["model"] == CHAT_MODEL
        for same in ("gpt-3.5-turbo", CHAT_MODEL):
            assert state(alone.chat(text, model=same)) == "hit"
        assert "x-model-alias" not in alone.chat(text, model=CHAT_MODEL).headers
        assert alone.embed("x", model="text-embedding-3-small").json()["model"] == EMBEDDING_MODEL
        listed = {entry["id"]: entry for entry in alone.http.get("/v1/models").json()["data"]}
        assert listed["gpt-4o-mini"]["alias_of"] == CHAT_MODEL
        assert alone.http.get("/v1/models/gpt-3.5-turbo").json()["revision"] == listed[CHAT_MODEL]["revision"]
        refused = alone.chat(model="gpt-7")
        assert refused.status_code == 404
        assert "PROXY_OPENAI_API_KEY" in error(refused)["message"]


def test_a_model_that_cannot_be_loaded_keeps_nobody_from_the_others(bench: Bench, tmp_path: Path) -> None:
    """It is listed with its state; its requests are a 503 with the reason. One that is loaded on demand is asked."""
    port = free_port()
    broken = {"state": "failed", "detail": "model.safetensors is cut short"}
    sleeper = {"state": "unloaded", "revision": None, "parameters": 135_000_000}
    with mock(tmp_path, port) as model, second(bench, tmp_path, model=f"http://127.0.0.1:{port}") as other:
        other.control(model, others={"broken": broken, "sleeper": sleeper})
        listed = lambda: {entry["id"]: entry for entry in other.http.get("/v1/models").json()["data"]}  # noqa: E731
        eventually(lambda: "broken" in listed(), what="the list is read")
        assert listed()["broken"]["state"] == "failed"
        assert listed()["sleeper"]["parameters"] == 135_000_000
        refused = other.chat(model="broken")
        assert refused.status_code == 503
        assert "is failed (model.safetensors is cut short)" in error(refused)["message"]
        assert other.http.get("/ready").status_code == 200
        assert other.chat(model=CHAT_MODEL).status_code == 200
        assert other.chat(model="sleeper").status_code == 200


def test_the_operator_loads_and_adds_models(bench: Bench, tmp_path: Path) -> None:
    """On loopback without keys; no web page may. The model service's answer is passed on."""
    port = free_port()
    with mock(tmp_path, port) as model, second(bench, tmp_path, model=f"http://127.0.0.1:{port}") as other:
        done = other.http.post("/admin/models/load", json={"model": CHAT_MODEL})
        assert (done.status_code, done.json()) == (202, {"id": CHAT_MODEL, "state": "loading"})
        assert other.http.post("/admin/models/add", json={"model": "gpt2"}).status_code == 202
        page = other.http.post("/admin/models/load", json={"model": CHAT_MODEL}, headers={"origin": "http://127.0.0.1"})
        assert page.status_code == 403
        assert other.http.post("/admin/models/load", json={"id": CHAT_MODEL}).status_code == 400
        assert other.http.post("/admin/models/load", json={"model": 5}).status_code == 400
        calls = httpx2.get(f"{model.url}/calls").json()
        assert calls["operated"] == [["/models/load", {"model": CHAT_MODEL}], ["/models/add", {"model": "gpt2"}]]


def test_model_service_down_loading_up_and_gone(bench: Bench, tmp_path: Path) -> None:
    """Before its ids are known: 503 with the way out, never 404, and other upstreams go on. While a model loads: 503
    with a time. Up: served at once, and when /ready says so the list holds it. Gone: 503, but hits are served."""
    port = free_port()
    with second(bench, tmp_path, model=f"http://127.0.0.1:{port}") as other:
        # 1. Down.
        refused = other.chat(model=CHAT_MODEL)
        assert refused.status_code == 503
        assert "make start" in error(refused)["message"]
        assert refused.headers["retry-after"]
        assert other.http.get("/ready").status_code == 503
        assert other.http.get("/status").json()["model"]["state"] == "down"
        assert other.http.get("/health").status_code == 200
        assert other.chat().status_code == 200
        text = new()
        with mock(tmp_path, port) as model:
            # 2. It loads.
            other.control(model, loading=[CHAT_MODEL], state="loading")
            # The proxy may have asked the mock before it was told to load.
            eventually(lambda: "loading" in other.chat(model=CHAT_MODEL).json().get("error", {}).get("message", ""))
            refused = other.chat(model=CHAT_MODEL)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert other.chat(model="nobody").status_code == 404
            assert other.http.get("/ready").status_code == 503
            assert other.http.get("/status").json()["model"]["state"] == "loading"
            # 3. It is up: the first who asks, and the first who looks, find the model.
            other.control(model, loading=[], state="ready")
            assert other.http.get("/ready").json()["status"] == "ready"
            assert CHAT_MODEL in {entry["id"] for entry in other.http.get("/v1/models").json()["data"]}
            assert other.chat(text, model=CHAT_MODEL).status_code == 200
        # 4. It is gone.
        assert state(other.chat(text, model=CHAT_MODEL)) == "hit"
        for stream in (False, True):
            gone = other.chat(model=CHAT_MODEL, stream=stream)
            assert gone.status_code == 503
            assert error(gone)["code"] == "upstream_unavailable"
        # 5. It comes back: by itself.
        with mock(tmp_path, port):
            eventually(lambda: other.chat(model=CHAT_MODEL).status_code == 200)


# ---- faults of an upstream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("mode", "status", "kind"),
    [
        ("500", 500, "server_error"),
        ("429", 429, "rate_limit_error"),
        ("403", 403, "invalid_request_error"),
        ("401", 502, "server_error"),
        ("html", 502, "server_error"),
        ("html-500", 502, "server_error"),
        ("array", 502, "server_error"),
        ("redirect", 502, "server_error"),
    ],
)
def test_upstream_errors(bench: Bench, mode: str, status: int, kind: str, stream: bool) -> None:
    """OpenAI's envelopes are passed on with status and Retry-After, all else is wrapped; the key is in none of them."""
    answer = bench.chat(model=f"gpt-mock-{mode}", stream=stream)
    assert answer.status_code == status
    assert error(answer)["type"] == kind
    assert UPSTREAM_KEY not in answer.text
    assert answer.headers.get("retry-after") == ("7" if mode == "429" else None)
    assert bench.calls()["total"] == 1


def test_an_answer_that_breaks_off_is_an_error(bench: Bench) -> None:
    assert bench.chat(model="gpt-mock-reset").status_code == 502
    last = events(bench.chat(model="gpt-mock-error-event", stream=True))[-1]
    assert "the engine fell over" in last["error"]["message"]
    assert UPSTREAM_KEY not in str(last)


def test_json_where_a_stream_was_asked_for_is_replayed(bench: Bench) -> None:
    got = events(bench.chat(model="gpt-mock-json", stream=True))
    assert got[-1] == "[DONE]"
    assert got[0]["object"] == "chat.completion.chunk"


# ---- streams


def test_r6_events_pass_verbatim_and_at_once(bench: Bench) -> None:
    """Not a byte is changed for a caller who asked for usage, comments and line ends included. Nothing is held back:
    the first events are there although the stream has no end."""
    body = {"model": "gpt-mock-crlf", "messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    direct = httpx2.post(f"{bench.paid.url}/v1/chat/completions", json=body).text
    passed = bench.post("chat/completions", body, cache_control="no-store").text

    def same(text: str) -> list[str]:
        return [line.partition('"system_fingerprint"')[2] for line in text.split("\r\n")]

    assert same(passed) == same(direct)
    assert ": still here" in passed

    with bench.http.stream("POST", "/v1/chat/completions", json=body | {"model": "gpt-mock-endless"}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert len(list(itertools.islice(lines, 3))) == 3  # of a stream that goes on
    eventually(lambda: bench.calls()["left"] == 1)


@pytest.mark.parametrize(("mode", "stream"), [("endless", True), ("hang", True), ("hang", False)])
def test_a_caller_who_leaves_cancels_the_upstream(bench: Bench, mode: str, stream: bool) -> None:
    """In the middle of a stream, before its first byte, and while JSON is made: nothing else ends these calls."""
    body = {"model": f"gpt-mock-{mode}", "messages": [{"role": "user", "content": new()}], "stream": stream}
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=60) as caller:
        caller.sendall(posted("/v1/chat/completions", body))
        if mode == "endless":
            caller.recv(1)
        eventually(lambda: bench.calls()["total"] == 1)
        assert bench.calls()["left"] == 0
    eventually(lambda: bench.calls()["left"] == 1)


def test_every_wait_for_an_upstream_or_a_caller_has_a_bound(bench: Bench, tmp_path: Path) -> None:
    """Side by side: a stream without a first byte, JSON that does not come, a stream that falls silent, a stream that
    goes on for ever, a body that never ends. No call is made again, and the upstream is let go of."""

    with second(bench, tmp_path, **SHORT_TIMEOUTS) as other, ThreadPoolExecutor() as callers:

        def body_unfinished() -> bytes:
            with socket.create_connection(("127.0.0.1", other.proxy.port), timeout=60) as slow:
                slow.sendall(posted("/v1/embeddings", {}).replace(b"content-length: 2", b"content-length: 100"))
                return slow.recv(12)

        silent = [callers.submit(other.chat, model="gpt-mock-hang", stream=stream) for stream in (True, False)]
        stalled = callers.submit(other.chat, model="gpt-mock-stall", stream=True)
        endless = callers.submit(other.chat, model="gpt-mock-endless", stream=True)
        unfinished = callers.submit(body_unfinished)
        eventually(lambda: bench.calls()["left"] == 4)
    for answer in (each.result() for each in silent):
        assert answer.status_code == 504
        assert error(answer)["code"] == "upstream_timeout"
        assert "retry-after" not in answer.headers
    assert "sent no data for too long" in events(stalled.result())[-1]["error"]["message"]
    got = events(endless.result())
    assert len(got) > 1
    assert got[-1]["error"]["code"] == "upstream_timeout"
    assert "PROXY_TOTAL_TIMEOUT_SECONDS" in got[-1]["error"]["message"]
    assert unfinished.result() == b"HTTP/1.1 408"
    assert bench.calls()["total"] == 4


class Caller:
    """An ASGI caller that sends one request, reads `takes` messages of the answer, and then reads no more."""

    def __init__(self, method: str, path: str, body: bytes = b"", *, takes: int) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        self.scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        self.got: list[Message] = []
        self._body: bytes | None = body
        self._takes = takes

    async def receive(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body}

    async def send(self, message: Message) -> None:
        if len(self.got) == self._takes:
            await asyncio.Event().wait()
        self.got.append(message)


Application = tuple[App, list[RequestRecord], Metrics]


@asynccontextmanager
async def app(monkeypatch: pytest.MonkeyPatch, page: Page | None = None, **settings: Any) -> AsyncIterator[Application]:
    """The application in this process, without a cache, and the accounts of its requests in the order of their ends.

    Its bound on a last write to a caller is short.
    """
    for module in (application, executor):
        monkeypatch.setattr(module, "STALLED_CLIENT_SECONDS", 0.05)
    made, metrics = Settings(**settings), Metrics()
    routes = Routes(made)
    upstreams = UpstreamPool(routes, made, metrics)
    cache = Cache(made.redis_url, bytes(32), enabled=False, timeout=1, max_entry_bytes=1)
    client, prices = Client(made.redis_url), Prices()
    ledger = Ledger(client, prices, folder=made.disk_queue_folder, max_bytes=0)
    counting = {
        "limits": Limits(client, prices, ledger, when_down="open"),
        "ledger": ledger,
        "flights": SingleFlight(None, limit=made.cache_max_entry_bytes),
        "reconciliation": Reconciliation(upstreams.ask_model),
    }
    accounts: list[RequestRecord] = []

    class Watched(Observer):
        def observe(self, path: str, request_id: str, record: RequestRecord, status: int, seconds: float) -> None:
            accounts.append(record)
            super().observe(path, request_id, record, status, seconds)

    yield (
        App(
            made,
            Executor(made, cache, upstreams, routes, ModelList(upstreams, 60), **counting),  # type: ignore[arg-type]
            keys=Authenticator(client, required=False, timeout=1),
            traffic=Traffic(),
            observer=Watched(metrics),
            pages={("GET", "/page"): page} if page else {},
            parts=[],
        ),
        accounts,
        metrics,
    )
    await upstreams.stop()


async def test_a_caller_who_does_not_read_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is up and the error event cannot be sent either, nothing more is tried."""
    upstream = {"openai_base_url": f"{bench.paid.url}/v1", "openai_api_key": UPSTREAM_KEY, "model_url": bench.model.url}
    async with app(monkeypatch, total_timeout_seconds=1, **upstream) as (served, accounts, _):
        body = {"model": "gpt-mock-endless", "messages": [{"role": "user", "content": "x"}], "stream": True}
        caller = Caller("POST", "/v1/chat/completions", json.dumps(body).encode(), takes=2)
        async with asyncio.timeout(60):
            await served(caller.scope, caller.receive, caller.send)
    assert [account.error for account in accounts] == ["client_stalled"]
    assert [message["type"] for message in caller.got] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_fault_in_the_proxy_is_an_error_without_its_words(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """500 with the envelope, or an event where the answer has begun. A caller who does not read it is given up."""

    async def broken(_: PageRequest, out: Response) -> None:
        if begun:
            await out.start_stream({})
        raise RuntimeError("what was asked")

    async with app(monkeypatch, broken) as (served, _, metrics), asyncio.timeout(60):
        for takes in (begun, 3):
            caller = Caller("GET", "/page", takes=takes)
            await served(caller.scope, caller.receive, caller.send)
            assert len(caller.got) == (takes if takes < 3 else 2 + begun)
        assert caller.got[0]["status"] == (200 if begun else 500)
        said = b"".join(message.get("body", b"") for message in caller.got)
        assert json.loads(said.removeprefix(b"data: "))["error"]["code"] == "proxy_fault"
        assert b"what was asked" not in said
        assert 'status="500"} 2.0' in metrics.page()[0].decode()


# ---- who may come in


def test_headers_are_clean_both_ways(bench: Bench) -> None:
    sent = {"authorization": "Bearer sk-mine", "cookie": "a=b", "x-api-key": "mine", "x-request-id": "my-id.1"}
    answer = bench.chat(headers=sent)
    received = bench.calls()["last"]["headers"]
    assert received["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert received["x-request-id"] == answer.headers["x-request-id"] == "my-id.1"
    assert not {"cookie", "x-api-key", "origin"} & set(received)
    assert not {"set-cookie", "connection", "transfer-encoding", "server"} & set(answer.headers)
    assert answer.headers["openai-processing-ms"] == "5"
    bench.chat(model=CHAT_MODEL, headers=sent)
    assert "authorization" not in bench.calls(bench.model)["last"]["headers"]
    odd = bench.http.get("/health", headers={"x-request-id": "not an id!"})
    assert odd.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:8080"}, 421),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "proxy:8080"}, 200),
        ({"host": "10.0.3.7:8080"}, 200),  # how Prometheus names a pod
        ({"host": "[fd00::7]:8080"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://lab.example"}, 200),
        ({"origin": "http://localhost:5", "host": "localhost:5"}, 200),
    ],
)
def test_a_web_page_must_not_spend_the_key(bench: Bench, headers: dict[str, str], status: int) -> None:
    """Only JSON, only under allowed host names, and no foreign origin."""
    raw = json.dumps({"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0})
    answer = bench.http.post(
        "/v1/chat/completions", content=raw, headers={"content-type": "application/json"} | headers
    )
    assert answer.status_code == status
    assert bench.calls()["total"] == (status == 200)
    if status != 200:
        assert error(answer)["type"] == "invalid_request_error"
    assert ("access-control-allow-origin" in answer.headers) == (headers.get("origin") == "https://lab.example")


def test_preflight_is_answered_to_allowed_origins_only(bench: Bench) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    allowed = bench.http.options("/v1/chat/completions", headers=asked | {"origin": "https://lab.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://lab.example"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert (
        bench.http.options("/v1/chat/completions", headers=asked | {"origin": "https://x.example"}).status_code == 403
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/embeddings", 405),
        ("POST", "/v1/models", 405),
        ("TRACE", "/health", 405),
        ("GET", "/v1/responses", 405),
        ("POST", "/v1/responses", 415),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/%00%ff/../..//etc", 404),
        ("POST", "/v1/chat/completions/", 404),
    ],
)
def test_other_paths_and_methods(bench: Bench, method: str, path: str, status: int) -> None:
    answer = bench.http.request(method, path)
    assert answer.status_code == status
    assert error(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("model", ""),
        ("model", None),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", {}),
        ("n", 0),
        ("n", "2"),
    ],
)
def test_fields_that_the_proxy_acts_on_are_checked(bench: Bench, field: str, value: Any) -> None:
    answer = bench.chat(**{field: value})
    assert answer.status_code == 400
    assert error(answer)["param"] == field


def test_bodies_are_bounded_in_size(bench: Bench) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100_000

    assert bench.http.post("/v1/chat/completions", content=chunks(), headers=JSON).status_code == 413


def test_embedding_inputs_are_bounded(bench: Bench) -> None:
    """2048 at once and no more. What else the body holds is read once, not once for each input: that would take longer
    than this client waits."""
    refused = bench.embed(["x"] * 2049)
    assert refused.status_code == 400
    assert error(refused)["param"] == "input"
    assert bench.calls(bench.model)["total"] == 0
    many = bench.embed([f"{number} {new()}" for number in range(2048)], pad=[0.5] * 50_000)
    assert many.status_code == 200
    assert len(many.json()["data"]) == 2048
    assert bench.calls(bench.model)["total"] == 1
    ordered = bench.embed(["b", "a", "b", "c", "a"]).json()["data"]
    assert [row["embedding"][0] for row in ordered] == [ord(letter) / 1000 for letter in "babca"]


def test_a_caller_who_leaves_its_body_is_no_bad_request(bench: Bench) -> None:
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=60) as caller:
        whole = posted("/v1/embeddings", {}, "x-request-id: left-early", "expect: 100-continue")
        head = whole.partition(b"\r\n\r\n")[0].replace(b"content-length: 2", b"content-length: 100")
        caller.sendall(head + b"\r\n\r\n")
        assert caller.recv(12) == b"HTTP/1.1 100"  # the proxy waits for the body
        caller.sendall(b"{")
    line = logged(bench, "left-early")
    assert (line["status"], line["error"]) == (499, "client_gone")


# ---- operation


def test_invented_models_do_not_grow_the_metrics(bench: Bench) -> None:
    """A name is told apart once it is a model's or an upstream answered to it, and only so many names are."""
    refused = f"gpt-{new().split()[1]}-mock-500"
    bench.chat(model=refused)
    page = bench.http.get("/metrics").text
    assert refused not in page
    assert 'model="other"' in page
    metrics = Metrics()
    for number in range(MOST_MODELS + 50):
        metrics.record("/v1/embeddings", RequestRecord(model=f"m{number}", model_known=True), 200, 0.1)
    labels = {
        sample.labels["model"] for family in metrics.registry.collect() for sample in family.samples if sample.labels
    }
    assert len(labels) == MOST_MODELS + 1
    assert "other" in labels


def test_a_metric_has_a_bounded_number_of_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it new combinations of labels are not counted; those that are known are."""
    monkeypatch.setattr("lab_proxy.telemetry.metrics.MOST_SERIES", 2)
    metrics = Metrics()
    for reason in ("one", "two", "three", "one"):
        metrics.count("limits_refused", reason)
        metrics.time("redis", reason, seconds=0.1)
    page = metrics.page()[0].decode()
    assert 'lab_proxy_limits_refused_total{reason="one"} 2.0' in page
    assert 'lab_proxy_redis_seconds_count{operation="one"} 2.0' in page
    assert '"two"' in page
    assert '"three"' not in page


def test_pages_log_and_metrics(bench: Bench) -> None:
    """One line a request, with what the brief table says and without a prompt, an answer or a key."""
    secret = new()
    answer = bench.chat(secret, stream=True, stream_options={"include_usage": True})
    bench.chat(secret)
    status = bench.http.get("/status").json()
    assert status["redis"]["state"] == status["model"]["state"] == "up"
    assert status["cache"]["hits"] >= 1
    assert {"name": "openai", "configured": True} in status["proxy"]["upstreams"]
    page = bench.http.get("/metrics").text
    assert 'lab_proxy_requests_total{cache="hit",model="gpt-mock",route="/v1/chat/completions",status="200"}' in page
    assert 'lab_proxy_tokens_total{kind="completion",model="gpt-mock",source="cache"}' in page
    assert "lab_proxy_ttft_seconds_bucket" in page
    line = logged(bench, answer.headers["x-request-id"])
    assert line["service"] == "proxy"
    assert (line["model"], line["upstream"], line["cache"], line["status"]) == ("gpt-mock", "openai", "miss", 200)
    assert line["tokens"] > 0
    assert line["ttft_ms"] > 0
    log = bench.proxy.log.read_text()
    for hidden in (secret, UPSTREAM_KEY, "You said", "Traceback"):
        assert hidden not in log


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"PROXY_PORT": "eighty"}, "PROXY_PORT"),
        ({"PROXY_HOST": "0.0.0.0"}, "PROXY_ALLOW_ANONYMOUS"),
        ({"PROXY_MODEL_URL": "localhost:8000"}, "PROXY_MODEL_URL"),
        ({"PROXY_MODEL_URL": "http://:8000"}, "PROXY_MODEL_URL"),
        ({"PROXY_OPENAI_BASE_URL": "https://there:99999/v1"}, "PROXY_OPENAI_BASE_URL"),
        ({"PROXY_OPENAI_API_KEY": "a", "PROXY_OPENAI_API_KEY_FILE": "b"}, "PROXY_OPENAI_API_KEY"),
        ({"PROXY_OPENAI_API_KEY_FILE": "not/there"}, "PROXY_OPENAI_API_KEY_FILE"),
        ({"PROXY_ROUTES_FILE": "not/there"}, "PROXY_ROUTES_FILE"),
        ({"PROXY_ROUTES_FILE": "routes.yaml"}, "PROXY_ROUTES_FILE"),
        ({"PROXY_ROUTES_FILE": "nowhere.yaml"}, "base_url"),
        ({"PROXY_CACHE_SECRET_FILE": "short"}, "PROXY_CACHE_SECRET_FILE"),
        ({"PROXY_REDIS_URL": "http://x"}, "PROXY_REDIS_URL"),
        ({"PROXY_TOTAL_TIMEOUT_SECONDS": "0"}, "PROXY_TOTAL_TIMEOUT_SECONDS"),
    ],
)
def test_a_wrong_setting_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: dict[str, str], named: str
) -> None:
    """One line that names the variable, and exit code 2."""
    (tmp_path / "routes.yaml").write_text("upstreams: {x: {kind: openai}}\nroutes: [{upstream: y}]\n")
    (tmp_path / "nowhere.yaml").write_text("upstreams: {x: {kind: openai, base_url: 'there/v1'}}\nroutes: []\n")
    (tmp_path / "short").write_text("abc")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PROXY_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main() == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1


def test_a_port_that_is_taken_ends_the_start(bench: Bench, tmp_path: Path) -> None:
    """One line that names the variable, and the process ends with exit code 1."""
    env = {**os.environ, "PROXY_PORT": str(bench.proxy.port), "PROXY_CACHE_SECRET_FILE": str(tmp_path / "secret")}
    done = subprocess.run(python("lab_proxy"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "PROXY_PORT" in done.stderr
    assert "already in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- the end: here the connection of the first test has been idle for a while


def test_an_idle_connection_outlives_the_callers_own_patience(idle: tuple[socket.socket, float]) -> None:
    """A caller asks again on a connection that it still takes for open: the proxy has not closed it."""
    caller, since = idle
    time.sleep(max(0.0, since + IDLE_SECONDS - time.monotonic()))  # mostly 0: the tests between take longer
    healthy(caller)

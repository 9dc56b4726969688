"""The proxy beside its cache: where requests go, what comes back of faults, who may come in, how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fixtures_proxy import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    UPSTREAM_KEY,
    Bench,
    events,
    eventually,
    mock,
    new,
    proxy,
    redis_url,
    second,
    state,
)
from lab_proxy.__main__ import main
from lab_proxy.cache.store import CacheControl
from lab_proxy.errors import UpstreamTimeout
from lab_proxy.http import app as application
from lab_proxy.http.app import App, Response
from lab_proxy.requests import executor
from lab_proxy.requests.billing import Billing
from lab_proxy.requests.context import RequestContext, RequestRecord
from lab_proxy.requests.executor import Executor
from lab_proxy.requests.planner import Planner
from lab_proxy.telemetry.metrics import MOST_MODELS, Metrics
from lab_proxy.upstreams.client import passed_on
from processes import free_port, python

NO_STORE = {"cache-control": "no-store"}


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
    with proxy(tmp_path, redis=redis_url(bench.redis), model=bench.model.url) as keyless, httpx2.Client() as http:
        alone = Bench(keyless, bench.paid, bench.model, bench.redis, http)
        http.base_url = keyless.url
        text = new()
        answer = alone.chat(text, model="gpt-4o-mini")
        assert answer.headers["x-model-alias"] == "gpt-4o-mini"
        assert answer.json()["model"] == CHAT_MODEL
        assert bench.calls(bench.model)["last"]["body"]["model"] == CHAT_MODEL
        for same in ("gpt-3.5-turbo", CHAT_MODEL):
            assert state(alone.chat(text, model=same)) == "hit"
        assert "x-model-alias" not in alone.chat(text, model=CHAT_MODEL).headers
        assert alone.embed("x", model="text-embedding-3-small").json()["model"] == EMBEDDING_MODEL
        listed = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
        assert listed["gpt-4o-mini"]["alias_of"] == CHAT_MODEL
        assert http.get("/v1/models/gpt-3.5-turbo").json()["revision"] == listed[CHAT_MODEL]["revision"]
        refused = alone.chat(model="gpt-7")
        assert refused.status_code == 404
        assert "PROXY_OPENAI_API_KEY" in error(refused)["message"]


def test_a_model_that_loads_is_not_unknown(bench: Bench, tmp_path: Path) -> None:
    """503 with a time while it loads; served at once when it is there, and when /ready says so
    the list holds it."""
    port = free_port()
    with mock(tmp_path, port) as model:
        httpx2.post(f"{model.url}/control", json={"loading": [CHAT_MODEL], "state": "loading"})
        with second(bench, tmp_path, model=model.url) as other:
            refused = other.chat(model=CHAT_MODEL)
            assert refused.status_code == 503
            assert "loading" in error(refused)["message"]
            assert refused.headers["retry-after"]
            assert other.chat(model="nobody").status_code == 404
            httpx2.post(f"{model.url}/control", json={"loading": [], "state": "ready"})
            assert other.http.get("/ready").status_code == 200
            assert CHAT_MODEL in {entry["id"] for entry in other.http.get("/v1/models").json()["data"]}
            assert other.chat(model=CHAT_MODEL).status_code == 200


def test_model_service_down(bench: Bench, tmp_path: Path) -> None:
    """Before its ids are known: 503 with the way out, never 404, and other upstreams go on. Known and gone: 503 too,
    but hits are served. Back: by itself."""
    port = free_port()
    with second(bench, tmp_path, model=f"http://127.0.0.1:{port}") as other:
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
            eventually(lambda: other.chat(text, model=CHAT_MODEL).status_code == 200, 2)
            assert other.http.get("/ready").json()["status"] == "ready"
            httpx2.post(f"{model.url}/control", json={"state": "loading"})
            assert other.http.get("/ready").status_code == 503
            assert other.http.get("/status").json()["model"]["state"] == "loading"
        assert state(other.chat(text, model=CHAT_MODEL)) == "hit"
        for stream in (False, True):
            gone = other.chat(model=CHAT_MODEL, stream=stream)
            assert gone.status_code == 503
            assert error(gone)["code"] == "upstream_unavailable"


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
        ("hang", 504, "server_error"),
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


def test_no_connection(bench: Bench, tmp_path: Path) -> None:
    with second(bench, tmp_path, paid=f"http://127.0.0.1:{free_port()}") as other:
        refused = other.chat()
        assert refused.status_code == 503
        assert error(refused)["code"] == "upstream_unavailable"


def test_json_where_a_stream_was_asked_for_is_replayed(bench: Bench) -> None:
    got = events(bench.chat(model="gpt-mock-json", stream=True))
    assert got[-1] == "[DONE]"
    assert got[0]["object"] == "chat.completion.chunk"


# ---- streams


def test_r6_events_pass_verbatim_and_at_once(bench: Bench) -> None:
    """Not a byte is changed for a caller who asked for usage, comments and line ends included; nothing is held back."""
    body = {"model": "gpt-mock-crlf", "messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    direct = httpx2.post(f"{bench.paid.url}/v1/chat/completions", json=body).text
    passed = bench.post("chat/completions", body, cache_control="no-store").text

    def same(text: str) -> list[str]:
        return [line.partition('"system_fingerprint"')[2] for line in text.split("\r\n")]

    assert same(passed) == same(direct)
    assert ": still here" in passed

    def seen() -> list[float]:
        started = time.perf_counter()
        with bench.http.stream("POST", "/v1/chat/completions", json=body | {"model": "gpt-mock-slow"}) as answer:
            return [time.perf_counter() - started for line in answer.iter_lines() if line]

    tries = [seen() for _ in range(3)]  # the machine may stand still in one of them
    assert min(one[0] for one in tries) < 0.5
    assert max(one[10] - one[0] for one in tries) > 0.7


@pytest.mark.parametrize(("mode", "stream"), [("slow", True), ("hang", True), ("hang", False)])
def test_a_caller_who_leaves_cancels_the_upstream(bench: Bench, mode: str, stream: bool) -> None:
    """Within 500 ms: in the middle of a stream, before its first byte, and while JSON is made. The best of three."""

    def seconds() -> float:
        bench.forget()
        body = {"model": f"gpt-mock-{mode}", "messages": [{"role": "user", "content": new()}], "stream": stream}
        raw = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n"
        with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=5) as caller:
            caller.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
            if mode == "slow":
                caller.recv(1)
            eventually(lambda: bench.calls()["total"] == 1, 10)
            assert bench.calls()["left"] == 0
        return eventually(lambda: bench.calls()["left"] == 1, 5)

    assert min(seconds() for _ in range(3)) < 0.5


def test_total_time_is_bounded(bench: Bench) -> None:
    """A stream that never falls silent ends with an error when PROXY_TOTAL_TIMEOUT_SECONDS are over."""
    started = time.perf_counter()
    got = events(bench.chat(model="gpt-mock-endless", stream=True))
    assert 1.4 < time.perf_counter() - started < 3
    assert got[-1]["error"]["code"] == "upstream_timeout"
    assert len(got) > 10


async def never(*_: object) -> None:
    """A client that does not read."""
    await asyncio.sleep(3600)


async def test_a_caller_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is up and the error event cannot be sent either, nothing more is tried."""
    monkeypatch.setattr(executor, "STALLED_CLIENT_SECONDS", 0.05)

    async def late(*_: object) -> None:
        raise UpstreamTimeout("late")

    out = Response(never, {})
    out.started = True
    answering = object.__new__(Executor)
    monkeypatch.setattr(Planner, "plan", late)
    answering._total, answering.planner, answering._billing = 1, object.__new__(Planner), Billing(None, None)
    call = RequestContext("t", "/v1/chat/completions", b"", {}, "r", CacheControl(), False, 0.0)
    async with asyncio.timeout(2):
        await answering.answer(call, out)
    assert call.record.error == "client_stalled"
    assert not out.ended


@pytest.mark.parametrize("begun", [False, True])
async def test_a_fault_is_told_within_a_bound(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    monkeypatch.setattr(application, "STALLED_CLIENT_SECONDS", 0.05)
    told: list[RequestRecord] = []

    async def broken(*given: Any) -> None:
        given[-1].started = begun
        raise RuntimeError

    monkeypatch.setattr(App, "_dispatch", broken)
    monkeypatch.setattr(App, "tell", lambda *given: told.append(given[3]))
    async with asyncio.timeout(2):
        await object.__new__(App)._request({"headers": [], "path": "/", "method": "GET"}, never, never)  # type: ignore[arg-type]
    assert [account.error for account in told] == ["RuntimeError"]


# ---- who may come in


def test_upstream_headers_that_tell_whose_key_it_is_stay_here() -> None:
    sent = {"OpenAI-Organization": "acme", "openai-project": "p", "openai-version": "1", "openai-processing-ms": "5"}
    sent |= {"x-ratelimit-limit-requests": "9", "Set-Cookie": "a=b"}
    assert set(passed_on(sent)) == {"openai-version", "openai-processing-ms", "x-ratelimit-limit-requests"}


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


def test_bodies_are_bounded_in_size_and_time(bench: Bench) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    headers = {"content-type": "application/json"}
    assert bench.http.post("/v1/chat/completions", content=chunks(), headers=headers).status_code == 413
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=5) as slow:
        slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        slow.sendall(b"content-length: 100\r\n\r\n{")
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_an_idle_connection_outlives_the_callers_own_patience(bench: Bench) -> None:
    """httpx, and with it the openai SDK, asks on a connection that was idle for up to 5 s."""
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=5) as caller:
        for pause in (0, 6):
            time.sleep(pause)
            caller.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert caller.recv(12) == b"HTTP/1.1 200"
            caller.recv(65536)


def test_embedding_inputs_are_bounded_and_cheap(bench: Bench, tmp_path: Path) -> None:
    """2048 at once and no more; as many in one request as OpenAI takes cost little, whatever else the body holds."""
    refused = bench.embed(["x"] * 2049)
    assert refused.status_code == 400
    assert error(refused)["param"] == "input"
    assert bench.calls(bench.model)["total"] == 0
    with second(bench, tmp_path) as patient:

        def seconds(turn: int) -> float:
            given = [f"{turn} {number}" for number in range(2048)]
            started = time.perf_counter()
            many = patient.embed(given, pad=[0.5] * 15_000)
            took = time.perf_counter() - started
            assert many.status_code == 200, many.text
            assert len(many.json()["data"]) == 2048
            return took

        assert min(map(seconds, range(3))) < 2
    ordered = bench.embed(["b", "a", "b", "c", "a"]).json()["data"]
    assert [row["embedding"][0] for row in ordered] == [ord(letter) / 1000 for letter in "babca"]


def test_a_caller_who_leaves_its_body_is_no_bad_request(bench: Bench) -> None:
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=5) as caller:
        caller.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        caller.sendall(b"x-request-id: left-early\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.1)
    eventually(lambda: "left-early" in bench.proxy.log.read_text(), 2)
    line = next(json.loads(line) for line in bench.proxy.log.read_text().splitlines() if "left-early" in line)
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
    labels = {sample.labels["model"] for family in metrics.collect() for sample in family.samples if sample.labels}
    assert len(labels) == MOST_MODELS + 1
    assert "other" in labels


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
    request_id = answer.headers["x-request-id"]
    eventually(lambda: request_id in bench.proxy.log.read_text(), 2)
    log = bench.proxy.log.read_text()
    line = json.loads(next(line for line in log.splitlines() if request_id in line))
    assert line["service"] == "proxy"
    assert (line["model"], line["upstream"], line["cache"], line["status"]) == ("gpt-mock", "openai", "miss", 200)
    assert line["tokens"] > 0
    assert line["ttft_ms"] > 0
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


def test_exit_codes(bench: Bench, tmp_path: Path) -> None:
    """2 for a wrong setting, and a clear line for a port that is taken."""
    for port, code, said in (("eighty", 2, "PROXY_PORT"), (str(bench.proxy.port), 1, "already in use")):
        env = {**os.environ, "PROXY_PORT": port, "PROXY_CACHE_SECRET_FILE": str(tmp_path / "secret")}
        argv = python("lab_proxy")
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == code
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_lets_streams_end(bench: Bench, tmp_path: Path) -> None:
    """New work is refused, the running stream ends with [DONE], the process with 0. The key came from a file."""
    key = tmp_path / "key"
    key.write_text(f"{UPSTREAM_KEY}\n")
    base = f"{bench.paid.url}/v1"
    with second(bench, tmp_path, paid="", openai_api_key_file=str(key), openai_base_url=base) as other:
        got: list[httpx2.Response] = []
        bench.control(bench.paid, held=True)
        asking = threading.Thread(target=lambda: got.append(other.chat(model="gpt-mock-slow", stream=True)))
        asking.start()
        eventually(lambda: bench.calls()["total"] == 1, 10)
        assert bench.calls()["last"]["headers"]["authorization"] == f"Bearer {UPSTREAM_KEY}"
        os.killpg(other.proxy.popen.pid, signal.SIGTERM)
        time.sleep(0.3)
        refused = httpx2.post(f"{other.proxy.url}/v1/chat/completions", json={})
        assert (refused.status_code, error(refused)["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert httpx2.get(f"{other.proxy.url}/ready").json()["status"] == "draining"
        bench.control(bench.paid, held=False)
        asking.join(10)
        assert events(got[0])[-1] == "[DONE]"
        assert other.proxy.popen.wait(5) == 0


def test_sigterm_ends_within_its_bound(bench: Bench, tmp_path: Path) -> None:
    """A stream that does not end is cut after PROXY_DRAIN_TIMEOUT_SECONDS, upstream too."""
    raw = json.dumps({"model": "gpt-mock-hang", "messages": [], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n"
    with (
        second(bench, tmp_path, drain_timeout_seconds="1") as other,
        socket.create_connection(("127.0.0.1", other.proxy.port), timeout=5) as caller,
    ):
        caller.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
        eventually(lambda: bench.calls()["total"] == 1, 10)
        started = time.perf_counter()
        os.killpg(other.proxy.popen.pid, signal.SIGTERM)
        assert other.proxy.popen.wait(5) == 0
        assert time.perf_counter() - started < 3
        eventually(lambda: bench.calls()["left"] == 1, 0.5)

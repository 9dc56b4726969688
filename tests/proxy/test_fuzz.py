"""Bodies and headers that nobody should send, to the proxy and to the model, and answers that no upstream should give:
no 500, nothing hangs, the next request works.

Ten thousand to each of them in `make test-all`. FUZZ=100000 sends so many, other ones each time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from counts import cases
from fixtures_proxy import control_client, mock, new, proxy, redis_url
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lab_proxy.endpoints import CHAT
from processes import Process, redis_server
from served import EMBEDDING, TINY
from test_upstream import PACKAGED

BODIES = int(os.environ.get("FUZZ") or cases(300, 10_000))  # for each target
SEED = random.SystemRandom().randrange(10**9) if "FUZZ" in os.environ else 7
STEPS = 5  # an example is a sound request and so many changes, one upon the other: each of them is sent
SECONDS = 60  # for one answer; the proxy's own limits end it after 2

ASKED: Any = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SOUND: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"model": "gpt-mock", "messages": [ASKED], "temperature": 0, "seed": 7}),
    ("/v1/chat/completions", {
        "model": "gpt-mock", "messages": [{"role": "system", "content": "Be brief."}, ASKED], "stream": True, "n": 2,
        "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 5, "stop": ["x"],
        "logprobs": True, "tools": [TOOL], "tool_choice": "none", "metadata": {"a": "b"}, "user": "u",
    }),
    ("/v1/completions", {"model": "gpt-mock", "prompt": ["a", "b"], "temperature": 0, "max_tokens": 4, "echo": False}),
    ("/v1/embeddings", {"model": "all-minilm-l6-v2", "input": ["a", [1, 2]], "encoding_format": "float"}),
    ("/v1/embeddings", {"model": "text-embedding-mock", "input": "a"}),
    ("/v1/responses", {"model": "gpt-mock", "input": "Hi", "stream": False}),
    ("/v1/batches", {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}),
    ("/v1/files", {"purpose": "batch"}),
    ("/cache/explain", {"endpoint": "/v1/embeddings", "request": {"model": "gpt-mock", "input": "a"}, "against": {}}),
    ("/cache/flush", {"model": "gpt-mock"}),
]  # fmt: skip
FEW = {"temperature": 0, "max_tokens": 4}
LOCAL: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"model": TINY, "messages": [ASKED], "seed": 7, **FEW}),
    (f"/m/{TINY}/v1/chat/completions", {
        "model": TINY, "messages": [{"role": "system", "content": "Be brief."}, ASKED], "stream": True, "n": 2,
        "stream_options": {"include_usage": True}, "stop": ["x"], "logprobs": True, "top_logprobs": 2,
        "tools": [TOOL], "tool_choice": "none", "metadata": {"a": "b"}, "user": "u", "logit_bias": {"80": 5}, **FEW,
    }),
    ("/v1/chat/completions", {
        "model": TINY, "messages": [ASKED], **FEW,
        "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": {"type": "object"}}},
    }),
    ("/v1/completions", {"model": TINY, "prompt": ["a", "b"], "echo": False, "logprobs": 1, **FEW}),
    (f"/m/{TINY}/v1/completions", {"model": TINY, "prompt": [5, 6], "top_k": 3, "min_p": 0.1, **FEW}),
    ("/v1/embeddings", {"model": EMBEDDING, "input": ["a", [1, 2]], "encoding_format": "float"}),
    (f"/m/{EMBEDDING}/v1/embeddings", {"model": EMBEDDING, "input": "a"}),
]  # fmt: skip
NAMES = (
    "model", "messages", "input", "prompt", "stream", "stream_options", "n", "temperature", "seed", "tools", "store",
    "role", "content", "logprobs", "max_tokens", "previous_response_id", "background", "user", "wibble", "", "\x00",
    "include_usage", "endpoint", "request", "against", "metadata", "image_url", "type", "encoding_format", "dimensions",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 5e-324, 2**53 + 1, 2**64, -(2**63), 10**40, "", " ", "x",
    "é\u0000\u2028", "👩‍👩‍👧", "gpt-mock", "nobody", "auto", "a" * 5000, [], {}, [[]], [None], {"": None},
    [1, "a"],    {"type": "text", "text": "x"}, [{"role": "user", "content": None}],
    [ASKED] * 40, {"role": "tool", "tool_call_id": "1", "content": []}, ["x"] * 300, "__proto__", "%s%n", "\r\n\r\n",
)  # fmt: skip
SPOILT = (float("nan"), float("-inf"), "\ud800", 10**400, {"a": ["\udfff"]})  # no JSON for anybody: sent once each
HEADERS: tuple[dict[str, str], ...] = (
    *[{}] * 16, {"cache-control": "no-store"}, {"cache-control": "no-cache, max-age=1"},
    {"cache-control": "only-if-cached, max-age=99999999999999999999"}, {"cache-control": ",,=;\xff\"max-age="},
    {"x-cache-sampled": "true"}, {"x-request-id": "\xe9" * 300}, {"authorization": "Bearer \xff"}, {"accept": "\x80"},
    {"content-type": "application/json; charset=utf-16"}, {"content-type": "text/plain"}, {"content-type": "\xff/"},
    {"content-type": "multipart/form-data; boundary=b"}, {"content-type": "multipart/form-data; boundary=" + "x" * 900},
    {"origin": "null"}, {"origin": "https://lab.example"}, {"content-encoding": "gzip"}, {"expect": "100-continue"},
    {"x-request-timeout-ms": "-1"}, {"traceparent": "00-zz"}, {"x-stainless-raw-response": "true", "te": "trailers"},
)  # fmt: skip

values = st.one_of(
    st.sampled_from(ODD), st.text(max_size=8), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(ODD), max_size=3),
)  # fmt: skip
of_values = (
    st.tuples(st.just("put"), st.integers(0, 30), values),
    st.tuples(st.just("put"), st.integers(0, 30), st.sampled_from(ODD)),
    st.tuples(st.just("add"), st.sampled_from(NAMES), values),
    st.tuples(st.just("drop"), st.integers(0, 30), st.none()),
    st.tuples(st.just("wrap"), st.integers(0, 30), st.integers(1, 90)),
)
of_bytes = (
    st.tuples(st.just("twice"), st.sampled_from(NAMES), st.one_of(values, st.sampled_from(SPOILT))),
    st.tuples(st.just("cut"), st.integers(0, 400), st.none()),
    st.tuples(st.just("bytes"), st.integers(0, 400), st.binary(min_size=1, max_size=6)),
    st.tuples(st.just("form"), st.integers(0, 400), st.binary(max_size=20)),
)
changes = st.lists(st.one_of(*of_values, *of_values, *of_values, *of_bytes), min_size=STEPS, max_size=STEPS)


@dataclass
class Target:
    """The service under fire, and a connection for each thread that fires."""

    process: Process
    pool: ThreadPoolExecutor
    kept: threading.local = field(default_factory=threading.local)
    opened: list[http.client.HTTPConnection] = field(default_factory=list)
    sent: int = 0
    repeats: bool = False  # its answers hold the question

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """One answer. Raises TimeoutError where there is none."""
        for attempt in (0, 1):
            connection = getattr(self.kept, "connection", None)
            if connection is None or attempt:
                connection = http.client.HTTPConnection(urlsplit(self.process.url).netloc, timeout=SECONDS)
                self.kept.connection = connection
                self.opened.append(connection)
            try:
                connection.request("POST", path, body=body, headers={"content-type": "application/json"} | headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (ConnectionError, http.client.RemoteDisconnected, http.client.CannotSendRequest):
                connection.close()  # one that had been idle for too long, or ended by an early refusal
        raise AssertionError(f"seed {SEED}: connections are closed without an answer: {path} {headers} {body!r}")

    def close(self) -> None:
        for connection in self.opened:
            connection.close()


@pytest.fixture
def before_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    with (
        mock(folder) as upstream,
        redis_server(folder) as redis,
        proxy(
            folder, redis=redis_url(redis), model=upstream.url, paid=upstream.url, first_byte_timeout_seconds="2",
            idle_timeout_seconds="2", total_timeout_seconds="2", body_timeout_seconds="2", upstream_retries="0",
            allowed_origins="https://lab.example",
        ) as started,
        ThreadPoolExecutor(STEPS) as pool,
        contextlib.closing(Target(started, pool, repeats=True)) as made,
    ):  # fmt: skip
        yield made


@pytest.fixture
def before_model(model_process: Process) -> Iterator[Target]:
    with ThreadPoolExecutor(STEPS) as pool, contextlib.closing(Target(model_process, pool)) as made:
        yield made


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in `value` with a key of it."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner)[:40]:
        found += [(value, key), *places(each)]
    return found


def bodies(sound: Any, made: list[tuple[str, Any, Any]]) -> Iterator[bytes]:
    """The request after each change. Changes of bytes are made to one body alone, those of values stay."""
    value = deepcopy(sound)
    for kind, where, what in made:
        spots = places(value)
        if kind in {"put", "drop", "wrap"} and spots:
            holder, key = spots[where % len(spots)]
            if kind == "put":
                holder[key] = deepcopy(what)
            elif kind == "drop":
                del holder[key]
            else:
                for _ in range(what):
                    holder[key] = [holder[key]]
        elif kind == "add":
            value[where] = deepcopy(what)
        raw = json.dumps(value).encode()
        if kind == "twice":
            raw = b"{" + json.dumps({where: what}).encode()[1:-1] + b"," + raw[1:]
        elif kind == "cut":
            raw = raw[: where % (len(raw) + 1)]
        elif kind == "bytes":
            at = where % (len(raw) + 1)
            raw = raw[:at] + what + raw[at:]
        elif kind == "form":
            head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + raw + b"\r\n--b--\r\n"
            at = where % len(head)
            raw = head[:at] + what + head[at + len(what) :]
        yield raw


def fire(target: Target, sound: list[tuple[str, Any]], unwell: set[str]) -> None:
    """Every answer is whole and says in OpenAI's envelope what is wrong; a request between them is served as ever.
    `unwell`: the codes of errors beyond 500."""
    examples = st.tuples(st.sampled_from(sound), st.sampled_from(HEADERS), changes)

    @seed(SEED)
    @settings(
        max_examples=BODIES // STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def one(example: tuple[tuple[str, Any], dict[str, str], list[tuple[str, Any, Any]]]) -> None:
        (path, body), headers, made = example
        if path == "/v1/files" and "content-type" not in headers:
            headers = {**headers, "content-type": "multipart/form-data; boundary=b"}
        sent = list(bodies(body, made))
        answers = target.pool.map(lambda body: target.post(path, body, headers), sent)
        for body, (status, answer) in zip(sent, answers, strict=True):
            target.sent += 1
            shown = f"seed {SEED}: {path} {headers} {body!r} -> {status} {answer!r}"
            assert status != 500, shown
            if status >= 400:
                try:
                    error = json.loads(answer)["error"]
                except (ValueError, KeyError, TypeError):
                    raise AssertionError(shown) from None
                assert error["message"], shown
                assert status < 500 or error["code"] in unwell, shown
        if target.sent % 500 == 0:
            served(target, sound)

    one()
    assert target.sent >= BODIES // STEPS * STEPS, f"seed {SEED}"
    served(target, sound)
    assert target.process.popen.poll() is None, f"seed {SEED}"


def served(target: Target, sound: list[tuple[str, Any]]) -> None:
    path, body = sound[0]
    text = new()
    body = body | {"messages": [{"role": "user", "content": text}]}
    status, answer = target.post(path, json.dumps(body).encode(), {})
    assert status == 200, f"seed {SEED}: {answer!r}"
    choice = json.loads(answer)["choices"][0]
    assert choice["finish_reason"] in {"stop", "length"}, f"seed {SEED}: {answer!r}"
    if target.repeats:
        assert text in choice["message"]["content"], f"seed {SEED}: {answer!r}"


def test_no_body_and_no_header_makes_a_500_of_the_proxy(before_proxy: Target) -> None:
    fire(before_proxy, SOUND, {"upstream_error", "not_cached", "upstream_timeout"})
    assert "fault in the proxy" not in before_proxy.process.log.read_text(errors="replace"), f"seed {SEED}"


def test_no_body_and_no_header_makes_a_500_of_the_model(before_model: Target) -> None:
    begins = before_model.process.log.stat().st_size
    fire(before_model, LOCAL, {"deadline_exceeded"})
    log = before_model.process.log.read_bytes()[begins:].decode(errors="replace")
    for fault in ("failed unexpectedly", "broke off"):
        assert fault not in log, f"seed {SEED}"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CALL = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
MESSAGE = {"role": "assistant", "content": "Hello there", "refusal": None, "tool_calls": [CALL]}
TOP = {"id": "x", "created": 1, "model": "gpt-mock", "usage": USAGE}
RESULTS = {"model": "m", "method": "x", "results": [{"label": "a"}], "usage": USAGE | {
    "per_input_tokens": [3], "per_input_completion_tokens": [0]}}  # fmt: skip
ANSWERS: list[tuple[str, Any, Any]] = [  # endpoint, request, a sound answer
    (CHAT, {"model": "gpt-mock", "messages": [ASKED], "temperature": 0}, TOP | {
        "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}]}),
    (CHAT, {"model": "gpt-mock", "messages": [ASKED], "temperature": 0, "stream": True}, TOP | {
        "object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": "stop", "delta": MESSAGE}]}),
    ("/v1/completions", {"model": "gpt-mock", "prompt": "a", "temperature": 0}, TOP | {
        "object": "text_completion", "choices": [{"index": 0, "finish_reason": "stop", "text": "Hello there"}]}),
    ("/v1/embeddings", {"model": "text-embedding-mock", "input": "a"}, {
        "object": "list", "data": [{"index": 0, "object": "embedding", "embedding": [0.5, 1]}], "usage": USAGE}),
    ("/v1/tasks/text-generation", {"model": "smollm2-135m-instruct", "inputs": "a"}, RESULTS),
    ("/v1/responses", {"model": "gpt-mock", "input": "Hi"}, {"id": "r", "object": "response", "usage": {
        "input_tokens": 3, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}}),
]  # fmt: skip


def answered(target: Target, upstreams: tuple[Process, Process], example: Any) -> None:
    """One request for each spoilt answer: it is passed on, or a clean error; and what a hit repeats is well formed."""
    (path, request, sound), made = example
    for number, answer in enumerate(bodies(sound, made)):
        body = dict(request)
        field = next(name for name in ("messages", "prompt", "input", "inputs") if name in body)
        body[field] = [{"role": "user", "content": new()}] if field == "messages" else new()
        kind = "application/json"
        if body.get("stream") and number % 4:  # one in four: JSON where a stream was asked for
            kind, answer = "text/event-stream", b"data: " + answer + b"\n\ndata: [DONE]\n\n"  # noqa: PLW2901
        turn = {"status": 200, "type": kind, "body": answer.decode("latin-1")}
        for upstream in upstreams:
            control_client().post(f"{upstream.url}/control", json={"script": [turn]})
        sent = json.dumps(body).encode()
        status, said = target.post(path, sent, {})
        shown = f"seed {SEED}: {path} {answer!r} -> {status} {said!r}"
        assert status in {200, 502}, shown
        if status == 502:
            assert json.loads(said)["error"]["code"] == "upstream_error", shown
        status, said = target.post(path, sent, {"cache-control": "only-if-cached"})
        if status == 200 and path in {CHAT, "/v1/completions"} and not body.get("stream"):
            for choice in json.loads(said)["choices"]:
                text = choice["message"].get("content") if path == CHAT else choice.get("text")
                assert isinstance(text, str | None), shown
            for count in (json.loads(said).get("usage") or {}).values():
                assert isinstance(count, int | dict | None), shown
        target.sent += 1


def test_no_answer_of_an_upstream_makes_a_500_of_the_proxy(tmp_path: Path) -> None:
    """Fields of other types, cut JSON, broken events: a clean answer or a 502, and nothing malformed is stored."""
    table = yaml.safe_load(PACKAGED.read_text())
    table["upstreams"]["openai"]["responses"] = True
    (tmp_path / "routes.yaml").write_text(yaml.safe_dump(table))
    with (
        mock(tmp_path) as paid,
        mock(tmp_path) as local,
        redis_server(tmp_path) as redis,
        proxy(
            tmp_path, redis=redis_url(redis), model=local.url, paid=paid.url, upstream_retries="0",
            routes_file=str(tmp_path / "routes.yaml"),
        ) as started,
        ThreadPoolExecutor(1) as pool,
        contextlib.closing(Target(started, pool)) as target,
    ):  # fmt: skip

        @seed(SEED)
        @settings(
            max_examples=BODIES // STEPS, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.tuples(st.sampled_from(ANSWERS), changes))
        def one(example: Any) -> None:
            answered(target, (paid, local), example)

        one()
        assert target.sent >= BODIES // STEPS * STEPS
        assert "fault in the proxy" not in started.log.read_text(errors="replace"), f"seed {SEED}"

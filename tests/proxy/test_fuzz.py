"""Ten thousand bodies and headers that nobody should send: no 500, nothing hangs, the next request works.

FUZZ=20000 digs deeper: so many examples, other ones each time.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from fixtures_proxy import mock, new, proxy, redis_url
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import Process, redis_server

EXAMPLES = int(os.environ.get("FUZZ", "2100"))
STEPS = 5  # an example is a sound request and so many changes, one upon the other: each of them is sent
SECONDS = 10  # for one answer; the proxy's own limits end it after 2

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
changes = st.one_of(*of_values, *of_values, *of_values, *of_bytes)
examples = st.tuples(
    st.sampled_from(SOUND), st.sampled_from(HEADERS), st.lists(changes, min_size=STEPS, max_size=STEPS)
)


@dataclass
class Target:
    """The proxy under fire, and a connection for each thread that fires."""

    process: Process
    pool: ThreadPoolExecutor
    kept: threading.local = field(default_factory=threading.local)
    opened: list[http.client.HTTPConnection] = field(default_factory=list)
    sent: int = 0

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
        raise AssertionError("the proxy closes its connections without an answer")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
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
    ):  # fmt: skip
        target = Target(started, pool)
        yield target
        for connection in target.opened:
            connection.close()


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


def test_no_body_and_no_header_makes_a_500(target: Target) -> None:
    """Every answer is whole and says in OpenAI's envelope what is wrong; a request between them is served as ever."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def fire(example: tuple[tuple[str, Any], dict[str, str], list[tuple[str, Any, Any]]]) -> None:
        (path, sound), headers, made = example
        if path == "/v1/files" and "content-type" not in headers:
            headers = {**headers, "content-type": "multipart/form-data; boundary=b"}
        sent = list(bodies(sound, made))
        answers = target.pool.map(lambda body: target.post(path, body, headers), sent)
        for body, (status, answer) in zip(sent, answers, strict=True):
            target.sent += 1
            assert status != 500, (path, headers, body, answer)
            if status >= 400:
                error = json.loads(answer)["error"]
                assert error["message"], (path, headers, body)
                assert status < 500 or error["code"] in {"upstream_error", "not_cached", "upstream_timeout"}, error
        if target.sent % 500 == 0:
            served(target)

    fire()
    assert target.sent >= min(10_000, EXAMPLES * STEPS)
    served(target)
    assert target.process.popen.poll() is None
    assert "fault in the proxy" not in target.process.log.read_text(errors="replace")


def served(target: Target) -> None:
    text = new()
    body = json.dumps({"model": "gpt-mock", "temperature": 0, "messages": [{"role": "user", "content": text}]}).encode()
    status, answer = target.post("/v1/chat/completions", body, {})
    assert (status, text in json.loads(answer)["choices"][0]["message"]["content"]) == (200, True)

"""HTTP as the RFCs say, at the proxy: heads, codings, old clients; and what a request says beside its body."""

from __future__ import annotations

import gzip
import json
import re
import socket
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fixtures_proxy import CHAT_MODEL, Bench, new, second, state
from lab_proxy.http.uvicorn_internals import CHECKED_UVICORN

pytestmark = pytest.mark.usefixtures("bench")
CLOSE = b"host: localhost\r\nconnection: close\r\n"


def told(bench: Bench, sent: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of what is answered to these bytes, until the proxy closes the connection."""
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=60) as line:
        line.sendall(sent)
        head, _, body = line.makefile("rb").read().partition(b"\r\n\r\n")
    first, *rest = head.split(b"\r\n")
    return int(first.split(b" ")[1]), dict(each.lower().split(b": ", 1) for each in rest), body


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\na b: c\r\n" + CLOSE + b"\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\n" + CLOSE + b"\r\n", 404),
        (b"GET /health HTTP/1.1\r\nx: " + 70_000 * b"x" + b"\r\n" + CLOSE + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nx: " + 70_000 * b"x", 431),
        (b"GET /health HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(9000)) + CLOSE + b"\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n" + CLOSE + b"\r\n0\r\n\r\n", 501),
        (
            b"GET /v1/realtime HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n",
            404,
        ),
        (b"GET /health HTTP/1.1\r\n" + CLOSE + b"cookie: a=" + 17_000 * b"x" + b"\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else "",
)
def test_odd_http_is_answered_in_the_apis_envelope(bench: Bench, sent: bytes, status: int) -> None:
    got, _, body = told(bench, sent)
    assert got == status
    assert status == 200 or json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_head_that_does_not_come_closes_its_connection(bench: Bench, tmp_path: Path) -> None:
    """Half a head is a 408, of the first request and of a later one; no head at all is no answer."""
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with second(bench, tmp_path, head_timeout_seconds="0.3") as other:
        assert told(other, whole[:20])[0] == 408
        with socket.create_connection(("127.0.0.1", other.proxy.port), timeout=60) as line:
            assert line.recv(1) == b""
        with socket.create_connection(("127.0.0.1", other.proxy.port), timeout=60) as line:
            line.sendall(whole + whole[:20])
            said = line.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in said


def test_a_client_of_http_1_0_gets_a_stream_with_its_length(bench: Bench) -> None:
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0, "stream": True}
    raw = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.0\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(raw)}\r\n\r\n"
    for _ in range(2):  # from the upstream, and from the cache
        status, headers, answer = told(bench, head.encode() + raw)
        assert status == 200
        assert b"transfer-encoding" not in headers
        assert headers[b"content-length"] == str(len(answer)).encode()
        assert answer.endswith(b"data: [DONE]\n\n")


def test_pipelined_requests_are_answered_in_order(bench: Bench) -> None:
    """Hits are written at once, misses are not; a long hit and one that ends the connection are not either."""
    texts = [new() for _ in range(4)]
    for text in (texts[1], texts[3]):
        assert bench.chat(text).status_code == 200
    choice = {"index": 0, "message": {"role": "assistant", "content": "y" * 100_000}, "finish_reason": "stop"}
    long = {"id": "x", "object": "chat.completion", "created": 1, "model": "gpt-mock", "choices": [choice]}
    bench.control(script=[{"status": 200, "body": long}])
    assert bench.chat(texts[2]).status_code == 200
    sent = b""
    for number, text in enumerate([texts[1], texts[0], texts[2], texts[3], texts[1]]):
        body = {"model": "gpt-mock", "messages": [{"role": "user", "content": text}], "temperature": 0}
        raw = json.dumps(body, separators=(",", ":")).encode()  # byte by byte as before: its plan is kept
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-request-id: n{number}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n"
        sent += (head + ("connection: close\r\n" if number == 4 else "")).encode() + b"\r\n" + raw
    with socket.create_connection(("127.0.0.1", bench.proxy.port), timeout=60) as line:
        line.sendall(sent)
        received = line.makefile("rb").read()
    ids = re.findall(rb"\r\nx-request-id: (n\d)\r\n", received)
    assert ids == [b"n0", b"n1", b"n2", b"n3", b"n4"], received[:2000]
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 5
    assert received.count(b"; hit") == 4, "all but the second"


def test_uvicorn_is_the_version_that_was_checked() -> None:
    """See http/uvicorn_internals.py: what it reads and sets of a request is private to uvicorn."""
    assert version("uvicorn").rpartition(".")[0] == CHECKED_UVICORN


@pytest.mark.parametrize(
    ("header", "pack", "status"),
    [
        ("gzip", gzip.compress, 200),
        ("deflate", zlib.compress, 200),
        ("identity", bytes, 200),
        ("gzip", bytes, 400),
        ("gzip", lambda raw: gzip.compress(raw)[:-4], 400),
        ("br", bytes, 415),
        ("gzip", lambda _: gzip.compress(bytes(10_000_000)), 413),
        ("gzip", lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:]), 200),
        ("gzip", lambda raw: gzip.compress(b"") * 1000 + gzip.compress(raw), 400),
        ("gzip, gzip, gzip", bytes, 415),
    ],
)
def test_a_content_coding_is_decoded_or_refused(bench: Bench, header: str, pack: Any, status: int) -> None:
    body = {"model": "gpt-mock", "messages": [{"role": "user", "content": new()}], "temperature": 0}
    headers = {"content-type": "application/json", "content-encoding": header}
    answer = bench.http.post("/v1/chat/completions", content=pack(json.dumps(body).encode()), headers=headers)
    assert answer.status_code == status, answer.text
    assert ("accept-encoding" in answer.headers) == (status == 415)
    if status == 200:
        assert state(bench.chat(body["messages"][0]["content"])) == "hit", "the content counts, not its coding"


@pytest.mark.parametrize("value", [0, 1, "no", []])
def test_a_request_is_valid_or_not_whatever_is_cached(bench: Bench, value: Any) -> None:
    text = new()
    assert bench.chat(text, model=CHAT_MODEL).status_code == 200
    answer = bench.chat(text, model=CHAT_MODEL, store=value)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")


def test_the_list_of_models_has_a_slash_or_none(bench: Bench) -> None:
    assert bench.http.get("/v1/models/").json() == bench.http.get("/v1/models").json()


@pytest.mark.parametrize("query", ["to=0001-01-01", "to=0001-01-10", "from=0001-01-01&to=9999-12-31"])
def test_a_day_out_of_range_is_named(bench: Bench, query: str) -> None:
    answer = bench.http.get(f"/usage?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("from", "to")


def test_token_ids_under_an_openai_name_are_that_models(bench: Bench, tmp_path: Path) -> None:
    """LangChain sends cl100k's: the local model gets their text, and the text's entry answers."""
    with second(bench, tmp_path, paid="") as other:

        def embed(given: Any) -> Any:
            return other.embed(given, model="text-embedding-3-small")

        first = embed(["hello world", "the interest rate"])
        assert first.status_code == 200, first.text
        ids = embed([[15339, 1917], [1820, 2802, 4478]])
        assert ids.json()["data"] == first.json()["data"]
        assert state(ids) == "hit"
        assert state(embed([15339, 1917])) == "hit"
        wrong = embed([[15339], [10**6]])
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input[1]")
        wrong = embed([[15339], ["x"]])
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input[1]")

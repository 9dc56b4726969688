"""Callers who do not take their answer: their connection is let go, whoever reads slowly keeps it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures_proxy import Bench, eventually, new, second, state

JSON = {"content-type": "application/json"}


def asked(text: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more


@pytest.fixture(scope="module")
def large(running: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy whose answers may be larger than what lies between it and its callers."""
    with second(
        running, tmp_path_factory.mktemp("large"), max_body_bytes="8000000",
        cache_max_entry_bytes="20000000",  # the question and the answer
        total_timeout_seconds="1.5",
    ) as started:  # fmt: skip
        yield started


@contextlib.contextmanager
def not_reading(bench: Bench, body: dict[str, Any]) -> Iterator[socket.socket]:
    raw = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", bench.proxy.port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(raw) + raw
        )
        yield client


def held(bench: Bench, client: socket.socket) -> bool:
    """Whether the proxy still has the connection."""
    port = client.getsockname()[1]
    there = psutil.Process(bench.proxy.popen.pid).net_connections("tcp")
    return any(each.raddr and each.raddr.port == port for each in there)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("near", [True, False])
def test_a_stalled_client_of_a_hit_is_let_go_like_one_of_a_live_stream(
    large: Bench, tmp_path: Path, stream: bool, near: bool
) -> None:
    """A caller that does not read what the cache has for it, as JSON or as a stream, from this worker's copy or not:
    PROXY_TOTAL_TIMEOUT_SECONDS later its connection is gone, and others never noticed."""
    body = asked("x" * 3_000_000, "gpt-mock", stream=stream) | {"user": new()}
    if near:
        body["seed"] = time.monotonic_ns()
    for _ in range(3 if near else 1):
        assert large.http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON).status_code == 200
    if not near:
        body["user"] = new()  # other bytes of the same request: not remembered
    with not_reading(large, body) as client:
        eventually(lambda: held(large, client), 2)
        began = time.monotonic()
        eventually(lambda: not held(large, client), 5)
        assert time.monotonic() - began > 1
    assert state(large.chat("again")) in {"miss stored", "hit"}


def test_a_slow_client_of_a_hit_gets_all_of_it(large: Bench) -> None:
    """Who reads, however slowly, is not cut off: for twice the time in which a stalled one is."""
    size = 7_500_000
    body = asked("x" * size, "gpt-mock")
    for expected in ("miss stored", "hit"):
        assert state(large.http.post("/v1/chat/completions", json=body)) == expected
    with not_reading(large, body) as client:
        taken, began = 0, time.monotonic()
        while taken < size and (part := client.recv(100_000)):
            taken += len(part)
            time.sleep(0.04 * len(part) / 100_000)  # the kernel hands on some 900 kB at a time
        assert taken >= size
        assert time.monotonic() - began > 2.5, "read too fast to tell"


def test_a_stalled_client_of_a_live_stream_is_let_go(large: Bench) -> None:
    """The same bound, and its upstream was let go with it."""
    large.forget()
    with not_reading(large, asked(f"{new()} {'x' * 3_000_000}", "gpt-mock", stream=True)) as client:
        eventually(lambda: held(large, client), 2)
        eventually(lambda: not held(large, client), 9)

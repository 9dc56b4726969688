"""Callers who do not take their answer: their connection is let go, whoever reads slowly keeps it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures_proxy import Bench, bench_on, eventually, new, second, state
from processes import GENEROUS_SECONDS

JSON = {"content-type": "application/json"}
LARGE = "x" * 3_000_000  # more than the kernel takes for a caller that does not read


ROOM = {"max_body_bytes": "8000000", "cache_max_entry_bytes": "20000000"}  # the latter: question and answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A proxy whose answers may be larger than what lies between it and its callers."""
    folder = tmp_path_factory.mktemp("bench")
    # The bound here; other requests have it too, and take a tenth of it.
    with bench_on(folder, short_timeouts=False, total_timeout_seconds="2", **ROOM) as started:
        yield started


def asked(text: str, model: str = "gpt-mock", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more


@contextlib.contextmanager
def not_reading(bench: Bench, body: dict[str, Any]) -> Iterator[socket.socket]:
    raw = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(GENEROUS_SECONDS)
        client.connect(("127.0.0.1", bench.proxy.port))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(raw) + raw
        )
        yield client


def begun(client: socket.socket) -> bytes:
    """Wait for the first bytes of the answer, and leave them where they are."""
    return client.recv(1000, socket.MSG_PEEK)


def held(bench: Bench, client: socket.socket) -> bool:
    """Whether the proxy still has the connection."""
    port = client.getsockname()[1]
    there = psutil.Process(bench.proxy.popen.pid).net_connections("tcp")
    return any(each.raddr and each.raddr.port == port for each in there)


def read(client: socket.socket, size: int, pace: float = 0) -> int:
    """How much came until it was `size` or more; `pace`: seconds for each 100 kB."""
    taken = 0
    while taken < size and (part := client.recv(100_000)):
        taken += len(part)
        time.sleep(pace * len(part) / 100_000)
    return taken


def fill(bench: Bench, body: dict[str, Any], times: int = 1) -> None:
    for _ in range(times):
        assert bench.http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON).status_code == 200


def test_a_stalled_client_is_let_go(bench: Bench, tmp_path: Path) -> None:
    """A caller that does not read what the cache has for it, as JSON or as a stream, from a local copy or not, or
    what an upstream streams: PROXY_TOTAL_TIMEOUT_SECONDS later its connection is gone, and others never noticed."""
    bodies: dict[str, dict[str, Any]] = {}
    for stream in (True, False):
        kind = "stream" if stream else "JSON"
        bodies[f"copied {kind}"] = asked(LARGE, stream=stream, seed=uuid.uuid4().int % 2**31)
        fill(bench, bodies[f"copied {kind}"], times=3)
        fill(bench, asked(LARGE, stream=stream, user=new()))
        bodies[f"stored {kind}"] = asked(LARGE, stream=stream, user=new())  # other bytes: not remembered
    calls = bench.calls()["total"]
    with contextlib.ExitStack() as stack:
        # The same caller at a proxy with the shipped bound, ten minutes, reads in the end and has all of it.
        patient = stack.enter_context(second(bench, tmp_path, **ROOM))
        late = stack.enter_context(not_reading(patient, asked(LARGE)))
        assert begun(late).startswith(b"HTTP/1.1 200 ")
        stalled = {name: stack.enter_context(not_reading(bench, body)) for name, body in bodies.items()}
        stalled["live"] = stack.enter_context(not_reading(bench, asked(f"{new()} {LARGE}", stream=True)))
        for name, client in stalled.items():
            assert begun(client).startswith(b"HTTP/1.1 200 "), name
        assert state(bench.chat()) == "miss stored"
        for name, client in stalled.items():
            eventually(lambda client=client: not held(bench, client), what=f"the connection is gone: {name}")
        assert held(patient, late)
        assert read(late, len(LARGE)) >= len(LARGE)
    assert bench.calls()["total"] == calls + 3  # those of `late`, `live` and the one that never noticed
    assert state(bench.chat()) == "miss stored"


def test_a_slow_client_of_a_hit_gets_all_of_it(bench: Bench) -> None:
    """Who reads, however slowly, is not cut off: meanwhile one that came before it and does not read is."""
    size = 7_500_000
    body = asked("x" * size)
    for expected in ("miss stored", "hit"):
        assert state(bench.http.post("/v1/chat/completions", json=body)) == expected
    with not_reading(bench, body) as stalled:
        assert begun(stalled)
        while True:  # once, unless this machine is so slow that the stalled one is still there
            with not_reading(bench, body) as client:
                # For 4.5 s, the last third of it from the kernel, which takes some 900 kB at a time from the proxy.
                assert read(client, size, pace=0.06) >= size
            if not held(bench, stalled):
                break

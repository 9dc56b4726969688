"""Reaction times of the model service: to a caller that disconnects, a costly grammar, a replica that is killed.

Sections of `make bench-engine`, over HTTP with a separate service. Each figure is the worst of several tries.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.report import BenchError
from bench.waiting import until

if TYPE_CHECKING:
    from bench.engine import Bench

TRIES = 10
LONG_TEXT = "the interest rate of the central bank rose again " * 20
INPUTS = 256
SCHEMA = {
    "anyOf": [
        {"type": "object", "title": str(i), "properties": {f"p{j}": {"type": "string"} for j in range(50)}}
        for i in range(5)
    ]
}


def leave(bench: Bench) -> None:
    """From a caller's disconnect to a free slot: for a chat stream, and for a batch of embeddings."""
    chat, encoder = (next(e.id for e in bench.entries if e.kind == kind) for kind in ("chat", "embedding"))
    # The tokens that end an answer are excluded.
    stream = {"model": chat, "stream": True, "max_tokens": 1900, "logit_bias": dict.fromkeys(bench.ends, -100),
              "messages": [{"role": "user", "content": "Tell a long story."}]}  # fmt: skip
    times = [_leave_stream(bench, stream) for _ in range(TRIES)]
    worst = max(times)
    bench.row("leave", "caller leaves a stream: its place is free", 1000 * worst, "ms",
              aim=("≤ 500", worst <= 0.5), note=f"median {1000 * statistics.median(times):.0f} ms")  # fmt: skip
    many = {"model": encoder, "input": [f"{n} {LONG_TEXT}" for n in range(INPUTS)]}
    one = {"model": encoder, "input": "a cat"}
    whole = _seconds(bench, "/v1/embeddings", many)
    _seconds(bench, "/v1/embeddings", one)
    times = [_leave_batch(bench, many, one, whole / 4) for _ in range(TRIES)]
    worst = max(times)
    bench.row("leave", f"caller leaves {INPUTS} long embedding inputs: next answer", 1000 * worst, "ms",
              aim=("≤ 500", worst <= 0.5), note=f"the {INPUTS} take {1000 * whole:.0f} ms")  # fmt: skip


def _leave_stream(bench: Bench, body: dict[str, Any]) -> float:
    with _sent(bench, "/v1/chat/completions", body) as caller:
        got = b""
        while b'"content":' not in got:
            if not (piece := caller.recv(65536)):
                raise BenchError(f"the stream broke off: {got[:200]!r}")
            got += piece
        until(lambda: _running(bench) == 1)
    began = time.perf_counter()
    until(lambda: _running(bench) == 0)
    return time.perf_counter() - began


def _leave_batch(bench: Bench, many: dict[str, Any], one: dict[str, Any], after: float) -> float:
    with _sent(bench, "/v1/embeddings", many):
        time.sleep(after)  # by then the batch is being computed
    return _seconds(bench, "/v1/embeddings", one)


def grammar(bench: Bench) -> None:
    """The longest wait between two tokens of a stream without schema while other answers follow a costly schema."""
    chat = next(e.id for e in bench.entries if e.kind == "chat")
    plain = {"model": chat, "stream": True, "max_tokens": 100, "temperature": 0,
             "messages": [{"role": "user", "content": "Count to one hundred in words."}]}  # fmt: skip
    bound = {"model": chat, "max_tokens": 60, "messages": [{"role": "user", "content": "Write JSON."}],
             "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}  # fmt: skip
    alone, beside = [], []
    for _ in range(bench.rounds):
        alone.append(_longest_gap(bench, plain))
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(_sent(bench, "/v1/chat/completions", bound))
            beside.append(_longest_gap(bench, plain))
        until(lambda: _running(bench) == 0)
    gap, usual = max(beside), statistics.median(alone)
    bench.row("grammar", "longest gap beside 4 answers of a costly schema", 1000 * gap, "ms",
              aim=("≤ 150", gap <= 0.15), note=f"alone {1000 * usual:.0f} ms")  # fmt: skip


def _longest_gap(bench: Bench, body: dict[str, Any]) -> float:
    """Seconds between two pieces of the stream; the first one does not count."""
    with _sent(bench, "/v1/chat/completions", body) as caller:
        got, last, longest = b"", 0.0, 0.0
        while b"[DONE]" not in got:
            piece = caller.recv(65536)
            now = time.perf_counter()
            if not piece:
                raise BenchError(f"the stream broke off: {got[-200:]!r}")
            got = got[-20:] + piece
            if b'"content":' in piece:
                longest = max(longest, now - last if last else 0.0)
                last = now
    return longest


def recover(bench: Bench) -> None:
    """From the end of the chat model's replica (SIGKILL) to its first answer."""
    chat = next(e.id for e in bench.entries if e.kind == "chat")
    body = {"model": chat, "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    _seconds(bench, "/v1/chat/completions", body)
    bench.replica(chat).kill()
    began = time.perf_counter()

    def answers() -> bool:
        with contextlib.suppress(OSError):
            _seconds(bench, "/v1/chat/completions", body)
            return True
        return False

    until(answers, seconds=120)
    back = time.perf_counter() - began
    bench.row("recover", "replica killed: the next answer", back, "s", aim=("≤ 60", back <= 60))


SECTIONS: dict[str, Callable[[Bench], None]] = {"leave": leave, "grammar": grammar, "recover": recover}


def _sent(bench: Bench, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which this request was sent."""
    data = json.dumps(body).encode()
    caller = socket.create_connection(("127.0.0.1", bench.service.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    caller.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return caller


def _seconds(bench: Bench, path: str, body: dict[str, Any]) -> float:
    request = urllib.request.Request(  # noqa: S310 - loopback
        bench.service.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
        answer.read()
    return time.perf_counter() - began


def _running(bench: Bench) -> int:
    with urllib.request.urlopen(bench.service.url + "/metrics", timeout=5) as answer:  # noqa: S310 - loopback
        shown = answer.read().decode()
    return sum(int(float(n)) for n in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)", shown, re.M))

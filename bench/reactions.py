"""How soon the proxy reacts: to a caller that leaves, a redis that stops, a flush, a revoked key, a deadline, a proxy
that is killed, callers that do not read.

Sections of `make bench-proxy`. Each figure is the worst of several tries; a try ends after TRY_SECONDS at the latest.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from bench.processes import Server
from bench.report import BenchError
from bench.waiting import until

if TYPE_CHECKING:
    from bench.proxy import Bench

TRY_SECONDS = 20.0
TRIES = 10
SLOW_STREAM = {"model": "gpt-slow", "stream": True, "messages": [{"role": "user", "content": "What is @@?"}]}
LATE = {"model": "gpt-late", "messages": [{"role": "user", "content": "What is @@?"}]}
MISS = {"model": "gpt-bench", "temperature": 0, "messages": [{"role": "user", "content": "What is @@?"}]}
INPUTS = 2048


def leave(bench: Bench) -> None:
    """From a caller's disconnect to the end of the upstream's call: during a stream, and during a JSON answer."""
    for name, body, wait_for in (("stream", SLOW_STREAM, b"data: "), ("JSON", LATE, b"")):
        times = [_leave(bench, body, wait_for) for _ in range(TRIES)]
        worst = max(times)
        note = f"median {1000 * statistics.median(times):.1f} ms of {TRIES}"
        bench.row("leave", f"caller leaves, {name}: upstream let go", 1000 * worst, "ms",
                  aim=("≤ 500 ms", worst <= 0.5), note=note)  # fmt: skip


def _leave(bench: Bench, body: dict[str, Any], wait_for: bytes) -> float:
    """Seconds. The caller disconnects when `wait_for` has arrived; if that is empty, when the upstream was called."""
    calls, left = _counts(bench)
    with _request(bench.proxy, body) as caller:
        got = b""
        while wait_for not in got:
            if not (piece := caller.recv(65536)):
                raise BenchError(f"the stream broke off: {got[:200]!r}")
            got += piece
        until(lambda: _counts(bench)[0] > calls)
        began = time.perf_counter()
    until(lambda: _counts(bench)[1] > left)
    return time.perf_counter() - began


def outage(bench: Bench) -> None:
    """Requests while redis is stopped (SIGSTOP), after it continues, and without redis."""
    store = bench.start_redis()
    with bench.proxy_with(store) as proxy:
        usual = statistics.median(_ask(proxy, MISS)[0] for _ in range(2 * TRIES))
        hit = orjson.loads(_fresh(MISS))
        _ask(proxy, hit)
        firsts, later, back = [], [], []
        for _ in range(3):
            store.popen.send_signal(signal.SIGSTOP)
            try:
                firsts.append(_ask(proxy, MISS)[0] - usual)
                later += [_ask(proxy, MISS)[0] - usual for _ in range(TRIES)]
            finally:
                store.popen.send_signal(signal.SIGCONT)
            began = time.perf_counter()
            until(lambda: "hit" in _ask(proxy, hit)[1])
            back.append(time.perf_counter() - began)
        first, middle, again = max(firsts), statistics.median(later), max(back)
        bench.row("outage", "redis stopped: first request, more than usual", 1000 * first, "ms",
                  aim=("≤ 100 ms", first <= 0.1), note=f"usual {1000 * usual:.1f} ms")  # fmt: skip
        bench.row("outage", "  later requests, more than usual, p50", 1000 * middle, "ms",
                  aim=("≤ 20 ms", middle <= 0.02))  # fmt: skip
        bench.row("outage", "  hits again after redis goes on", again, "s", aim=("≤ 5 s", again <= 5))
        store.popen.kill()
        store.popen.wait(5)
        gone = max(_ask(proxy, MISS)[0] for _ in range(TRIES))
        bench.row("outage", "redis killed: slowest request", 1000 * gone, "ms", aim=("≤ 500 ms", gone <= 0.5))


def changes(bench: Bench) -> None:
    """From a change at one proxy to its effect at another: two proxies with virtual keys and one redis."""
    admin = secrets.token_urlsafe(24)
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(bench.proxy_with(bench.redis, admin_key=admin)) for _ in range(2))
        pairs = [_change(one, two, admin) for _ in range(TRIES)]
    flushed, revoked = zip(*pairs, strict=True)
    for name, times in (("a flush reaches the other proxy", flushed), ("a revoked key is refused there", revoked)):
        worst = max(times)
        bench.row("changes", name, 1000 * worst, "ms", aim=("≤ 1,000 ms", worst <= 1),
                  note=f"median {1000 * statistics.median(times):.0f} ms of {TRIES}")  # fmt: skip


def _change(one: Server, two: Server, admin: str) -> tuple[float, float]:
    """Seconds until the second proxy applies a flush, and until it refuses a key that was revoked."""
    made = _call(one, "POST", "/admin/keys", admin, {"owner": "bench"})
    key = made["key"]
    body = orjson.loads(_fresh(MISS))
    _ask(two, body, key)
    until(lambda: "hit" in _ask(two, body, key)[1])
    began = time.perf_counter()
    _call(one, "POST", "/cache/flush", key, {})
    until(lambda: "hit" not in _ask(two, body, key)[1])
    flushed = time.perf_counter() - began
    began = time.perf_counter()
    _call(one, "DELETE", f"/admin/keys/{made['id']}", admin)
    until(lambda: _status(two, body, key) == 401)
    return flushed, time.perf_counter() - began


def deadline(bench: Bench) -> None:
    """A caller's deadline of 100 ms with an upstream that takes 5 s."""
    late = [_late(bench) - 0.1 for _ in range(TRIES)]
    worst = max(late)
    bench.row("deadline", "a deadline's answer, after the deadline", 1000 * worst, "ms",
              aim=("≤ 500 ms", worst <= 0.5))  # fmt: skip


def _late(bench: Bench) -> float:
    began = time.perf_counter()
    status = _status(bench.proxy, orjson.loads(_fresh(LATE)), headers={"x-request-timeout-ms": "100"})
    if status != 504:
        raise BenchError(f"a request past its deadline was answered {status}")
    return time.perf_counter() - began


def inputs(bench: Bench) -> None:
    """One embedding request with many inputs, all of them new."""
    body = {"model": "text-embedding-bench", "input": [f"{secrets.token_hex(8)} {n}" for n in range(INPUTS)]}
    began = time.perf_counter()
    _call(bench.proxy, "POST", "/v1/embeddings", "", body)
    first = time.perf_counter() - began
    began = time.perf_counter()
    _call(bench.proxy, "POST", "/v1/embeddings", "", body)
    again = time.perf_counter() - began
    bench.row("inputs", f"{INPUTS:,} embedding inputs, all new", 1000 * first, "ms", aim=("≤ 2,000 ms", first <= 2))
    bench.row("inputs", f"{INPUTS:,} embedding inputs, all cached", 1000 * again, "ms", aim=("≤ 1,000 ms", again <= 1))


def takeover(bench: Bench) -> None:
    """Two proxies wait for the same answer; the one that called the upstream is killed (SIGKILL)."""
    times = []
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            leader, follower = (stack.enter_context(bench.proxy_with(bench.redis)) for _ in range(2))
            # 5 s until the first byte: the follower has sent nothing yet, so it may call the upstream itself.
            body = orjson.loads(_fresh(LATE | {"temperature": 0}))
            calls, _left = _counts(bench)
            first = stack.enter_context(_request(leader, body))
            until(partial(_called, bench, calls + 1))
            second = stack.enter_context(_request(follower, body))
            time.sleep(0.5)
            if _counts(bench)[0] != calls + 1:
                raise BenchError("the second proxy called the upstream too")
            leader.popen.kill()
            began = time.perf_counter()
            until(partial(_called, bench, calls + 2))
            times.append(time.perf_counter() - began)
            leader.popen.wait(5)
            if b" 200 " not in second.recv(65536)[:20]:
                raise BenchError("the second proxy's caller got no answer")
            first.close()
    worst = max(times)
    bench.row("takeover", "proxy killed: another asks the upstream", worst, "s", aim=("≤ 3 s", worst <= 3),
              note=f"median {statistics.median(times):.1f} s of {len(times)}")  # fmt: skip


def stalled(bench: Bench) -> None:
    """Hits of one caller while 50 others have requested a stream of 64 events, 100 times each, and read nothing."""
    hit = orjson.loads(_fresh(MISS))
    stream = orjson.loads(_fresh(MISS | {"stream": True}))
    for body in (hit, stream):
        _ask(bench.proxy, body)
    asked = [_ask(bench.proxy, hit)[0] for _ in range(20 * TRIES)]
    usual = statistics.median(asked[10 * TRIES :])  # the first ones warm up
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            caller = stack.enter_context(_request(bench.proxy, stream))
            with contextlib.suppress(TimeoutError):
                caller.settimeout(0.2)
                for _ in range(99):
                    caller.sendall(_head(stream))
        beside = statistics.median(_ask(bench.proxy, hit)[0] for _ in range(10 * TRIES))
    ratio = beside / usual
    bench.row("stalled", "hit beside 50 callers that read nothing, times usual", ratio, "",
              aim=("≤ 2", ratio <= 2), note=f"usual {1000 * usual:.2f} ms")  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "leave": leave, "outage": outage, "changes": changes, "deadline": deadline, "inputs": inputs,
    "takeover": takeover, "stalled": stalled,
}  # fmt: skip


# ---- requests over sockets


def _fresh(body: dict[str, Any]) -> bytes:
    return orjson.dumps(body).replace(b"@@", secrets.token_hex(8).encode())


def _head(body: dict[str, Any]) -> bytes:
    """The bytes of one chat request."""
    data = _fresh(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def _request(to: Server, body: dict[str, Any]) -> socket.socket:
    """A connection on which this chat request was sent."""
    caller = socket.create_connection(("127.0.0.1", to.port), timeout=TRY_SECONDS)
    caller.sendall(_head(body))
    return caller


def _counts(bench: Bench) -> tuple[int, int]:
    """Number of calls that the mock received, and of those whose caller disconnected."""
    with urllib.request.urlopen(f"{bench.upstream.url}/calls", timeout=5) as answer:  # noqa: S310 - loopback
        reply = json.load(answer)
    return int(reply["total"]), int(reply["left"])


def _called(bench: Bench, times: int) -> bool:
    return _counts(bench)[0] >= times


@contextlib.contextmanager
def _opened(
    to: Server, method: str, path: str, key: str, *, body: Any, headers: dict[str, str] | None = None
) -> Iterator[Any]:
    sent = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}) | (headers or {})
    data = _fresh(body) if body is not None else None
    request = urllib.request.Request(to.url + path, data=data, headers=sent, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=TRY_SECONDS) as answer:  # noqa: S310 - loopback
        yield answer


def _call(to: Server, method: str, path: str, key: str, body: Any = None) -> Any:
    try:
        with _opened(to, method, path, key, body=body) as answer:
            raw = answer.read()
    except urllib.error.HTTPError as error:
        raise BenchError(f"{method} {path} was answered {error.code}: {error.read()[:200]!r}") from None
    return json.loads(raw) if raw else None


def _ask(to: Server, body: dict[str, Any], key: str = "") -> tuple[float, str]:
    """Seconds and Cache-Status of one chat request."""
    began = time.perf_counter()
    with _opened(to, "POST", "/v1/chat/completions", key, body=body) as answer:
        answer.read()
        return time.perf_counter() - began, str(answer.headers.get("cache-status", ""))


def _status(to: Server, body: dict[str, Any], key: str = "", headers: dict[str, str] | None = None) -> int:
    try:
        with _opened(to, "POST", "/v1/chat/completions", key, body=body, headers=headers) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code

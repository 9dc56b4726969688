"""The processes that are measured: each has a free port of loopback and its own log."""

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

END_SECONDS = 30  # timeout for the end of a process; Ray's processes need a few seconds


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
        """The process and its descendants."""
        own = psutil.Process(self.popen.pid)
        return [own, *own.children(recursive=True)]

    def memory(self) -> int:
        """Resident bytes of the process and its descendants."""
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
    """Command line or title of a process; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def cpu_seconds(process: psutil.Process) -> float | None:
    """CPU seconds of a process so far; None if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on(cores: str) -> list[str]:
    """Prefix of a command that pins it to these cores; empty if cores cannot be chosen."""
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
    """Start a process, and end it at the end of the block.

    It has started when its port accepts connections, or when it answers `ready`, a path, with 200. Settings of the lab
    in this process's environment are not passed on. Raises BenchError with the end of its log.
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

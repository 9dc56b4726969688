"""Requests of each model's replicas, reported to the process that decides which models stay in memory.

Each replica writes to 16 bytes of shared memory, one file in a folder of this machine, because a call to the replica
would wait for its work. The engines' queues are read from the gauges that the replicas keep there. Knows ASGI and
files. Knows nothing of models.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Receive, Scope, Send

QUEUE_GAUGES = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}  # of api.generator
_FIELDS = struct.Struct("<qd")  # running requests, unix time of the last start or end


class Activity(NamedTuple):
    """running: requests. last: unix time of the last request's start or end; 0: none yet."""

    running: int
    last: float


class ObservedApp:
    """`app`, whose requests are counted."""

    def __init__(self, app: ASGIApp, folder: Path, model: str) -> None:
        self._app, self._running = app, 0
        with (folder / f"{model}.{os.getpid()}.activity").open("wb+") as file:
            file.write(bytes(_FIELDS.size))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), _FIELDS.size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        self._change(1)
        try:
            await self._app(scope, receive, send)
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._running += by
        _FIELDS.pack_into(self._memory, 0, self._running, time.time())


def read_activity(folder: Path, model: str) -> Activity:
    """Activity of all living replicas of a model."""
    running, last = 0, 0.0
    for path in folder.glob(f"{model}.*.activity"):
        pid = path.name.removeprefix(f"{model}.").removesuffix(".activity")
        if not pid.isdigit():  # of a model whose id begins like this one's
            continue
        if not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)
            continue
        data = path.read_bytes()
        if len(data) == _FIELDS.size:
            own, when = _FIELDS.unpack(data)
            running, last = running + own, max(last, when)
    return Activity(running, last)


def read_queues(folder: Path) -> dict[str, dict[str, int]]:
    """`running` and `waiting` requests of each model's engines, by the model's id, at most half a second old; only of
    living replicas. Models without such an engine are not in it."""
    files = [
        str(path) for path in folder.glob("gauge_livesum_*.db") if psutil.pid_exists(int(path.stem.split("_")[-1]))
    ]
    found: dict[str, dict[str, int]] = {}
    for metric in MultiProcessCollector.merge(files):  # type: ignore[no-untyped-call]
        if name := QUEUE_GAUGES.get(metric.name):
            for sample in metric.samples:
                found.setdefault(sample.labels["model_name"], {})[name] = int(sample.value)
    return found


def processes(folder: Path, model: str) -> list[int]:
    """Process ids of a model's living replicas."""
    files = folder.glob(f"{model}.*.activity")
    found = [path.name.removeprefix(f"{model}.").removesuffix(".activity") for path in files]
    return [int(pid) for pid in found if pid.isdigit() and psutil.pid_exists(int(pid))]

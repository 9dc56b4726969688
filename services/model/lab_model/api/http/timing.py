"""When each request to the engine was queued, prefilled and decoded, by its call id: now and for some minutes.

Each process writes to a ring of fixed slots, one file in a folder that all processes of this machine share, as `usage`
does. Writing one moment copies 8 bytes. Knows ids and moments. Knows nothing of models or of the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Moment = Literal["received", "queue", "prefill", "decode", "end"]
MOMENTS: tuple[Moment, ...] = ("received", "queue", "prefill", "decode", "end")  # in the order of a request
PHASES = ("prepare", "queue", "prefill", "decode")  # that begin with the first four
PREFIX, SUFFIX = "/v1/requests/", "/timing"  # of the path, around the id
SLOTS = 4096  # in each process
KEPT_SECONDS = 300.0
_SLOT = struct.Struct("<16s5d")  # the id's digest, and each moment as time.monotonic(), 0: not reached
_TIMES = struct.Struct("<5d")
_TIME = struct.Struct("<d")
_EMPTY = bytes(16)


class Timeline:
    """The moments of one request. They may be marked in any thread."""

    def __init__(self, memory: mmap.mmap | None, at: int, digest: bytes) -> None:
        self._memory, self._at, self._digest = memory, at, digest

    def mark(self, moment: Moment) -> None:
        """Of several choices the first to reach `moment` counts."""
        memory, at = self._memory, self._at
        if memory is None or memory[at : at + 16] != self._digest:  # the slot is another request's by now
            return
        place = at + 16 + 8 * MOMENTS.index(moment)
        if not _TIME.unpack_from(memory, place)[0]:
            _TIME.pack_into(memory, place, time.monotonic())

    def moments(self) -> tuple[float, ...]:
        """Each of MOMENTS as time.monotonic(), 0: not reached. All 0 where the slot is another request's by now."""
        memory, at = self._memory, self._at
        if memory is None or memory[at : at + 16] != self._digest:
            return (0.0,) * len(MOMENTS)
        return _TIMES.unpack_from(memory, at + 16)


class TimingRing:
    """This process's ring; until it is opened nothing is recorded."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._next = 0

    def open(self, folder: Path) -> None:
        """Record requests from now on in a file that `find` reads; in none if the disk has no room."""
        try:
            path = folder / f"{os.getpid()}-{time.time_ns()}.timing"
            with path.open("x+b") as file:
                # Not a sparse file: on a full disk the first write to it would end the process by a signal.
                file.write(bytes(SLOTS * _SLOT.size))
                file.flush()
                self._memory = mmap.mmap(file.fileno(), SLOTS * _SLOT.size)
        except OSError as error:
            log.warning("phases of requests cannot be recorded: %s", error)

    def begin(self, id_: str, received: float) -> Timeline:
        """A request that was received at `received`, as time.monotonic()."""
        digest, at = _digest(id_), self._next * _SLOT.size
        if self._memory is not None:
            self._next = (self._next + 1) % SLOTS
            self._memory[at : at + 16] = _EMPTY  # a reader must not find half of it
            _TIMES.pack_into(self._memory, at + 16, received, 0.0, 0.0, 0.0, 0.0)
            self._memory[at : at + 16] = digest
        return Timeline(self._memory, at, digest)


def find(folder: Path, id_: str) -> dict[str, Any] | None:
    """The phases of a request that was received within KEPT_SECONDS or still runs, see `phases`; None: not known here.
    Reads files: call it in a thread."""
    digest, now = _digest(id_), time.monotonic()
    latest: tuple[float, ...] | None = None
    for path in folder.glob("*.timing"):
        with contextlib.suppress(OSError):
            ring = path.read_bytes()
            at = ring.find(digest)
            while at >= 0:
                if at % _SLOT.size == 0:
                    found = _TIMES.unpack_from(ring, at + 16)
                    latest = found if latest is None else max(latest, found)
                at = ring.find(digest, at + 1)
    if latest is None or (latest[-1] and latest[-1] < now - KEPT_SECONDS):
        return None
    return {"id": id_, **phases(latest, now)}


def id_of(path: str) -> str:
    """The id in a path like /v1/requests/<id>/timing; empty in others."""
    return path.removeprefix(PREFIX).removesuffix(SUFFIX) if path.endswith(SUFFIX) else ""


def phases(moments: Sequence[float], now: float) -> dict[str, Any]:
    """`phases`: name, start_ms and ms of each phase that was reached, without gaps, in milliseconds since the request
    was received; the last one until `now` while the request runs. `state`: its name, or `ended`.

    moments: of MOMENTS, in seconds, 0: not reached.
    """
    *begins, end = moments
    reached = [(name, begin) for name, begin in zip(PHASES, begins, strict=True) if begin]
    start, found = moments[0], []
    for place, (name, begin) in enumerate(reached):
        until = reached[place + 1][1] if place + 1 < len(reached) else end or now
        found.append({"name": name, "start_ms": _ms(begin - start), "ms": _ms(max(0.0, until - begin))})
    return {"state": "ended" if end else reached[-1][0], "phases": found}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _digest(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode("utf-8", "replace"), digest_size=16).digest()

"""Tokens used by each ended request, by its id. The proxy reads them to bill interrupted requests.

Each process writes to a ring buffer of fixed slots, one file in a folder that all processes of this machine share.
Number and age are bounded, and the file of a killed process remains. Complete requests are in it too: a client that
disconnects during the last byte cannot know that its answer was complete. Writing one request copies 40 bytes in
memory. Knows ids and token counts. Knows nothing of models or HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

log = logging.getLogger(__name__)

SLOTS = 16_384  # in each process
KEPT_SECONDS = 900.0
_SLOT = struct.Struct("<16sdIII4x")  # the id's digest, unix time, prompt, completion, cached
_NUMBERS = struct.Struct("<dIII")
_EMPTY = bytes(16)


class TokenUsage(NamedTuple):
    """Tokens. cached: those of the prompt that came from the prefix cache."""

    prompt: int
    completion: int
    cached: int


class UsageRing:
    """This process's ring; until it is opened nothing is recorded."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._next = 0

    def open(self, folder: Path) -> None:
        """Record requests that end from now on, in a file that `find` reads. Records nothing if the disk is full."""
        try:
            path = folder / f"{os.getpid()}-{time.time_ns()}.tally"
            with path.open("x+b") as file:
                # Not a sparse file: on a full disk the first write to it would end the process by a signal.
                file.write(bytes(SLOTS * _SLOT.size))
                file.flush()
                self._memory = mmap.mmap(file.fileno(), SLOTS * _SLOT.size)
        except OSError as error:
            log.warning("usage of interrupted requests cannot be recorded: %s", error)

    def put(self, id_: str, used: TokenUsage) -> None:
        """Record the usage of a request that has ended."""
        if self._memory is None:
            return
        at = self._next * _SLOT.size
        self._next = (self._next + 1) % SLOTS
        self._memory[at : at + 16] = _EMPTY  # a reader must not find a half-written slot
        _NUMBERS.pack_into(self._memory, at + 16, time.time(), *used)
        self._memory[at : at + 16] = _digest(id_)


def forget_dead(folder: Path) -> None:
    """Remove files of processes that have ended: gauges of prometheus_client, which are no longer valid, and rings with
    no slot that `find` would return. Reads files: call it in a thread."""
    for path in folder.glob("gauge_live*_*.db"):
        if not _alive(path.stem.rpartition("_")[2]):
            path.unlink(missing_ok=True)
    for path in folder.glob("*.timing"):  # its requests have no end
        if not _alive(path.name.partition("-")[0]):
            path.unlink(missing_ok=True)
    for path in folder.glob("*.tally"):
        with contextlib.suppress(OSError):
            if _alive(path.name.partition("-")[0]):
                continue
            newest = max(when for _, when, *_ in _SLOT.iter_unpack(path.read_bytes()))
            if newest < time.time() - KEPT_SECONDS:
                path.unlink()


def _alive(pid: str) -> bool:
    return not pid.isdecimal() or psutil.pid_exists(int(pid))


def find(folder: Path, ids: Iterable[str]) -> dict[str, TokenUsage]:
    """Usage of those of `ids` that ended within KEPT_SECONDS. Reads files: call it in a thread."""
    rings = []
    for path in folder.glob("*.tally"):
        with contextlib.suppress(OSError):
            rings.append(path.read_bytes())
    oldest = time.time() - KEPT_SECONDS
    found = {}
    for id_ in ids:
        latest = max((each for ring in rings for each in _slots(ring, _digest(id_))), default=None)
        if latest is not None and latest[0] > oldest:
            found[id_] = latest[1]
    return found


def _slots(ring: bytes, digest: bytes) -> Iterable[tuple[float, TokenUsage]]:
    at = ring.find(digest)
    while at >= 0:
        if at % _SLOT.size == 0:
            when, *used = _NUMBERS.unpack_from(ring, at + 16)
            yield when, TokenUsage(*used)
        at = ring.find(digest, at + 1)


def _digest(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode("utf-8", "replace"), digest_size=16).digest()

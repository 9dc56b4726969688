"""What each request that has ended really used, for who asks by its id: also for one that broke off.

Each process writes into a ring of fixed slots, one file in a folder that all processes of this machine share: bounded
in number and age, and a process that was killed leaves its own behind. Whole requests are in it too: who left while the
last byte was on its way does not know that its answer was whole. To write one is a copy of 40 bytes in memory.
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

log = logging.getLogger(__name__)

SLOTS = 16_384  # in each process
KEPT_SECONDS = 900.0
_SLOT = struct.Struct("<16sdIII4x")  # the id's digest, unix time, prompt, completion, cached
_NUMBERS = struct.Struct("<dIII")
_NOBODY = bytes(16)


class Used(NamedTuple):
    """Tokens. `cached`: those of the prompt that were not computed again."""

    prompt: int
    completion: int
    cached: int


class Tally:
    """This process's ring; until it is opened nothing is kept."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._next = 0

    def open(self, folder: Path) -> None:
        """Keep what ends from now on where `find` looks. Without room on the disk: nowhere."""
        try:
            path = folder / f"{os.getpid()}-{time.time_ns()}.tally"
            with path.open("x+b") as file:
                # Not a file with holes: a full disk would be a signal that ends the process, at the first write.
                file.write(bytes(SLOTS * _SLOT.size))
                file.flush()
                self._memory = mmap.mmap(file.fileno(), SLOTS * _SLOT.size)
        except OSError as error:
            log.warning("what requests used that break off will not be told: %s", error)

    def put(self, id_: str, used: Used) -> None:
        """A request has ended, and used no more than this."""
        if self._memory is None:
            return
        at = self._next * _SLOT.size
        self._next = (self._next + 1) % SLOTS
        self._memory[at : at + 16] = _NOBODY  # nobody may find half of it
        _NUMBERS.pack_into(self._memory, at + 16, time.time(), *used)
        self._memory[at : at + 16] = _digest(id_)


def find(folder: Path, ids: Iterable[str]) -> dict[str, Used]:
    """What those of `ids` used that have ended not long ago. Reads files: call it in a thread."""
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


def _slots(ring: bytes, digest: bytes) -> Iterable[tuple[float, Used]]:
    at = ring.find(digest)
    while at >= 0:
        if at % _SLOT.size == 0:
            when, *used = _NUMBERS.unpack_from(ring, at + 16)
            yield when, Used(*used)
        at = ring.find(digest, at + 1)


def _digest(id_: str) -> bytes:
    return hashlib.blake2b(id_.encode("utf-8", "replace"), digest_size=16).digest()

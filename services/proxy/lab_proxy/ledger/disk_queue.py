"""Ledger batches on disk while redis does not accept them: one file for each writer, one batch a line, in order.

A writer locks its file while it runs; the next start adopts the files that are not locked. Knows batches of rows; not
what is in a row.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

log = logging.getLogger("lab_proxy.ledger")

Row = tuple[str, str, str, str, str, list[int]]  # day, key, owner, upstream, model, metrics


class DiskQueueFull(Exception):  # noqa: N818 - as in errors
    """The batch is not on disk."""


@dataclass(frozen=True, slots=True)
class LedgerBatch:
    """Rows that are booked together, once: `number` grows for each `writer`; redis keeps the last one it booked."""

    writer: str
    number: int
    rows: list[Row]


class DiskQueue:
    """One file of batches. Its methods block on the disk: call them in a thread."""

    def __init__(self, folder: Path, writer: str, max_bytes: int) -> None:
        self.writer = writer
        self._path = folder / f"ledger-{writer}.jsonl"
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._read = 0  # bytes of booked batches

    @classmethod
    def orphans(cls, folder: Path, max_bytes: int) -> Iterator[DiskQueue]:
        """The files of ended writers, now locked by this process."""
        for path in sorted(folder.glob("ledger-*.jsonl"), key=lambda each: each.name):
            queue = cls(folder, path.stem.removeprefix("ledger-"), max_bytes)
            try:
                file = path.open("r+b")
            except OSError:
                log.error("ledger: %s cannot be read: its batches are not booked", path.name)  # noqa: TRY400 one line
                continue
            if not _lock(file) or not path.exists():  # its writer runs, or another process has just booked it
                file.close()
                continue
            queue._file = file
            yield queue

    @property
    def empty(self) -> bool:
        return self._file is None or self._read >= os.fstat(self._file.fileno()).st_size

    def append(self, batch: LedgerBatch) -> None:
        """Write the batch to disk. Raises DiskQueueFull, or OSError."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
            self._file = os.fdopen(descriptor, "r+b")
            _lock(self._file)
        line = orjson.dumps({"number": batch.number, "rows": batch.rows}) + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        if end + len(line) > self._max_bytes:
            raise DiskQueueFull
        try:
            self._file.write(line)
            self._file.flush()
        except OSError:  # the disk is full: a partial line must not precede the next one
            self._file.truncate(end)
            raise
        os.fsync(self._file.fileno())

    def first(self) -> tuple[LedgerBatch | None, int]:
        """The first batch that is not booked, and its end. None for a partial line (after a crash)."""
        assert self._file is not None  # noqa: S101 only called while not empty
        self._file.seek(self._read)
        line = self._file.readline()
        end = self._read + len(line)
        try:
            parsed: dict[str, Any] = orjson.loads(line)
            rows: list[Row] = [(*map(str, row[:5]), [int(n) for n in row[5]]) for row in parsed["rows"]]  # type: ignore[misc]
            return LedgerBatch(self.writer, int(parsed["number"]), rows), end
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, IndexError):
            log.error("ledger: a partial line of %s is not booked", self._path.name)  # noqa: TRY400 one line
            return None, end

    def acknowledge(self, end: int) -> None:
        """Redis has booked everything up to `end`."""
        self._read = end
        if self.empty and self._file is not None:
            self._file.truncate(0)
            self._read = 0

    def close(self, *, remove: bool) -> None:
        """Close the file; `remove` deletes it."""
        if self._file is None:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

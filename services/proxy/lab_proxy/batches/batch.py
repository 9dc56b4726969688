"""One batch on disk: its state, its files, and how it is created. Knows files of an owner; not requests or HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

import orjson

from ..errors import BatchNotFound, ProxyError
from .files import DAY, FileStore, write

WINDOW = "24h"
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
ID = re.compile(r"batch_[0-9a-f]{32}")
_NULL_FIELDS = ("cancelled_at", "cancelling_at", "completed_at", "error_file_id", "errors", "expired_at", "failed_at",
                "finalizing_at", "in_progress_at", "model", "output_file_id", "usage")  # fmt: skip


class BatchFolder:
    """The files of one batch, beside its owner's files."""

    def __init__(self, home: Path, batch_id: str) -> None:
        self.home = home
        self.id = batch_id
        self.state = home / f"{batch_id}.json"
        self.input = home / f"{batch_id}.input"
        self.journal = home / f"{batch_id}.journal"
        self.cancel = home / f"{batch_id}.cancel"
        self.open = home.parent / "open" / batch_id  # exists while the batch is not final; holds the name of `home`

    @classmethod
    def find(cls, home: Path, batch_id: str) -> BatchFolder:
        """Raises BatchNotFound for a malformed id."""
        if not ID.fullmatch(batch_id):
            raise BatchNotFound(f"There is no batch {batch_id[:80]} here.", param="batch_id")
        return cls(home, batch_id)

    def load(self) -> dict[str, Any]:
        """`batch` (the wire object) and private fields. Raises BatchNotFound."""
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            loaded: dict[str, Any] = orjson.loads(self.state.read_bytes())
            return loaded
        raise BatchNotFound(f"There is no batch {self.id[:80]} here.", param="batch_id")

    def public(self) -> dict[str, Any]:
        """The wire object, including a cancellation that its worker has not seen yet."""
        batch: dict[str, Any] = self.load()["batch"]
        if batch["status"] not in FINAL:
            with contextlib.suppress(OSError):
                batch |= {"cancelling_at": int(self.cancel.stat().st_mtime), "status": "cancelling"}
        return batch

    def close(self) -> None:
        for path in (self.open, self.input, self.journal, self.cancel):
            path.unlink(missing_ok=True)


def new_state(
    *, owner: str, key_id: str | None, endpoint: str, file_id: str, metadata: Any, kept: int
) -> dict[str, Any]:
    """The state of a new batch. `kept`: seconds that its output files are kept."""
    now = int(time.time())
    batch = {
        "id": f"batch_{secrets.token_hex(16)}",
        "object": "batch",
        "endpoint": endpoint,
        "input_file_id": file_id,
        "completion_window": WINDOW,
        "status": "validating",
        "created_at": now,
        "expires_at": now + DAY,
        "metadata": metadata,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    } | dict.fromkeys(_NULL_FIELDS)
    return {
        "batch": batch,
        "owner": owner,
        "key_id": key_id,
        "kept": kept,
        "output": f"file-{secrets.token_hex(16)}",
        "errors": f"file-{secrets.token_hex(16)}",
    }


def create(files: FileStore, home: Path, state: dict[str, Any]) -> None:
    """Write a new batch to disk. It links its input, whose file may be deleted. The `open` mark comes last."""
    batch = state["batch"]
    folder = BatchFolder(home, str(batch["id"]))
    content = files.content(home, str(batch["input_file_id"]))
    try:
        os.link(content, folder.input)
    except OSError:  # a disk without links
        shutil.copyfile(content, folder.input)
    write(folder.state, orjson.dumps(state))
    folder.open.parent.mkdir(mode=0o700, exist_ok=True)
    write(folder.open, home.name.encode())


def list_batches(home: Path) -> list[dict[str, Any]]:
    """An owner's batches, the newest first."""
    found = []
    for path in home.glob("batch_*.json"):
        with contextlib.suppress(ProxyError):
            found.append(BatchFolder(home, path.stem).public())
    return sorted(found, key=lambda each: (each["created_at"], each["id"]), reverse=True)


def count_open(home: Path) -> int:
    return sum(1 for _ in home.glob("batch_*.input"))

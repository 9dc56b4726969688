"""One batch on disk: its state, its files, its creation. Knows the files of an owner; knows no requests and no HTTP."""

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
    """The files of one batch, in the folder of its owner's files."""

    def __init__(self, home: Path, batch_id: str) -> None:
        self.home = home
        self.id = batch_id
        self.state = home / f"{batch_id}.json"
        self.input = home / f"{batch_id}.input"
        self.journal = home / f"{batch_id}.journal"
        self.cancel = home / f"{batch_id}.cancel"
        self.open = home.parent / "open" / batch_id  # exists while the batch is not final; holds the name of `home`

    def load(self) -> dict[str, Any]:
        """`batch` (the wire object) and private fields. Raises BatchNotFound, also for a malformed id."""
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            if ID.fullmatch(self.id):
                loaded: dict[str, Any] = orjson.loads(self.state.read_bytes())
                return loaded
        raise BatchNotFound(f"Batch {self.id[:80]} does not exist.", param="batch_id")

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


def create(
    files: FileStore, owner: str, key_id: str | None, *, endpoint: str, file_id: str, metadata: Any, kept: int
) -> dict[str, Any]:
    """Write a new batch to disk and return its wire object. `kept`: seconds for which its output files are kept. The
    batch has a hard link to its input, so that the input file can be deleted. The `open` mark is written last."""
    now, home = int(time.time()), files.home(owner)
    folder = BatchFolder(home, f"batch_{secrets.token_hex(16)}")
    batch = {
        "id": folder.id,
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
    state = {"batch": batch, "owner": owner, "key_id": key_id, "kept": kept}
    state |= {name: f"file-{secrets.token_hex(16)}" for name in ("output", "errors")}
    content = files.content(home, file_id)
    try:
        os.link(content, folder.input)
    except OSError:  # a file system without hard links
        shutil.copyfile(content, folder.input)
    write(folder.state, orjson.dumps(state))
    folder.open.parent.mkdir(mode=0o700, exist_ok=True)
    write(folder.open, home.name.encode())
    return batch


def list_batches(home: Path) -> list[dict[str, Any]]:
    """An owner's batches, the newest first."""
    found = []
    for path in home.glob("batch_*.json"):
        with contextlib.suppress(ProxyError):
            found.append(BatchFolder(home, path.stem).public())
    return sorted(found, key=lambda each: (each["created_at"], each["id"]), reverse=True)

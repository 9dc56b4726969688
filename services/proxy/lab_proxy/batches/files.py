"""Files on disk, uploaded for batches or written by them, with OpenAI's file objects.

Each owner has a folder, named by a hash, so that other owners' files cannot be found. A file exists as soon as its
description exists, which is written last. Knows nothing of the content.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from ..errors import InvalidRequest, StorageFull, UploadNotFound
from ..settings import Settings

log = logging.getLogger("lab_proxy.files")

DAY = 86_400
KEPT_SECONDS = 30 * DAY  # OpenAI's default for files of batches, and its maximum
MIN_KEPT_SECONDS = 3600
MAX_FILES = 2_000  # files of one owner

_ID = re.compile(r"file-[0-9a-f]{32}")


class FileStore:
    """The folder of all files. Its methods block on the disk: call the slow ones in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.files_folder
        self.max_bytes, self.max_total_bytes = settings.files_max_bytes, settings.files_total_bytes

    def home(self, owner: str) -> Path:
        """The owner's folder; it may not exist yet."""
        return self.root / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def content(self, home: Path, file_id: str) -> Path:
        return home / f"{file_id}.jsonl"

    def draft(self, home: Path) -> tuple[BinaryIO, Path]:
        """An open file without a final name, readable by this user only, on the same disk."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=home)
        return os.fdopen(descriptor, "wb"), Path(name)

    def add(
        self, home: Path, draft: Path, *, filename: str, purpose: str, kept: int = KEPT_SECONDS, name: str = ""
    ) -> dict[str, Any]:
        """Turn a draft into a file and return its object. `name`: an id that was chosen before."""
        file_id = name or f"file-{secrets.token_hex(16)}"
        now = int(time.time())
        made = {"id": file_id, "object": "file", "bytes": draft.stat().st_size, "created_at": now,
                "expires_at": now + kept, "filename": filename, "purpose": purpose, "status": "processed",
                "status_details": None}  # fmt: skip
        draft.replace(self.content(home, file_id))
        write(home / f"{file_id}.json", orjson.dumps(made))
        return made

    def find(self, home: Path, file_id: str) -> dict[str, Any]:
        """A file's object. Raises UploadNotFound, also for files of other owners."""
        if _ID.fullmatch(file_id):
            with contextlib.suppress(OSError, orjson.JSONDecodeError):
                found: dict[str, Any] = orjson.loads((home / f"{file_id}.json").read_bytes())
                if found["expires_at"] > time.time():
                    return found
        raise UploadNotFound(f"File {file_id[:80]} does not exist.", param="file_id")

    def listed(self, home: Path) -> list[dict[str, Any]]:
        """The owner's files, the oldest first."""
        found = []
        for path in home.glob("file-*.json"):
            with contextlib.suppress(UploadNotFound):
                found.append(self.find(home, path.stem))
        return sorted(found, key=lambda each: (each["created_at"], each["id"]))

    def remove(self, home: Path, file_id: str) -> None:
        self.find(home, file_id)
        self._unlink(home, file_id)

    def _unlink(self, home: Path, file_id: str) -> None:
        (home / f"{file_id}.json").unlink(missing_ok=True)
        self.content(home, file_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove expired files, and drafts of killed processes."""
        for path in self.root.glob("*/file-*.json"):
            try:
                self.find(path.parent, path.stem)
            except UploadNotFound:
                self._unlink(path.parent, path.stem)
        for path in self.root.glob("*/.draft-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - DAY:
                    path.unlink()

    def room(self, home: Path, size: int) -> None:
        """Raises StorageFull if a file of `size` bytes would exceed the owner's limits."""
        files = self.listed(home)
        if len(files) >= MAX_FILES or sum(each["bytes"] for each in files) + size > self.max_total_bytes:
            raise StorageFull(
                f"Your storage is full: at most {MAX_FILES} files with {self.max_total_bytes} bytes in total "
                "(PROXY_FILES_TOTAL_BYTES). Delete some files."
            )


def write(path: Path, data: bytes) -> None:
    """Write atomically: readers, and a restart after a crash, see the old or the new content."""
    draft = path.with_name(f".draft-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            out.write(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk() -> Iterator[None]:
    """Maps errors of the disk to StorageFull."""
    try:
        yield
    except OSError as error:
        log.warning("files cannot be written: %s", error.strerror)
        why = "The file cannot be written: the operator's log has the reason (PROXY_FILES_DIR)."
        raise StorageFull(why, status=507) from None


def lifetime(given: Any, name: str) -> int:
    """Seconds of an `expires_after` object. Raises InvalidRequest."""
    if given is None:
        return KEPT_SECONDS
    if isinstance(given, dict) and set(given) == {"anchor", "seconds"} and given["anchor"] == "created_at":
        seconds = given["seconds"]
        if type(seconds) is int and MIN_KEPT_SECONDS <= seconds <= KEPT_SECONDS:
            return seconds
    why = f"must be an object with `anchor: created_at` and `seconds` from {MIN_KEPT_SECONDS} to {KEPT_SECONDS}."
    raise InvalidRequest(f"`{name}` {why}", param=name)

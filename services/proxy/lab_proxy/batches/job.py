"""A running batch: its state, and the journal of finished lines, from which another worker can continue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from ..errors import BatchNotFound
from ..keys.identity import LOCAL
from ..telemetry.record import RequestRecord
from .batch import BatchFolder
from .files import FileStore, write
from .input import InputLine, read_lines

IDENTITY_SECONDS = 2.0  # a batch ends within this time after its key is revoked
SAVE_SECONDS = 0.25  # between two writes of a batch's progress


class LeaseLostError(Exception):
    """Another worker may own the batch, so this one must not write any more."""


@dataclass(frozen=True, slots=True)
class LineResult:
    """A finished line: the position of its answer in the journal, and its token counts."""

    at: int
    ok: bool
    prompt: int
    completion: int


class Job:
    def __init__(self, folder: BatchFolder, files: FileStore, until: float) -> None:
        """`until`: time.monotonic() until which this worker certainly holds the lease."""
        self.folder, self.until = folder, until
        self._files = files
        self.state = folder.load()
        self.batch: dict[str, Any] = self.state["batch"]
        self.identity, self.identified = LOCAL, -IDENTITY_SECONDS * 2
        self.writing = asyncio.Lock()  # results are added one at a time
        self._results: dict[int, LineResult] = {}
        self._saved = 0.0

    @classmethod
    def open(cls, mark: Path, files: FileStore, until: float) -> Job:
        """The job of an open batch. Raises BatchNotFound and OSError."""
        try:
            return cls(BatchFolder(mark.parent.parent / mark.read_text(), mark.name), files, until)
        except BatchNotFound:  # it was removed from the folder
            mark.unlink(missing_ok=True)
            raise

    def end_status(self) -> str | None:
        """The status with which the batch ends before its last line; None: it continues."""
        if self.state.get("refused"):
            return "failed"
        if self.folder.cancel.exists():
            return "cancelled"
        return "expired" if time.time() >= self.batch["expires_at"] else None

    def save(self) -> None:
        self.check()
        write(self.folder.state, orjson.dumps(self.state))
        self._saved = time.monotonic()

    def check(self) -> None:
        """Raises LeaseLostError if the lease may have expired: a process that was suspended must not write."""
        if time.monotonic() >= self.until:
            raise LeaseLostError

    def resume(self) -> None:
        """Read the finished lines from the journal."""
        self._read_journal()
        completed = sum(result.ok for result in self._results.values())
        self.batch["request_counts"] |= {"completed": completed, "failed": len(self._results) - completed}
        self.save()

    def lines(self, file: BinaryIO) -> Iterator[InputLine]:
        return (line for line in read_lines(file) if line.number not in self._results)

    def add_result(self, line: InputLine, ok: bool, record: RequestRecord, row: dict[str, Any]) -> None:
        self.check()
        result = LineResult(0, ok, record.prompt_tokens, record.completion_tokens)
        entry = {"line": line.number, "ok": ok, "prompt": result.prompt, "completion": result.completion, "row": row}
        descriptor = os.open(self.folder.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as journal:
            journal.write(b"\n" + orjson.dumps(entry) + b"\n")  # leading break: a crash may have cut the last line
        self._results[line.number] = result
        self.batch["request_counts"]["completed" if ok else "failed"] += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def close(self) -> None:
        """Process no further line."""
        whole = len(self._results) == self.batch["request_counts"]["total"]
        self.state["ending"] = None if whole else self.end_status()
        self.batch |= {"status": "finalizing", "finalizing_at": int(time.time())}
        self.save()

    def finish(self) -> None:
        """Write the journal to the output files. A repetition gives the same ids and the same content."""
        batch, state, home = self.batch, self.state, self.folder.home
        ending = state["ending"]
        counts = {"total": batch["request_counts"]["total"], "completed": 0, "failed": 0}
        self._read_journal()
        drafts = {True: self._files.draft(home), False: self._files.draft(home)}
        try:
            with (
                drafts[True][0] as answers, drafts[False][0] as failures,
                self.folder.input.open("rb") as file, self.folder.journal.open("ab+") as journal,
            ):  # fmt: skip
                for line in read_lines(file):
                    result = self._results.get(line.number)
                    if result is not None:
                        journal.seek(result.at)
                        row = orjson.loads(journal.readline())["row"]
                        (answers if result.ok else failures).write(orjson.dumps(row) + b"\n")
                        counts["completed" if result.ok else "failed"] += 1
                    elif ending:
                        failures.write(orjson.dumps(_unexecuted(line, ending)) + b"\n")
                        counts["failed"] += ending != "cancelled"
            self.check()
            for ok, name, field in ((True, "output", "output_file_id"), (False, "errors", "error_file_id")):
                path = drafts[ok][1]
                if path.stat().st_size:
                    named = {"filename": f"{self.folder.id}_{name}.jsonl", "name": state[name]}
                    self._files.add(home, path, purpose="batch_output", kept=state["kept"], **named)
                    batch[field] = state[name]
        finally:
            for _, path in drafts.values():
                path.unlink(missing_ok=True)
        status = ending or "completed"
        prompt = sum(result.prompt for result in self._results.values())
        completion = sum(result.completion for result in self._results.values())
        usage = {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": completion,
                 "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + completion}  # fmt: skip
        batch |= {"status": status, f"{status}_at": int(time.time()), "request_counts": counts, "usage": usage}
        if status == "cancelled":
            batch["cancelling_at"] = int(self.folder.cancel.stat().st_mtime)
        if state.get("refused"):
            error = {"code": "invalid_api_key", "line": None, "message": state["refused"], "param": None}
            batch["errors"] = {"object": "list", "data": [error]}
        self.save()
        self.folder.close()

    def _read_journal(self) -> None:
        """If a line has two answers, the first one counts. A journal line that a crash cut off is skipped."""
        self._results, at = {}, 0
        with contextlib.suppress(FileNotFoundError), self.folder.journal.open("rb") as journal:
            for raw in journal:
                with contextlib.suppress(orjson.JSONDecodeError):
                    entry = orjson.loads(raw)
                    result = LineResult(at, entry["ok"], entry["prompt"], entry["completion"])
                    self._results.setdefault(entry["line"], result)
                at += len(raw)


def _unexecuted(line: InputLine, ending: str) -> dict[str, Any]:
    """The row of a line that was not executed."""
    message = f"This request was not executed: the batch {'has ' if ending != 'cancelled' else 'was '}{ending}."
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": None,
            "error": {"code": f"batch_{ending}", "message": message}}  # fmt: skip

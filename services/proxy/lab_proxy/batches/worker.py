"""Batches at /v1/batches, worked off behind interactive traffic: each line of a file at most once recorded.

What a batch has done lies in files beside its owner's: `.json` says how it stands (written by its worker alone),
`.journal` has a line for each answer. A worker owns a batch by a lease in redis; whoever takes it over, after a
restart or a kill, reads the journal and goes on with the lines that are not in it. Lines go through the exchange like
any request: with the owner's permissions, limits and cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson
import redis.asyncio as redis

from .. import canonical
from ..cache.entry import CHAT, COMPLETIONS, EMBEDDINGS
from ..cache.store import NO_DIRECTIVES
from ..errors import BatchNotFound, InvalidKey, InvalidRequest, LimitReached, ProxyError, UnsupportedMediaType
from ..keys.authentication import LOCAL, Identity
from ..redis.link import FAULTS
from ..requests.context import RequestContext, RequestRecord
from ..requests.executor import Executor
from .files import DAY, KEPT_SECONDS, FilePages, FileStore, Page, Visit, lifetime, on_disk, page, query, write
from .files import Out as Answer

log = logging.getLogger("lab_proxy.batches")

LEASE = "lab:batch:lease:"
BUSY = "lab:batch:busy"
LEASE_SECONDS = 5.0  # after a kill a batch goes on within this time
POLL_SECONDS = 0.5
POLL_TIMEOUT = 1.0
YIELD_SECONDS = 1.0  # a line waits so long for interactive requests to end, then one goes all the same
IDENTITY_SECONDS = 2.0  # a revoked key's batch ends within this time
REST_SECONDS = 30.0  # of a batch that could not be worked on
SAVE_SECONDS = 0.25  # between two writes of a batch's progress
RETRIES = 3  # of a line whose upstream is down
MOST_BATCHES = 2  # that one worker owns at once
MOST_OPEN = 50  # of one owner
MOST_LINES = 50_000
MOST_ERRORS = 100
WINDOW = "24h"
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
NONE_OF = ("cancelled_at", "cancelling_at", "completed_at", "error_file_id", "errors", "expired_at", "failed_at",
           "finalizing_at", "in_progress_at", "model", "output_file_id", "usage")  # fmt: skip

_ID = re.compile(r"batch_[0-9a-f]{32}")
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Holders(Protocol):
    """keys.Keys as batches see it."""

    required: bool

    async def identity_of(self, key_id: str) -> Identity:
        """Who holds a key, by its id. Raises KeyRefused, KeysUnavailable."""


class Traffic(Protocol):
    """The application as batches see it."""

    draining: bool
    begun: int  # interactive requests that went to the exchange, and that came back
    ended: int

    def tell(self, path: str, request_id: str, account: RequestRecord, status: int, seconds: float) -> None:
        """Log line and metrics of one request."""


class LeaseLostError(Exception):
    """Another worker may own the batch by now: nothing more may be recorded."""


@dataclass
class BufferedResponse:
    """The exchange's Out: keeps what is answered to one line."""

    headers: dict[str, str] = field(default_factory=dict)
    started: bool = False
    ended: bool = False
    status: int = 200
    body: bytes = b""

    async def send(self, body: bytes, headers: Mapping[str, str], content_type: str = "", status: int = 200) -> None:
        self.started = self.ended = True
        self.body, self.status = body, status

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        raise TypeError("a batch's line does not stream")

    async def write(self, data: bytes) -> None:
        raise TypeError("a batch's line does not stream")

    async def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of a batch's file."""

    number: int
    custom_id: str
    endpoint: str
    body: dict[str, Any]


class BatchFolder:
    """One batch's files."""

    def __init__(self, home: Path, batch_id: str) -> None:
        self.home = home
        self.id = batch_id
        self.state = home / f"{batch_id}.json"
        self.input = home / f"{batch_id}.input"
        self.journal = home / f"{batch_id}.journal"
        self.cancel = home / f"{batch_id}.cancel"
        self.open = home.parent / "open" / batch_id  # holds the owner's folder's name while the batch is not over

    def load(self) -> dict[str, Any]:
        """`batch` (the wire object) and what is not for the wire. Raises NoSuchBatch."""
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            loaded: dict[str, Any] = orjson.loads(self.state.read_bytes())
            return loaded
        raise BatchNotFound(f"There is no batch {self.id[:80]} here.", param="batch_id")

    def shown(self) -> dict[str, Any]:
        """The wire object; a cancellation that its worker has not seen yet is in it."""
        batch: dict[str, Any] = self.load()["batch"]
        if batch["status"] not in FINAL:
            with contextlib.suppress(OSError):
                batch |= {"cancelling_at": int(self.cancel.stat().st_mtime), "status": "cancelling"}
        return batch

    def close(self) -> None:
        for path in (self.open, self.input, self.journal, self.cancel):
            path.unlink(missing_ok=True)


class BatchWorker:
    """The routes of /v1/batches and /v1/files, and the work itself. A part: start and stop it."""

    def __init__(
        self,
        files: FileStore,
        pages: FilePages,
        keys: Holders,
        client: redis.Redis,
        *,
        at_once: int,
        max_line_bytes: int,
    ) -> None:
        """`at_once`: lines that are asked at the same time; each like a request, of at most `max_line_bytes`."""
        self._files, self._file_pages, self._keys, self._redis = files, pages, keys, client
        self._at_once, self._max_line_bytes = at_once, max_line_bytes
        self._executor: Executor
        self._traffic: Traffic
        self._worker = secrets.token_hex(8)
        self._owned: dict[str, asyncio.Task[None]] = {}
        self._rests: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._order = asyncio.Lock()
        self._seen = 0  # of traffic.begun
        self._busy_elsewhere = False
        self._up = True
        self._task: asyncio.Task[None] | None = None

    def serve(self, exchange: Executor, traffic: Traffic) -> tuple[dict[Any, Page], dict[Any, Page]]:
        """Whom to ask and whom to yield to. Returns the pages and the folders of both routes."""
        self._executor, self._traffic = exchange, traffic
        own: dict[Any, Page] = {("POST", "/v1/batches"): self.create, ("GET", "/v1/batches"): self.list}
        below: dict[Any, Page] = {("GET", "/v1/batches/"): self.get, ("POST", "/v1/batches/"): self.cancel}
        return self._file_pages.pages() | own, self._file_pages.folders() | below

    async def start(self) -> None:
        if self._at_once:
            self._task = asyncio.get_running_loop().create_task(self._watch(), name="batches")

    async def stop(self) -> None:
        """Lines that are under way are given up: whoever owns the batch next asks them again."""
        tasks = [task for task in (self._task, *self._owned.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- pages

    async def create(self, visit: Any, out: Answer) -> None:
        if visit.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType("The body must be application/json, and the header `content-type` must say so.")
        asked = canonical.parse(await visit.read())
        known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
        if unknown := set(asked) - known:
            name = min(unknown)[:60]
            raise InvalidRequest(f"`{name}` is not known here.", param=name)
        if asked.get("endpoint") not in ENDPOINTS:
            raise InvalidRequest(f"`endpoint` is one of {', '.join(ENDPOINTS)}.", param="endpoint")
        if asked.get("completion_window") != WINDOW:
            raise InvalidRequest(f"`completion_window` is {WINDOW}.", param="completion_window")
        metadata = asked.get("metadata")
        if metadata is not None and not _is_metadata(metadata):
            raise InvalidRequest("`metadata` is an object of at most 16 short texts.", param="metadata")
        kept = lifetime(asked.get("output_expires_after"), "output_expires_after")
        home = self._files.home(visit.identity.owner)
        file_id = asked.get("input_file_id")
        self._files.find(home, file_id if isinstance(file_id, str) else "")
        if await asyncio.to_thread(_count_open, home) >= MOST_OPEN:
            raise LimitReached(f"At most {MOST_OPEN} batches that are not over.", "requests", {"retry-after": "60"})
        now = int(time.time())
        batch = {
            "id": f"batch_{secrets.token_hex(16)}",
            "object": "batch",
            "endpoint": asked["endpoint"],
            "input_file_id": file_id,
            "completion_window": WINDOW,
            "status": "validating",
            "created_at": now,
            "expires_at": now + DAY,
            "metadata": metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        } | dict.fromkeys(NONE_OF)
        private = {"owner": visit.identity.owner, "key_id": visit.identity.key_id, "kept": kept,
                   "output": f"file-{secrets.token_hex(16)}", "errors": f"file-{secrets.token_hex(16)}"}  # fmt: skip
        with on_disk():
            folder, state = BatchFolder(home, str(batch["id"])), {"batch": batch, **private}
            await asyncio.to_thread(self._open, folder, str(file_id), state)
        self._woken.set()
        await out.send(orjson.dumps(batch), {})

    async def list(self, visit: Visit, out: Answer) -> None:
        home = self._files.home(visit.identity.owner)
        found = await asyncio.to_thread(_all, home)
        await out.send(page(found, query(visit.query, {"after", "limit"}), 20, 100), {})

    async def get(self, visit: Visit, out: Answer) -> None:
        await out.send(orjson.dumps(self._folder(visit, visit.path.removeprefix("/v1/batches/")).shown()), {})

    async def cancel(self, visit: Visit, out: Answer) -> None:
        batch_id, _, verb = visit.path.removeprefix("/v1/batches/").partition("/")
        folder = self._folder(visit, batch_id if verb == "cancel" else "")
        status = folder.shown()["status"]
        if status in FINAL - {"cancelled"}:
            raise InvalidRequest(f"The batch is {status}: there is nothing to cancel.", status=409)
        if status != "cancelled":
            folder.cancel.touch(mode=0o600)
            self._woken.set()
        await out.send(orjson.dumps(folder.shown()), {})

    def _folder(self, visit: Visit, batch_id: str) -> BatchFolder:
        if not _ID.fullmatch(batch_id):
            raise BatchNotFound(f"There is no batch {batch_id[:80]} here.", param="batch_id")
        return BatchFolder(self._files.home(visit.identity.owner), batch_id)

    def _open(self, folder: BatchFolder, file_id: str, state: dict[str, Any]) -> None:
        """The input becomes the batch's own: its file may be deleted. The mark that it is open comes last."""
        content = self._files.content(folder.home, file_id)
        try:
            os.link(content, folder.input)
        except OSError:  # a disk without links
            shutil.copyfile(content, folder.input)
        write(folder.state, orjson.dumps(state))
        folder.open.parent.mkdir(mode=0o700, exist_ok=True)
        write(folder.open, folder.home.name.encode())

    # ---- who owns what

    async def _watch(self) -> None:
        swept = 0.0
        while True:
            try:
                if time.monotonic() - swept > DAY / 24:
                    swept = time.monotonic()
                    await asyncio.to_thread(self._sweep)
                await self._look()
            except OSError as error:
                log.warning("batches: the folder of files is not to be had: %s", type(error).__name__)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._woken.wait()

    async def _look(self) -> None:
        """Take open batches that nobody owns; tell other workers of interactive traffic here, and hear of theirs."""
        marks = self._files.root / "open"
        found = await asyncio.to_thread(lambda: sorted(marks.iterdir()) if marks.is_dir() else [])
        traffic = self._traffic
        served, self._seen = traffic.begun != self._seen or traffic.begun != traffic.ended, traffic.begun
        if not found:
            return
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                if served:
                    await self._redis.set(BUSY, self._worker, px=int(POLL_SECONDS * 3000))
                told = await self._redis.get(BUSY)
                self._busy_elsewhere = told is not None and told != self._worker.encode()
                for mark in found:
                    if mark.name in self._owned or len(self._owned) >= MOST_BATCHES or traffic.draining:
                        continue
                    if not _ID.fullmatch(mark.name) or self._rests.get(mark.name, 0) > time.monotonic():
                        continue
                    began = time.monotonic()
                    if await self._redis.set(LEASE + mark.name, self._worker, nx=True, px=int(LEASE_SECONDS * 1000)):
                        self._own(mark, began + LEASE_SECONDS)
        except FAULTS as error:
            if self._up:
                log.warning("batches wait for redis: %s", type(error).__name__)
            self._up = self._busy_elsewhere = False
        else:
            self._up = True

    def _own(self, mark: Path, until: float) -> None:
        batch_id = mark.name

        def over(task: asyncio.Task[None]) -> None:
            del self._owned[batch_id]
            if not task.cancelled() and (error := task.exception()):
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                # A full disk, say: each attempt asks lines again whose answers cannot be kept.
                self._rests[batch_id] = time.monotonic() + REST_SECONDS
                log.warning("batch %s rests for a while: %s", batch_id, type(error).__name__)

        task = asyncio.get_running_loop().create_task(self._hold(mark, until), name=batch_id)
        self._owned[batch_id] = task
        task.add_done_callback(over)

    async def _hold(self, mark: Path, until: float) -> None:
        """Work on a batch while its lease can be renewed."""
        name = LEASE + mark.name
        job = await asyncio.to_thread(Job.of, mark, self._files, until)
        work = asyncio.ensure_future(self._work(job))
        try:
            while not (await asyncio.wait({work}, timeout=LEASE_SECONDS / 5))[0]:
                began = time.monotonic()
                with contextlib.suppress(*FAULTS):
                    async with asyncio.timeout(POLL_TIMEOUT):
                        renewed = await self._redis.eval(_RENEW, 1, name, self._worker, int(LEASE_SECONDS * 1000))
                    if not renewed:
                        return
                    job.until = began + LEASE_SECONDS
                if time.monotonic() > job.until:
                    return
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            with contextlib.suppress(*FAULTS):
                async with asyncio.timeout(POLL_TIMEOUT):
                    await self._redis.eval(_RELEASE, 1, name, self._worker)

    def _sweep(self) -> None:
        """Remove what is old; open what a crash left between its files and its mark."""
        self._files.sweep()
        for path in self._files.root.glob("*/batch_*.json"):
            with contextlib.suppress(ProxyError, KeyError, OSError):
                folder = BatchFolder(path.parent, path.stem)
                batch = folder.load()["batch"]
                if batch["status"] not in FINAL:
                    write(folder.open, folder.home.name.encode())
                elif batch["expires_at"] + KEPT_SECONDS < time.time():
                    path.unlink()

    # ---- the work

    async def _work(self, job: Job) -> None:
        """From wherever the batch stands to its end."""
        batch = job.batch
        # 1. Every line is looked at before the first one costs anything.
        if batch["status"] == "validating":
            wrong, total, models = await asyncio.to_thread(
                examine, job.folder.input, batch["endpoint"], self._max_line_bytes
            )
            batch["request_counts"]["total"] = total
            if wrong:
                batch |= {
                    "status": "failed",
                    "failed_at": int(time.time()),
                    "errors": {"object": "list", "data": wrong},
                }
                job.save()
                return job.folder.close()
            batch |= {"status": "in_progress", "in_progress_at": int(time.time()),
                      "model": models.pop() if len(models) == 1 else None}  # fmt: skip
            job.save()
        # 2. What is not in the journal yet, a few lines at a time.
        if batch["status"] == "in_progress":
            await asyncio.to_thread(job.resume)
            with job.folder.input.open("rb") as given:
                lines = job.lines(given)
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._at_once):
                        group.create_task(self._ask_all(job, lines))
            job.close()
        # 3. The files.
        return await asyncio.to_thread(job.finish)

    async def _ask_all(self, job: Job, lines: Iterator[InputLine]) -> None:
        for line in lines:
            await self._turn()
            if await self._ended(job):
                return
            await self._ask(job, line)

    async def _turn(self) -> None:
        """Waits while interactive requests are in flight, here or in another worker, but not for ever: one line a
        second goes in any case, so that a batch behind endless traffic ends some day."""
        async with self._order:
            traffic, deadline = self._traffic, time.monotonic() + YIELD_SECONDS
            while traffic.draining or (  # noqa: ASYNC110 an event would cost every interactive request
                (traffic.begun != traffic.ended or self._busy_elsewhere) and time.monotonic() < deadline
            ):
                await asyncio.sleep(0.02)

    async def _ended(self, job: Job) -> bool:
        """The batch is cancelled, too late, or its key is no longer good."""
        while time.monotonic() > job.identified + IDENTITY_SECONDS and job.why_end() is None:
            try:
                job.identity, job.identified = await self._identity(job), time.monotonic()
            except InvalidKey as error:
                job.state["refused"] = error.message
            except ProxyError:  # redis is down
                await asyncio.sleep(POLL_SECONDS)
        return job.why_end() is not None

    async def _identity(self, job: Job) -> Identity:
        """Whose limits and cache the lines use: looked up again, a key may be changed or revoked meanwhile."""
        key_id = job.state["key_id"]
        if key_id is not None:
            return await self._keys.identity_of(key_id)
        if self._keys.required:
            raise InvalidKey("The batch is of a time when no key was asked for.")
        return LOCAL

    async def _ask(self, job: Job, line: InputLine) -> None:
        """One line to its end, through every refusal that time mends, and into the journal."""
        attempt = 0
        while True:
            request_id = f"batch_req_{secrets.token_hex(12)}"
            said, status, body, account, wait = await self._ask_once(job, line, request_id)
            if wait is None or (status != 429 and attempt >= RETRIES):
                break
            attempt += 1
            until = time.monotonic() + min(30.0, wait * (1 if status == 429 else 2**attempt))
            while time.monotonic() < until:
                await asyncio.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
                if await self._ended(job):
                    return
            await self._turn()
        # Parsed: an upstream may send its JSON in many lines, and a row is one.
        response = {"status_code": status, "request_id": request_id, "body": orjson.loads(body)}
        row = {"id": request_id, "custom_id": line.custom_id, "response": response, "error": None}
        job.record(line, said and status == 200, account, row)

    async def _ask_once(
        self, job: Job, line: InputLine, request_id: str
    ) -> tuple[bool, int, bytes, RequestRecord, float | None]:
        """Whether it was answered, status, body, account, and how many seconds to wait before trying it again."""
        said, account, began = BufferedResponse({"x-request-id": request_id}), RequestRecord(), time.perf_counter()
        wait: float | None = None
        try:
            raw = canonical.dump(line.body)
            call = RequestContext(
                identity=job.identity, endpoint=line.endpoint, raw=raw, body=line.body, request_id=request_id,
                cache_control=NO_DIRECTIVES, store_sampled=False, started=began, record=account, batch_price=True,
            )  # fmt: skip
            await self._executor.answer(call, said)
            status, body = said.status, said.body
        except ProxyError as error:
            status, body = error.status, error.body()
            account.error = error.code or error.type
            if (status == 429 and error.code != "insufficient_quota") or status in {502, 503, 504}:
                after = error.headers.get("retry-after", "")
                wait = float(after) if after.isascii() and after[:4].isdigit() else 1.0
        except Exception as error:
            account.error = type(error).__name__
            log.error("batch: fault in the proxy: %s", account.error)  # noqa: TRY400 its text may hold what was asked
            status, body = 500, ProxyError("A fault in the proxy.", code="proxy_fault").body()
        self._traffic.tell("/v1/batches", request_id, account, status, time.perf_counter() - began)
        return said.started, status, body, account, wait


@dataclass(frozen=True, slots=True)
class LineResult:
    """Where the journal has a line's answer, and what was counted of it."""

    at: int
    ok: bool
    prompt: int
    completion: int


class Job:
    """A batch that this worker owns: its state, and the journal of what is done."""

    def __init__(self, folder: BatchFolder, files: FileStore, until: float) -> None:
        """`until`: time.monotonic() up to which the lease is surely ours."""
        self.folder, self.until = folder, until
        self._files = files
        self.state = folder.load()
        self.batch: dict[str, Any] = self.state["batch"]
        self.identity, self.identified = LOCAL, -IDENTITY_SECONDS * 2
        self._done: dict[int, LineResult] = {}
        self._saved = 0.0

    @classmethod
    def of(cls, mark: Path, files: FileStore, until: float) -> Job:
        """Raises NoSuchBatch and OSError."""
        try:
            return cls(BatchFolder(mark.parent.parent / mark.read_text(), mark.name), files, until)
        except BatchNotFound:  # somebody removed it from the folder
            mark.unlink(missing_ok=True)
            raise

    def why_end(self) -> str | None:
        """The status in which the batch ends before its last line, if it does."""
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
        """Raises LeaseLostError: a process that was stopped for a while must not write."""
        if time.monotonic() >= self.until:
            raise LeaseLostError

    def resume(self) -> None:
        """Learn from the journal what is done. A line that a crash cut off is closed, so that the next is whole."""
        self.check()
        self._read_journal()
        completed = sum(done.ok for done in self._done.values())
        counts = self.batch["request_counts"]
        counts |= {"completed": completed, "failed": len(self._done) - completed}
        with contextlib.suppress(FileNotFoundError), self.folder.journal.open("rb+") as journal:
            if journal.seek(0, os.SEEK_END):
                journal.seek(-1, os.SEEK_END)
                if journal.read(1) != b"\n":
                    journal.write(b"\n")
        self.save()

    def lines(self, given: BinaryIO) -> Iterator[InputLine]:
        """The lines that are not done."""
        return (line for line in _lines(given) if line.number not in self._done)

    def record(self, line: InputLine, ok: bool, account: RequestRecord, row: dict[str, Any]) -> None:
        self.check()
        done = LineResult(0, ok, account.prompt_tokens, account.completion_tokens)
        entry = {"line": line.number, "ok": ok, "prompt": done.prompt, "completion": done.completion, "row": row}
        descriptor = os.open(self.folder.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as journal:
            journal.write(orjson.dumps(entry) + b"\n")
        self._done[line.number] = done
        self.batch["request_counts"]["completed" if ok else "failed"] += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def close(self) -> None:
        """No line more is asked."""
        whole = len(self._done) == self.batch["request_counts"]["total"]
        self.state["ending"] = None if whole else self.why_end()
        self.batch |= {"status": "finalizing", "finalizing_at": int(time.time())}
        self.save()

    def finish(self) -> None:
        """Journal into files: the same ids and the same content whoever does it, and however often."""
        batch, state, home = self.batch, self.state, self.folder.home
        ending = state["ending"]
        counts = {"total": batch["request_counts"]["total"], "completed": 0, "failed": 0}
        self._read_journal()
        drafts = {True: self._files.draft(home), False: self._files.draft(home)}
        try:
            with (
                drafts[True][0] as answers, drafts[False][0] as failures,
                self.folder.input.open("rb") as given, self.folder.journal.open("ab+") as journal,
            ):  # fmt: skip
                for line in _lines(given):
                    done = self._done.get(line.number)
                    if done is not None:
                        journal.seek(done.at)
                        row = orjson.loads(journal.readline())["row"]
                        (answers if done.ok else failures).write(orjson.dumps(row) + b"\n")
                        counts["completed" if done.ok else "failed"] += 1
                    elif ending:
                        failures.write(orjson.dumps(_undone(line, ending)) + b"\n")
                        counts["failed"] += ending != "cancelled"
            self.check()
            for ok, name, shown in ((True, "output", "output_file_id"), (False, "errors", "error_file_id")):
                path = drafts[ok][1]
                if path.stat().st_size:
                    filename = f"{self.folder.id}_{name}.jsonl"
                    self._files.add(
                        home, path, filename=filename, purpose="batch_output", kept=state["kept"], name=state[name]
                    )
                    batch[shown] = state[name]
        finally:
            for _, path in drafts.values():
                path.unlink(missing_ok=True)
        status = ending or "completed"
        prompt, completion = (sum(getattr(done, of) for done in self._done.values()) for of in ("prompt", "completion"))
        batch |= {"status": status, f"{status}_at": int(time.time()), "request_counts": counts,
                  "usage": _usage(prompt, completion)}  # fmt: skip
        if status == "cancelled":
            batch["cancelling_at"] = int(self.folder.cancel.stat().st_mtime)
        if state.get("refused"):
            said = {"code": "invalid_api_key", "line": None, "message": state["refused"], "param": None}
            batch["errors"] = {"object": "list", "data": [said]}
        self.save()
        self.folder.close()

    def _read_journal(self) -> None:
        """The first of two answers to a line counts. What a crash cut off is not there."""
        self._done, at = {}, 0
        with contextlib.suppress(FileNotFoundError), self.folder.journal.open("rb") as journal:
            for raw in journal:
                with contextlib.suppress(orjson.JSONDecodeError):
                    entry = orjson.loads(raw)
                    done = LineResult(at, entry["ok"], entry["prompt"], entry["completion"])
                    self._done.setdefault(entry["line"], done)
                at += len(raw)


def _lines(given: BinaryIO) -> Iterator[InputLine]:
    """Of a file that was examined."""
    for number, raw in enumerate(given, 1):
        if raw.strip():
            item = canonical.parse(raw)
            yield InputLine(number, item["custom_id"], item["url"], item["body"])


def examine(path: Path, endpoint: str, max_line_bytes: int) -> tuple[list[dict[str, Any]], int, set[str]]:
    """What is wrong with a batch's input, how many requests it holds, and for which models."""
    wrong: list[dict[str, Any]] = []
    ids: set[str] = set()
    models: set[str] = set()
    total = 0
    with path.open("rb") as given:
        for number, raw in enumerate(given, 1):
            if not raw.strip():
                continue
            total += 1
            if len(wrong) >= MOST_ERRORS or total > MOST_LINES:
                break
            try:
                if len(raw) > max_line_bytes:
                    raise InvalidRequest(f"The line is longer than {max_line_bytes} bytes (PROXY_MAX_BODY_BYTES).")
                item = canonical.parse(raw)
            except InvalidRequest as error:
                wrong.append(_wrong(number, "invalid_json_line", error.message))
                continue
            wrong += [_wrong(number, *each) for each in _faults(item, endpoint, ids)]
            ids.add(str(item.get("custom_id")))
            if isinstance(body := item.get("body"), dict):
                models.add(str(body.get("model")))
    if not total:
        wrong.append(_wrong(None, "empty_file", "The file holds no request."))
    if total > MOST_LINES:
        wrong.append(_wrong(None, "too_many_requests", f"The file holds more than {MOST_LINES} requests."))
    return wrong[:MOST_ERRORS], total, models


def _wrong(line: int | None, what: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": what, "line": line, "message": message, "param": param}


def _faults(item: Mapping[str, Any], endpoint: str, ids: set[str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with one line; `ids`: of the lines before."""
    custom_id, body = item.get("custom_id"), item.get("body")
    if not isinstance(custom_id, str) or not custom_id or len(custom_id) > 512:
        yield "missing_required_parameter", "`custom_id` is a text that you know the line by.", "custom_id"
    elif custom_id in ids:
        yield "duplicate_custom_id", f"`custom_id` {custom_id[:80]} came before.", "custom_id"
    if item.get("method") != "POST":
        yield "invalid_method", "`method` is POST.", "method"
    if item.get("url") != endpoint:
        yield "invalid_url", f"`url` is the batch's endpoint, {endpoint}.", "url"
    if not isinstance(body, dict):
        yield "missing_required_parameter", "`body` is the request.", "body"
        return
    if not isinstance(body.get("model"), str) or not body["model"]:
        yield "missing_required_parameter", "`model` is the name of a model.", "body.model"
    if body.get("stream"):
        yield "invalid_request", "A batch's answers are not streamed.", "body.stream"


def _undone(line: InputLine, ending: str) -> dict[str, Any]:
    """The row of a line that was never asked."""
    message = f"This request was not executed: the batch {'has ' if ending != 'cancelled' else 'was '}{ending}."
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": None,
            "error": {"code": f"batch_{ending}", "message": message}}  # fmt: skip


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + completion}  # fmt: skip


def _all(home: Path) -> list[dict[str, Any]]:
    """An owner's batches, the newest first."""
    found = []
    for path in home.glob("batch_*.json"):
        with contextlib.suppress(ProxyError):
            found.append(BatchFolder(home, path.stem).shown())
    return sorted(found, key=lambda each: (each["created_at"], each["id"]), reverse=True)


def _count_open(home: Path) -> int:
    return sum(1 for _ in home.glob("batch_*.input"))


def _is_metadata(given: Any) -> bool:
    return (
        isinstance(given, dict)
        and len(given) <= 16
        and all(len(name) <= 64 and isinstance(value, str) and len(value) <= 512 for name, value in given.items())
    )

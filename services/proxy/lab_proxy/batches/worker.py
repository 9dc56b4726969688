"""The batch worker: runs open batches with lower priority than interactive traffic, and records each line at most once.

The files of a batch are in its owner's folder: `.json` is its state, which only its worker writes; `.journal` has one
line for each answer. A worker owns a batch by a lease in redis. After a restart or a crash the next owner reads the
journal and continues with the remaining lines. Lines go through the executor like any request, with the owner's
permissions, limits and cache.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import canonical
from ..errors import InvalidKey, ProxyError
from ..keys.authentication import Authenticator
from ..keys.identity import LOCAL, Identity
from ..long_bodies import loads, off_loop
from ..redis.client import Client, Script
from ..redis.connection import RedisError
from ..requests.context import RequestContext, Traffic
from ..requests.executor import Executor
from ..settings import Settings
from ..tasks import end, supervise
from ..telemetry.observer import Observer
from ..telemetry.record import RequestRecord
from .batch import FINAL, ID, BatchFolder
from .files import DAY, KEPT_SECONDS, FileStore, write
from .input import InputLine, validate
from .job import IDENTITY_SECONDS, Job

log = logging.getLogger("lab_proxy.batches")

LEASE = "lab:batch:lease:"
BUSY = "lab:batch:busy"
LEASE_SECONDS = 5.0  # after a crash another worker takes over the batch within this time
POLL_SECONDS = 0.5
YIELD_SECONDS = 1.0  # longest time that a line waits for interactive requests to end
PAUSE_SECONDS = 30.0  # pause after a fault, before a batch is tried again
RETRIES = 3  # retries of a line whose upstream fails
MAX_BATCHES = 2  # batches that one worker owns at a time

_OWN = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
_RENEW = Script(_OWN + "return redis.call('PEXPIRE', KEYS[1], ARGV[2])")
_RELEASE = Script(_OWN + "return redis.call('DEL', KEYS[1])")


@dataclass
class BufferedResponse:
    """A ResponseWriter that keeps the answer to one line."""

    headers: dict[str, str] = field(default_factory=dict)
    started: bool = False
    ended: bool = False
    status: int = 200
    body: bytes = b""

    async def send(self, body: bytes, headers: Mapping[str, str], content_type: str = "", status: int = 200) -> None:
        self.started = self.ended = True
        self.body, self.status = body, status

    async def send_prepared(self, body: bytes, headers: Mapping[str, str], head: bytes) -> None:
        await self.send(body, {})

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        raise TypeError("a line of a batch is not streamed")

    async def write(self, data: bytes) -> None: ...

    async def end(self) -> None: ...


class BatchWorker:
    """Runs open batches. A part: start and stop it."""

    def __init__(
        self,
        settings: Settings,
        files: FileStore,
        keys: Authenticator,
        client: Client,
        *,
        executor: Executor,
        traffic: Traffic,
        observer: Observer,
    ) -> None:
        self._settings, self._files, self._keys, self._redis = settings, files, keys, client
        self._executor, self._traffic, self._observer = executor, traffic, observer
        self._worker_id = secrets.token_hex(8)
        self._owned: dict[str, asyncio.Task[None]] = {}
        self._paused_until: dict[str, float] = {}
        self._woken = asyncio.Event()
        self.wake = self._woken.set  # call it when a batch is created or cancelled
        self._order = asyncio.Lock()
        self._seen = 0  # value of traffic.started at the last poll
        self._busy_elsewhere = False
        self._up = True
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._settings.batch_concurrency and self._settings.files_enabled:
            self._task = supervise("batches", self._poll_forever)

    async def stop(self) -> None:
        """Stop. Running lines are cancelled; the batch's next owner runs them again."""
        await end(self._task, *self._owned.values())

    # ---- ownership

    async def _poll_forever(self) -> None:
        swept = 0.0
        while True:
            try:
                if time.monotonic() - swept > DAY / 24:
                    swept = time.monotonic()
                    await asyncio.to_thread(self._sweep)
                await self._poll()
            except OSError as error:
                log.warning("batches: the folder of files cannot be read: %s", type(error).__name__)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._woken.wait()

    async def _poll(self) -> None:
        """Take open batches that have no owner. Exchange with other workers whether there is interactive traffic."""
        marks = self._files.root / "open"
        found = await asyncio.to_thread(lambda: sorted(marks.iterdir()) if marks.is_dir() else [])
        traffic = self._traffic
        busy, self._seen = traffic.started != self._seen or traffic.in_flight > 0, traffic.started
        if not found:
            return
        try:
            if busy:
                await self._redis.execute("SET", BUSY, self._worker_id, "PX", int(POLL_SECONDS * 3000))
            busy_worker = await self._redis.execute("GET", BUSY)
            self._busy_elsewhere = busy_worker is not None and busy_worker != self._worker_id.encode()
            for mark in found:
                if mark.name in self._owned or len(self._owned) >= MAX_BATCHES or traffic.draining:
                    continue
                if not ID.fullmatch(mark.name) or self._paused_until.get(mark.name, 0) > time.monotonic():
                    continue
                began, lease_ms = time.monotonic(), int(LEASE_SECONDS * 1000)
                if await self._redis.execute("SET", LEASE + mark.name, self._worker_id, "NX", "PX", lease_ms):
                    self._own(mark, began + LEASE_SECONDS)
        except RedisError as error:
            if self._up:
                log.warning("batches: waiting for redis: %s", error)
            self._up = self._busy_elsewhere = False
        else:
            self._up = True

    def _own(self, mark: Path, until: float) -> None:
        batch_id = mark.name

        def on_done(task: asyncio.Task[None]) -> None:
            del self._owned[batch_id]
            if not task.cancelled() and (error := task.exception()):
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                # For example a full disk: each attempt would repeat lines whose answers cannot be stored.
                self._paused_until[batch_id] = time.monotonic() + PAUSE_SECONDS
                log.warning("batch %s is paused for %.0f s: %s", batch_id, PAUSE_SECONDS, type(error).__name__)

        self._owned[batch_id] = asyncio.create_task(self._hold(mark, until), name=batch_id)
        self._owned[batch_id].add_done_callback(on_done)

    async def _hold(self, mark: Path, until: float) -> None:
        """Run a batch while its lease can be renewed."""
        name = LEASE + mark.name
        job = await asyncio.to_thread(Job.open, mark, self._files, until)
        work = asyncio.ensure_future(self._run(job))
        try:
            while not (await asyncio.wait({work}, timeout=LEASE_SECONDS / 5))[0]:
                began = time.monotonic()
                with contextlib.suppress(RedisError):
                    if not await self._redis.execute(*_RENEW([name], self._worker_id, int(LEASE_SECONDS * 1000))):
                        return
                    job.until = began + LEASE_SECONDS
                if time.monotonic() > job.until:
                    return
            await work
        finally:
            await end(work)
            with contextlib.suppress(RedisError):
                await self._redis.execute(*_RELEASE([name], self._worker_id))

    def _sweep(self) -> None:
        """Remove old batches; restore the `open` marks that a crash left unwritten."""
        self._files.sweep()
        for path in self._files.root.glob("*/batch_*.json"):
            with contextlib.suppress(ProxyError, KeyError, OSError):
                folder = BatchFolder(path.parent, path.stem)
                batch = folder.load()["batch"]
                if batch["status"] not in FINAL:
                    write(folder.open, folder.home.name.encode())
                elif batch["expires_at"] + KEPT_SECONDS < time.time():
                    path.unlink()

    # ---- one batch

    async def _run(self, job: Job) -> None:
        batch = job.batch
        # 1. Validate all lines before the first one is run.
        if batch["status"] == "validating":
            what = (job.folder.input, batch["endpoint"], self._settings.max_body_bytes)
            errors, total, models = await asyncio.to_thread(validate, *what)
            batch["request_counts"]["total"] = total
            now = int(time.time())
            if errors:
                batch |= {"status": "failed", "failed_at": now, "errors": {"object": "list", "data": errors}}
                job.save()
                return job.folder.close()
            model = models.pop() if len(models) == 1 else None
            batch |= {"status": "in_progress", "in_progress_at": now, "model": model}
            job.save()
        # 2. Run the lines that are not in the journal.
        if batch["status"] == "in_progress":
            await asyncio.to_thread(job.resume)
            with job.folder.input.open("rb") as file:
                lines, turn = job.lines(file), asyncio.Lock()
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._settings.batch_concurrency):
                        group.create_task(self._run_lines(job, lines, turn))
            job.close()
        # 3. Write the output files.
        return await asyncio.to_thread(job.finish)

    async def _run_lines(self, job: Job, lines: Iterator[InputLine], turn: asyncio.Lock) -> None:
        while True:
            async with turn:  # a line may have 8 MB, so a thread reads it; a generator allows one thread at a time
                line = await asyncio.to_thread(next, lines, None)
            if line is None:
                return
            await self._yield_to_traffic()
            if await self._has_ended(job):
                return
            await self._run_line(job, line)

    async def _yield_to_traffic(self) -> None:
        """Wait while interactive requests are in flight, here or in another worker, for at most YIELD_SECONDS, so that
        a batch ends under constant traffic too. While the proxy drains, wait without a bound."""
        async with self._order:
            traffic, deadline = self._traffic, time.monotonic() + YIELD_SECONDS
            while traffic.draining or (  # noqa: ASYNC110 - an event would cost every interactive request
                (traffic.in_flight or self._busy_elsewhere) and time.monotonic() < deadline
            ):
                await asyncio.sleep(0.02)

    async def _has_ended(self, job: Job) -> bool:
        """The batch is cancelled or expired, or its key is no longer valid."""
        while time.monotonic() > job.identified + IDENTITY_SECONDS and job.end_status() is None:
            try:
                job.identity, job.identified = await self._identity(job), time.monotonic()
            except InvalidKey as error:
                job.state["refused"] = error.message
            except ProxyError:  # redis is down
                await asyncio.sleep(POLL_SECONDS)
        return job.end_status() is not None

    async def _identity(self, job: Job) -> Identity:
        """The owner's current identity: its key may have been changed or revoked."""
        key_id = job.state["key_id"]
        if key_id is not None:
            return await self._keys.identity_of(key_id)
        if self._keys.required:
            raise InvalidKey("The batch was created while the proxy required no keys.")
        return LOCAL

    async def _run_line(self, job: Job, line: InputLine) -> None:
        """Run one line, with retries, until its answer is in the journal."""
        attempt = 0
        while True:
            response = BufferedResponse({"x-request-id": f"batch_req_{secrets.token_hex(12)}"})
            record, retry_after = await self._attempt(job, line, response)
            if retry_after is None or (response.status != 429 and attempt >= RETRIES):
                break
            attempt += 1
            factor = 1 if response.status == 429 else 2**attempt
            until = time.monotonic() + min(30.0, retry_after * factor)
            while time.monotonic() < until:
                await asyncio.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
                if await self._has_ended(job):
                    return
            await self._yield_to_traffic()
        # Parsed, because an upstream's JSON may have line breaks, and a row is one line.
        request_id = response.headers["x-request-id"]

        def add_result() -> None:
            answer = {"status_code": response.status, "request_id": request_id, "body": loads(response.body)}
            row = {"id": request_id, "custom_id": line.custom_id, "response": answer, "error": None}
            job.add_result(line, response.status == 200, record, row)

        async with job.writing:
            await off_loop(len(response.body), add_result)

    async def _attempt(
        self, job: Job, line: InputLine, response: BufferedResponse
    ) -> tuple[RequestRecord, float | None]:
        """Answer a line once. Returns the record, and the seconds before a retry; None: no retry."""
        record, began, request_id = RequestRecord(), time.perf_counter(), response.headers["x-request-id"]
        retry_after: float | None = None
        try:
            raw = await off_loop(line.size, canonical.dump, line.body)
            what = (job.identity, line.endpoint, raw, line.body, request_id)
            request = RequestContext(*what, started=began, record=record, batch_price=True)
            await self._executor.answer(request, response)
        except ProxyError as error:
            await response.send(error.body(), {}, status=error.status)
            record.error = error.code or error.type
            if (error.status == 429 and error.code != "insufficient_quota") or error.status in {502, 503, 504}:
                header = error.headers.get("retry-after", "")
                retry_after = float(header) if re.fullmatch(r"[0-9]{1,9}", header) else 1.0
        except Exception as error:
            record.error = type(error).__name__
            log.error("batch: fault in the proxy: %s", record.error)  # noqa: TRY400 - its text may contain a prompt
            await response.send(ProxyError("The proxy has a fault.", code="proxy_fault").body(), {}, status=500)
        self._observer.observe("/v1/batches", request_id, record, response.status, time.perf_counter() - began)
        return record, retry_after

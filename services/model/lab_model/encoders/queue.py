"""The queue of an encoder: batches the inputs of all waiting requests into forwards; bounds the number of requests.

Knows threads, token ids and the time of requests. Knows nothing of HTTP or text, nor of what an encoder computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..engine.watchdog import Watchdog

log = logging.getLogger(__name__)

# Tokens of one forward, including padding: bounds the memory of activations, and the time until a cancelled request
# ends (about 200 ms on 2 cores).
BATCH_TOKENS = 1024


class Encoder(Protocol):
    """context: tokens of one input."""

    context: int

    def forward(self, rows: Sequence[Sequence[int]]) -> Sequence[Any]:
        """One output for each row of token ids. Called in one thread at a time."""
        ...


class EncoderBusyError(Exception):
    """The queue is full. `retry_after`: estimated seconds until there is room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue of this model is full")
        self.retry_after = retry_after


class EncoderHangsError(Exception):
    """A forward did not end in time: the encoder accepts no more requests, and its process must be replaced."""


class EncoderJob:
    """The encoder's work for one request. `ended` is set when the encoder no longer works on it."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.outputs: asyncio.Future[list[Any]] = self._loop.create_future()
        self.cancelled = False
        self.rows = rows
        # The next rows are at the end: the longest first, so that rows of similar length share a forward.
        self.left = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        self.found: list[Any] = [None] * len(rows)

    def used(self) -> tuple[int, int, int]:
        """Tokens computed: (prompt, completion, cached). Only inputs whose output was computed count."""
        return sum(len(row) for row, each in zip(self.rows, self.found, strict=True) if each is not None), 0, 0

    def end(self, error: Exception | None = None) -> None:
        """Called in the encoder's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so no caller waits
            self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: Exception | None) -> None:
        self.ended.set()
        if self.outputs.done():
            return
        if error is None:
            self.outputs.set_result(self.found)
        else:
            self.outputs.set_exception(error)
            self.outputs.exception()  # retrieved: otherwise asyncio logs it when nothing awaits it


class EncoderQueue:
    """Requests for one encoder. Its methods are called on the event loop."""

    def __init__(self, encoder: Encoder, max_queued: int, *, step_timeout: float = 300) -> None:
        """step_timeout: seconds after which a forward counts as hanging: all requests fail, and the queue is dead."""
        self.encoder = encoder
        self._max_queued = max_queued
        self._jobs: deque[EncoderJob] = deque()
        self._begun: list[EncoderJob] = []  # with inputs left after the last forward
        self._changed = threading.Condition()
        # One forward at a time: torch already uses every core for it.
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._requests = 0  # running and waiting
        self._seconds = 0.1  # moving average from submission to result
        self._forwarding: list[EncoderJob] = []  # jobs of the running forward
        self._watchdog = Watchdog("encoder", step_timeout, self._changed, self._fail_all)

    @property
    def alive(self) -> bool:
        """False once a forward has hung: its thread cannot be ended, but the process can be replaced."""
        return not self._watchdog.hangs

    @contextlib.contextmanager
    def submit(self, rows: Sequence[Sequence[int]]) -> Iterator[EncoderJob]:
        """The job of these token ids, 1 to `encoder.context` each; leaving the context before its outputs cancels it.
        Raises EncoderBusyError or EncoderHangsError."""
        if self._requests > self._max_queued:
            raise EncoderBusyError(self._seconds)
        job, started = EncoderJob(rows), time.monotonic()
        with self._changed:
            if self._watchdog.hangs:
                raise EncoderHangsError("its computation hangs; the model is restarted automatically")
            self._jobs.append(job)
            self._changed.notify()
            if self._thread.ident is None:
                self._thread.start()
                self._watchdog.start()
        self._requests += 1
        try:
            yield job
        finally:
            job.cancelled = True
            job.outputs.cancel()
            self._requests -= 1
        self._seconds += 0.1 * (time.monotonic() - started - self._seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._begun)
                batch = self._take()
                jobs = list(dict.fromkeys(job for job, _ in batch))
                self._forwarding = jobs
            if not batch:
                continue
            self._watchdog.begin()
            failure: Exception | None = None
            try:
                found = self.encoder.forward([job.rows[place] for job, place in batch])
            except Exception as error:
                log.exception("an encoder's forward failed; its requests end with an error")
                failure = error
            with self._changed:
                self._forwarding = []
                self._watchdog.end()
                if self._watchdog.hangs:
                    return  # their callers have the error
            if failure is not None:
                self._begun = [job for job in self._begun if job not in jobs]
                for job in jobs:
                    job.end(failure)
                continue
            for (job, place), output in zip(batch, found, strict=True):
                job.found[place] = output
            for job in jobs:
                if not job.left and all(each is not None for each in job.found):
                    job.end()

    def _fail_all(self, why: str) -> None:
        """A forward hangs: all requests fail. Called with the lock held."""
        for job in dict.fromkeys([*self._forwarding, *self._begun, *self._jobs]):
            job.end(EncoderHangsError(why))

    def _take(self) -> list[tuple[EncoderJob, int]]:
        """Inputs for one forward: from each request in turn as many as fit. A request with more inputs is queued again
        behind newer requests, so that a long list does not delay single texts."""
        batch: list[tuple[EncoderJob, int]] = []
        width = 0
        self._jobs.extend(self._begun)
        self._begun = []
        while self._jobs:
            job = self._jobs.popleft()
            if job.cancelled or not job.left:  # without rows, it has ended
                job.end()
                continue
            while job.left:
                wider = max(width, len(job.rows[job.left[-1]]))
                if batch and wider * (len(batch) + 1) > BATCH_TOKENS:
                    break
                width = wider
                batch.append((job, job.left.pop()))
            if job.left:
                self._begun.append(job)
                break
        return batch

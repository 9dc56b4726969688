"""The queue before an encoder: one forward at a time, a bounded number of waiting requests.

Knows threads and how long a request takes. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from .embedder import Embedder

Vectors = list[list[float]]


class EncoderBusyError(Exception):
    """The queue is full. `retry_after`: estimated seconds until there is room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue of this model is full")
        self.retry_after = retry_after


class EncoderJob:
    """The embedder's work for one request. `ended` is set when the embedder no longer works on it."""

    def __init__(self, rows: Sequence[Sequence[int]], future: Future[Vectors]) -> None:
        loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.vectors: asyncio.Future[Vectors] = asyncio.wrap_future(future)
        self._rows, self._tokens = rows, 0
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._end, done))

    def used(self) -> tuple[int, int, int]:
        """Tokens computed: (prompt, completion, cached). Only inputs whose vector was computed count."""
        return self._tokens, 0, 0

    def _end(self, future: Future[Vectors]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._tokens = sum(len(row) for row, vector in zip(self._rows, future.result(), strict=True) if vector)
        self.ended.set()


class EncoderQueue:
    """Requests for one embedder. Its methods are called on the event loop."""

    def __init__(self, embedder: Embedder, max_queued: int) -> None:
        self.embedder = embedder
        self._max_queued = max_queued
        # One forward at a time: torch already uses every core for it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="embedding")
        self._requests = 0  # running and waiting
        self._seconds = 0.1  # moving average from submission to result

    @contextlib.contextmanager
    def submit(self, rows: Sequence[Sequence[int]]) -> Iterator[EncoderJob]:
        """The job of these token ids; leaving the context before its result cancels it. Raises EncoderBusyError."""
        if self._requests > self._max_queued:
            raise EncoderBusyError(self._seconds)
        self._requests += 1
        cancelled, started = threading.Event(), time.monotonic()
        try:
            yield EncoderJob(rows, self._worker.submit(self.embedder.embed, rows, cancelled))
        finally:
            cancelled.set()
            self._requests -= 1
        self._seconds += 0.1 * (time.monotonic() - started - self._seconds)

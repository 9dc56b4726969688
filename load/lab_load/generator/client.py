"""A user that sends requests and reads the answers as they come. Knows HTTP and Locust's statistics, no workload."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, ClassVar

import gevent  # type: ignore[import-untyped] # it ships no types
import gevent.pool  # type: ignore[import-untyped]
import orjson
from locust import FastHttpUser, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser

from ..measures.record import AnswerError, Record, cache_state, error_kind, read_stream, take_usage
from ..measures.trial import Timed, Trial
from ..workloads.workload import Item

LONGEST_PAUSE = 5.0  # seconds a user waits after a failure, whatever Retry-After asks for
CONCURRENCY = 10_000  # connections of one process: never the limit that a request waits for


class Client(FastHttpUser):
    """Closed loop: sends a group of requests, each after the last one's answer, then takes the next group.

    Open loop: the one user of its process starts each request at its time, whatever the answers do.
    """

    abstract = True
    scenario: ClassVar[str]
    trial: ClassVar[Trial]  # handed in when a run starts
    max_redirects = 0
    concurrency = CONCURRENCY

    def __init__(self, environment: Environment) -> None:
        self.network_timeout = self.connection_timeout = self.trial.settings.answer_timeout_seconds
        super().__init__(environment)
        # Every status is an answer here: of one that it calls wrong, geventhttpclient drops the connection, and with it
        # the body that says why.
        agent: Any = self.client.client
        agent.valid_response_codes = frozenset(range(200, 600))

    def wait_time(self) -> float:
        return self.trial.settings.think_seconds

    @task
    def work(self) -> None:
        """Raises StopUser when the workload is used up."""
        timed = self.trial.timed(self.scenario)
        if timed is not None:
            self._keep_to(timed)
            raise StopUser
        group = self.trial.next_group(self.scenario)
        if group is None:
            raise StopUser
        for item in group:
            if self.trial.stopped is not None:
                return
            self.send(item)

    def _keep_to(self, timed: Timed) -> None:
        """Start each request at its time. Ends with the last answer, or when the run is stopped."""
        began, running = time.perf_counter(), gevent.pool.Group()
        try:
            for at, item in timed:
                if (left := began + at - time.perf_counter()) > 0:
                    gevent.sleep(left)
                if self.trial.stopped is not None:
                    break
                running.start(gevent.Greenlet(self.send, item, began + at))
            running.join()
        finally:
            running.kill(block=False)  # cut off: counted as unfinished

    def send(self, item: Item, intended: float | None = None) -> None:
        """One request to its end, as a record of the trial. `intended`: its time in an open loop."""
        trial, settings = self.trial, self.trial.settings
        body: Any = item.payload(trial.salt, trial.target.model)
        # identity: a compressed body arrives in blocks, and the first token with the block
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if not settings.cache:
            headers["cache-control"] = "no-store"
        if settings.api_key:
            headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        trial.sent += 1
        pause = 0.0
        started = time.perf_counter()
        record = Record(self.scenario, item.number, item.question, started if intended is None else intended, started)
        with self.client.post(item.path, data=body, headers=headers, stream=True, catch_response=True) as response:
            try:
                left = settings.answer_timeout_seconds - (time.perf_counter() - started)
                with gevent.Timeout(max(left, 0.001), AnswerError("timeout")):
                    self._read(record, item, response)
                response.success()
            except AnswerError as error:
                record.error, record.ended = str(error), time.perf_counter()
                pause = _pause(record)
                response.failure(error)
            if (record.error or record.abandoned) and (stream := getattr(response, "stream", None)) is not None:
                stream.release()  # the rest of the body is not read: the connection cannot be used again
            response.request_meta["response_time"] = record.seconds * 1000
            response.request_meta["name"] = f"{item.path} ({record.state})"
        self._count(record, response.request_meta["name"])
        if pause and intended is None:
            gevent.sleep(pause)

    def _read(self, record: Record, item: Item, response: ResponseContextManager) -> None:
        """Raises AnswerError."""
        try:
            response.raise_for_status()  # type: ignore[no-untyped-call] # Locust's
        except FAILURE_EXCEPTIONS as error:
            raise AnswerError(_broken(error)) from None
        record.status = int(response.status_code)
        headers = response.headers
        assert headers is not None  # noqa: S101 they came with the status
        status = headers.get("cache-status")
        record.cache = cache_state(str(status) if status else None)
        record.retry_after = str(headers.get("retry-after") or "")
        record.replica = str(headers.get("x-model-replica") or "")
        if item.refused:
            self._refused(record, response)
            return
        if record.status != 200:
            raise AnswerError(f"status {record.status}: {error_kind(_json(response))}")
        if self.trial.workloads[self.scenario].once and record.cache == "none":
            raise AnswerError("answer without Cache-Status: nothing caches there")
        if not item.body.get("stream"):
            self._whole(record, response)
            return
        if not str(headers.get("content-type", "")).startswith("text/event-stream"):
            raise AnswerError("answer that is no stream")
        # Locust's own iter_lines and iter_content wait until 1,024 bytes are there or the answer ends: some answers
        # would have all their tokens at once, at their end. readline returns a line with the packet that brought it.
        stream = response.stream
        try:
            read_stream(record, partial(stream.readline, b"\n"), time.perf_counter, stop_after=item.stop_after,
                        pause=(lambda: gevent.sleep(item.pause)) if item.pause else None)  # fmt: skip
        except FAILURE_EXCEPTIONS as error:
            raise AnswerError(f"stream broke off: {_broken(error)}") from None

    def _refused(self, record: Record, response: ResponseContextManager) -> None:
        body = _json(response)
        record.ended = time.perf_counter()
        if not 400 <= record.status < 500:
            raise AnswerError(f"garbage answered with status {record.status}")
        if error_kind(body) == "unknown":
            raise AnswerError(f"status {record.status} without an error that says why")

    def _whole(self, record: Record, response: ResponseContextManager) -> None:
        body = _json(response)
        record.ended = time.perf_counter()
        if not isinstance(body, dict) or not isinstance(body.get("usage"), dict):
            raise AnswerError("answer without usage")
        take_usage(record, body["usage"])

    def _count(self, record: Record, name: str) -> None:
        """Into the trial, and as lines of their own into Locust's statistics, whose total counts requests alone."""
        self.trial.records.append(record)
        if record.error or record.ttft is None:
            return
        stats: Any = self.environment.stats
        stats.get(name, "TTFT").log(record.ttft * 1000, 0)
        if record.tpot is not None:
            stats.get(name, "TPOT").log(record.tpot * 1000, 0)


def _broken(error: BaseException) -> str:
    # geventhttpclient wraps a timeout, though it retries nothing
    error = getattr(error, "original", error)
    return "timeout" if isinstance(error, TimeoutError | gevent.Timeout) else type(error).__name__


def _json(response: ResponseContextManager) -> Any:
    """The body, or None where it is no JSON. Raises AnswerError where it breaks off."""
    try:
        return orjson.loads(response.content or b"null")
    except orjson.JSONDecodeError:
        return None
    except FAILURE_EXCEPTIONS as error:
        raise AnswerError(f"body broke off: {_broken(error)}") from None


def _pause(record: Record) -> float:
    """Seconds: a server in trouble is not asked again at once."""
    return min(max(float(record.retry_after), 1.0), LONGEST_PAUSE) if record.retry_after.isdecimal() else 1.0

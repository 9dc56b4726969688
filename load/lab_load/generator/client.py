"""A user that sends requests and reads answers while they arrive. Knows HTTP and Locust's statistics, no workload."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent  # type: ignore[import-untyped] # it ships no types
import gevent.pool  # type: ignore[import-untyped]
import orjson
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser
from locust.user.task import LOCUST_STATE_STOPPING

from ..measures.record import AnswerError, Record, cache_state, error_kind, read_stream, take_usage
from ..measures.trial import Timed, Trial
from ..workloads.workload import Item

LONGEST_PAUSE = 5.0  # seconds a user waits after a failure, at most, even if Retry-After is longer
FAILURES = (OSError, gevent.Timeout, HTTPParseError)  # of a connection
CONCURRENCY = 10_000  # connections of one process; so many that no request waits for one


class Client(User):
    """Closed loop: sends the requests of a group, each after the answer to the one before, then takes the next group.

    Open loop: the process has one user, which starts each request at its time, without waiting for answers. Uses
    geventhttpclient directly: Locust's FastHttpUser takes as much time for a request as all other code here together.
    """

    abstract = True
    scenario: ClassVar[str]
    trial: ClassVar[Trial]  # set when a run starts

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        settings = self.trial.settings
        self._base = urlsplit(settings.host).path.rstrip("/")
        self._client = HTTPClient.from_url(
            settings.host, concurrency=CONCURRENCY if self.trial.open_loop(self.scenario) else 1,
            connection_timeout=settings.answer_timeout_seconds, network_timeout=settings.answer_timeout_seconds,
        )  # fmt: skip
        # identity: a compressed body arrives in blocks, so the first token would arrive late
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if not settings.cache:
            self._headers["cache-control"] = "no-store"
        if settings.api_key:
            self._headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"

    @task
    def work(self) -> None:
        """The whole run of this user is one task, because Locust's work between two tasks takes as long as reading an
        answer. Raises StopUser when the workload is used up.
        """
        timed = self.trial.timed(self.scenario)
        if timed is not None:
            self._keep_to(timed)
            raise StopUser
        while (group := self.trial.next_group(self.scenario)) is not None:
            for item in group:
                if self.trial.stopped is not None or self._state == LOCUST_STATE_STOPPING:
                    return
                self.send(item)
            gevent.sleep(self.trial.settings.think_seconds)
        raise StopUser

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
            running.kill(block=False)  # the cut requests count as unfinished

    def send(self, item: Item, intended: float | None = None) -> None:
        """Send one request, read its answer and add a record to the trial. `intended`: its start time in an open
        loop."""
        trial = self.trial
        body = item.payload(trial.salt, trial.target.model)
        trial.sent += 1
        started = time.perf_counter()
        record = Record(self.scenario, item.number, item.question, started if intended is None else intended, started)
        response: HTTPSocketPoolResponse | None = None
        try:
            with gevent.Timeout(trial.settings.answer_timeout_seconds, AnswerError("timeout")):
                try:
                    response = self._client.request("POST", self._base + item.path, body, self._headers)
                except FAILURES as error:
                    raise AnswerError(_broken(error)) from None
                self._read(record, item, response)
        except AnswerError as error:
            record.error, record.ended = str(error), time.perf_counter()
        finally:
            if response is not None:
                response.release()  # a connection whose body was not read to its end is closed
        self._count(record, item)
        if record.error and intended is None:
            gevent.sleep(_pause(record))

    def _read(self, record: Record, item: Item, response: HTTPSocketPoolResponse) -> None:
        """Raises AnswerError."""
        record.status = int(response.status_code)
        record.cache = cache_state(_header(response, "cache-status"))
        record.retry_after = _header(response, "retry-after")
        record.replica = _header(response, "x-model-replica")
        if item.refused:
            self._refused(record, response)
            return
        if record.status != 200:
            raise AnswerError(f"status {record.status}: {error_kind(_json(response))}")
        if self.trial.workloads[self.scenario].once and record.cache == "none":
            raise AnswerError("answer without Cache-Status: the server has no cache")
        if not item.body.get("stream"):
            self._whole(record, response)
            return
        if not _header(response, "content-type").startswith("text/event-stream"):
            raise AnswerError("answer is not a stream")
        # readline returns a line as soon as its packet arrives. Locust's iter_lines would wait for 1,024 bytes.
        try:
            read_stream(record, partial(response.readline, b"\n"), time.perf_counter, stop_after=item.stop_after,
                        pause=(lambda: gevent.sleep(item.pause)) if item.pause else None)  # fmt: skip
        except FAILURES as error:
            raise AnswerError(f"stream broke off: {_broken(error)}") from None

    def _refused(self, record: Record, response: HTTPSocketPoolResponse) -> None:
        body = _json(response)
        record.ended = time.perf_counter()
        if not 400 <= record.status < 500:
            raise AnswerError(f"garbage answered with status {record.status}")
        if error_kind(body) == "unknown":
            raise AnswerError(f"status {record.status} without an error message")

    def _whole(self, record: Record, response: HTTPSocketPoolResponse) -> None:
        body = _json(response)
        record.ended = time.perf_counter()
        if not isinstance(body, dict) or not isinstance(body.get("usage"), dict):
            raise AnswerError("answer without usage")
        take_usage(record, body["usage"])

    def _count(self, record: Record, item: Item) -> None:
        """Add the record to the trial and to Locust's statistics, there by path and cache state, with TTFT as a
        separate line."""
        self.trial.records.append(record)
        name = f"{item.path} ({record.state})"
        self.environment.events.request.fire(
            request_type="POST", name=name, response_time=record.seconds * 1000, response_length=0, context={},
            exception=AnswerError(record.error) if record.error else None,
        )  # fmt: skip
        if not record.error and record.ttft is not None:
            stats: Any = self.environment.stats
            stats.get(name, "TTFT").log(record.ttft * 1000, 0)


def _header(response: HTTPSocketPoolResponse, name: str) -> str:
    value = response.get(name)
    return value if isinstance(value, str) else ", ".join(value or ())


def _broken(error: BaseException) -> str:
    # geventhttpclient wraps a timeout in its error for retries, though it does not retry
    error = getattr(error, "original", error)
    return "timeout" if isinstance(error, TimeoutError | gevent.Timeout) else type(error).__name__


def _json(response: HTTPSocketPoolResponse) -> Any:
    """The body, or None if it is not JSON. Raises AnswerError if it breaks off."""
    try:
        return orjson.loads(response.read() or b"null")
    except orjson.JSONDecodeError:
        return None
    except FAILURES as error:
        raise AnswerError(f"body broke off: {_broken(error)}") from None


def _pause(record: Record) -> float:
    """Seconds to wait after a failure, so that a server in trouble is not asked again at once."""
    return min(max(float(record.retry_after), 1.0), LONGEST_PAUSE) if record.retry_after.isdecimal() else 1.0

"""A user who asks and reads the stream as it comes. Knows HTTP and Locust's statistics, not what is asked."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import gevent  # type: ignore[import-untyped] # it ships no types
import orjson
from locust import FastHttpUser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager
from locust.env import Environment

from .answer import Answer, AnswerError, cache_state, kind_of, read_stream
from .trial import Trial

PATH = "/v1/chat/completions"
LONGEST_PAUSE = 5.0  # seconds a user waits after a failure, whatever Retry-After says


class Asker(FastHttpUser):
    """Asks, waits for the whole answer, asks again: a closed loop."""

    abstract = True
    scenario: ClassVar[str]
    by_cache: ClassVar[bool] = False  # a line for each cache state in Locust's statistics
    trial: ClassVar[Trial]  # handed in when a run starts
    max_redirects = 0

    def __init__(self, environment: Environment) -> None:
        self.network_timeout = self.connection_timeout = self.trial.settings.answer_timeout_seconds
        super().__init__(environment)
        # Every status is an answer here: of one that it calls wrong, geventhttpclient drops the connection, and with it
        # the body that says why.
        agent: Any = self.client.client
        agent.valid_response_codes = frozenset(range(200, 600))

    def wait_time(self) -> float:
        return self.trial.settings.think_seconds

    def ask(self, number: int) -> None:
        trial, settings = self.trial, self.trial.settings
        body: Any = orjson.dumps(
            {
                "model": trial.target.model,
                "messages": [{"role": "user", "content": trial.text(number)}],
                "max_tokens": settings.max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        # identity: what is compressed arrives in blocks, and the first token with the block
        headers = {"content-type": "application/json", "accept": "text/event-stream", "accept-encoding": "identity"}
        if settings.api_key:
            headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        trial.asked += 1
        pause = 0.0
        answer = Answer(self.scenario, number, time.perf_counter())
        with self.client.post(PATH, data=body, headers=headers, stream=True, catch_response=True) as response:
            try:
                left = settings.answer_timeout_seconds - (time.perf_counter() - answer.began)
                with gevent.Timeout(max(left, 0.001), AnswerError("timeout")):
                    self._read(answer, response)
                response.success()
            except AnswerError as error:
                answer.error = str(error)
                answer.ended = time.perf_counter()
                pause = _pause(response)
                response.failure(error)
            response.request_meta["response_time"] = answer.seconds * 1000
            response.request_meta["name"] = f"{PATH} ({answer.cache})" if self.by_cache else PATH
        self._count(answer, response.request_meta["name"])
        if pause:
            gevent.sleep(pause)

    def _read(self, answer: Answer, response: ResponseContextManager) -> None:
        """Raises AnswerError."""
        try:
            response.raise_for_status()  # type: ignore[no-untyped-call] # Locust's
        except FAILURE_EXCEPTIONS as error:
            raise AnswerError(_broken(error)) from None
        if response.status_code != 200:
            raise AnswerError(f"status {response.status_code}: {_reply(response)}")
        assert response.headers is not None  # noqa: S101 they came with the status
        status = response.headers.get("cache-status")
        answer.cache = cache_state(str(status) if status else None)
        if self.by_cache and answer.cache == "none":
            raise AnswerError("answer without Cache-Status: nothing caches there")
        if not str(response.headers.get("content-type", "")).startswith("text/event-stream"):
            raise AnswerError("answer that is no stream")
        # Locust's own iter_lines and iter_content wait until 1,024 bytes are there or the answer ends: some answers
        # would have all their tokens at once, at their end. readline returns a line with the packet that brought it.
        stream = response.stream
        try:
            read_stream(answer, lambda: stream.readline(b"\n"), time.perf_counter)
        except FAILURE_EXCEPTIONS as error:
            raise AnswerError(f"stream broke off: {_broken(error)}") from None

    def _count(self, answer: Answer, name: str) -> None:
        """Into the trial, and as lines of their own into Locust's statistics, whose total counts requests alone."""
        self.trial.answers.append(answer)
        if answer.error:
            return
        stats: Any = self.environment.stats
        stats.get(name, "TTFT").log(answer.ttft * 1000, 0)
        for gap in answer.gaps:
            stats.get(name, "ITL").log(gap * 1000, 0)
        if answer.tokens_per_second is not None and answer.cache != "hit":  # a replay's speed is no decode speed
            stats.get(name, "tok/s").log(answer.tokens_per_second, 0)


def _broken(error: BaseException) -> str:
    # geventhttpclient wraps a timeout, though it retries nothing
    error = getattr(error, "original", error)
    return "timeout" if isinstance(error, TimeoutError | gevent.Timeout) else type(error).__name__


def _reply(response: ResponseContextManager) -> str:
    try:
        return kind_of(orjson.loads(response.content or b"null"))
    except (orjson.JSONDecodeError, *FAILURE_EXCEPTIONS):
        return "unknown"


def _pause(response: ResponseContextManager) -> float:
    """Seconds: a server in trouble is not asked again at once."""
    reply = str(response.headers.get("retry-after", "")) if response.headers else ""
    return min(max(float(reply), 1.0), LONGEST_PAUSE) if reply.isdecimal() else 1.0

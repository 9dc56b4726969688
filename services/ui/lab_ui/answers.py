"""One answer of the proxy: asked for, received piece by piece, stopped.

Knows the OpenAI API and threads. Does not know Streamlit, languages or pages. Everything runs in one thread with one
event loop, so that a stop reaches the connection at once, also before the first token.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import openai

from .settings import Settings

ABANDONED_AFTER = 3.0  # seconds without a look from a page: the tab was closed, reloaded or shows another page
KINDS = {401: "refused", 403: "refused", 404: "unknown_model", 421: "refused", 429: "busy", 504: "timeout"}
State = Literal["waiting", "streaming", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Fault:
    """Why an answer or a look at the proxy failed. `kind` names a text; `status` and `message` are the proxy's own."""

    kind: str
    status: int | None = None
    message: str = ""
    retry_after: str | None = None


@dataclass
class Answer:
    """What has come so far. Written by the loop's thread, read by any; `text` only ever grows."""

    request: Mapping[str, Any]
    _loop: asyncio.AbstractEventLoop = field(repr=False)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    text: str = ""
    state: State = "waiting"
    finish_reason: str | None = None
    fault: Fault | None = None
    cache: str | None = None  # "hit", "miss", "bypass" …; None where the proxy did not say
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None  # first and last content, on the clock of `started`
    last: float | None = None
    ended: float | None = None
    seen: float = field(default_factory=time.monotonic)
    _task: asyncio.Task[None] | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def running(self) -> bool:
        return not self._over.is_set()

    @property
    def ttft(self) -> float | None:
        """Seconds from the request to the first content."""
        return None if self.first is None else self.first - self.started

    @property
    def seconds(self) -> float:
        """Seconds from the request to the end, or until now."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first by the time after the first; for one lone piece, all by all."""
        if not self.completion_tokens or self.first is None or self.last is None:
            return None
        if self.completion_tokens > 1 and self.last > self.first:
            return (self.completion_tokens - 1) / (self.last - self.first)
        return self.completion_tokens / max(self.last - self.started, 1e-6)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most `seconds`; True at the end. Tells the loop that somebody still looks."""
        self.seen = time.monotonic()
        return self._over.wait(seconds)

    def stop(self) -> None:
        """Close the request and keep what came. Returns when the connection is closed, within a second."""
        if self.running:
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
            self._over.wait(1)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Runs in the loop after the connection is closed, also where a stop came before the first step."""
        if task.cancelled():
            self.state = "stopped"
        self.ended = time.monotonic()
        self._over.set()


class Answers:
    """The thread, its loop and the client that all sessions share. Nothing starts before the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._lock = threading.Lock()
        self._client: openai.AsyncOpenAI | None = None

    def ask(self, request: Mapping[str, Any]) -> Answer:
        """Send `request` (a chat completion's body without the stream's fields) and return at once."""
        with self._lock:
            if not self._thread.is_alive():
                self._thread.start()
        answer = Answer(dict(request), self._loop)

        def begin() -> None:
            answer._task = self._loop.create_task(self._receive(answer))
            answer._task.add_done_callback(answer._end)

        self._loop.call_soon_threadsafe(begin)
        return answer

    def close(self) -> None:
        """End the thread and every request in it."""

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._client is not None:
                await self._client.close()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        self._loop.close()

    async def _receive(self, answer: Answer) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine of ours runs in a task
        watch = asyncio.create_task(_leave_when_abandoned(answer, task))
        try:
            await self._stream(answer)
            answer.state = "done" if answer.finish_reason else "failed"
            if not answer.finish_reason:  # the connection ended between two events: not an end that anybody meant
                answer.fault = Fault("interrupted")
        except Exception as error:  # whatever an upstream sends ends in the answer's place, not in this thread
            answer.state = "failed"
            answer.fault = fault(error, answer)
        finally:
            watch.cancel()

    async def _stream(self, answer: Answer) -> None:
        stream = await self._openai().chat.completions.create(
            **answer.request,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-request-id": answer.request_id},
        )
        async with stream:
            headers = stream.response.headers
            answer.request_id = headers.get("x-request-id", answer.request_id)
            answer.cache = cache_state(headers.get("cache-status"))
            async for chunk in stream:
                if chunk.usage is not None:
                    answer.prompt_tokens = chunk.usage.prompt_tokens
                    answer.completion_tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    if choice.delta.content:
                        answer.last = time.monotonic()
                        answer.first = answer.first or answer.last
                        answer.text += choice.delta.content
                        answer.state = "streaming"
                    answer.finish_reason = choice.finish_reason or answer.finish_reason

    def _openai(self) -> openai.AsyncOpenAI:
        if self._client is None:
            silence = self._settings.answer_timeout_seconds
            timeout = httpx2.Timeout(silence, connect=self._settings.connect_timeout_seconds)
            self._client = openai.AsyncOpenAI(
                base_url=self._settings.proxy_url + "/v1",
                api_key="local",  # the proxy on loopback takes any
                max_retries=0,  # a second try would hide what the page has to say
                timeout=timeout,
                http_client=httpx2.AsyncClient(trust_env=False, timeout=timeout),
            )
        return self._client


async def _leave_when_abandoned(answer: Answer, task: asyncio.Task[Any]) -> None:
    """Pages look by polling, from another thread: that no look comes is no event to wait for."""
    while (left := answer.seen + ABANDONED_AFTER - time.monotonic()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(left)
    task.cancel()


def look(settings: Settings, path: str) -> dict[str, Any] | Fault:
    """GET `path` of the proxy: the JSON object, or why there is none."""
    timeout = httpx2.Timeout(settings.status_timeout_seconds, connect=settings.connect_timeout_seconds)
    try:
        with httpx2.Client(trust_env=False, timeout=timeout) as client:
            response = client.get(settings.proxy_url + path)
            response.raise_for_status()
            body = response.json()
        return body if isinstance(body, dict) else Fault("not_the_proxy")
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        return fault(error)


def cache_state(header: str | None) -> str | None:
    """RFC 9211's Cache-Status in one word: `hit`, `stale`, `collapsed`, or the reason for going forward."""
    if not header:
        return None
    words = [part.strip() for part in re.sub(r'"(?:[^"\\]|\\.)*"', '""', header).split(",")[-1].split(";")]
    forward = next((word.removeprefix("fwd=") for word in words if word.startswith("fwd=")), None)
    if "hit" in words:
        return "hit"
    return "collapsed" if "collapsed" in words else forward


def fault(error: Exception, answer: Answer | None = None) -> Fault:
    """The kind of failure, for the reader; the proxy's own words where it had any."""
    begun = answer is not None and answer.first is not None
    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        body = error.body if isinstance(error.body, Mapping) else {}
        message = str(body.get("message") or "")
        kind = KINDS.get(error.status_code)
        if error.code == "context_length_exceeded":
            kind = "too_long"
        elif kind is None:
            kind = "model_down" if error.status_code >= 500 else "rejected"
        if answer is not None:
            answer.request_id = headers.get("x-request-id", answer.request_id)
        return Fault(kind, error.status_code, message, headers.get("retry-after"))
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException):
        connecting = isinstance(error.__cause__ or error, httpx2.ConnectTimeout)
        return Fault("proxy_down" if connecting else "timeout")
    if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
        return Fault("interrupted" if begun else "proxy_down")
    if isinstance(error, httpx2.HTTPStatusError):
        return Fault("not_the_proxy", error.response.status_code)
    if isinstance(error, openai.APIError):  # an error event inside the stream
        return Fault("interrupted" if begun else "model_down", message=error.message)
    return Fault("not_the_proxy")  # neither JSON nor events: something else listens there

"""Every HTTP call to the proxy: chat answers, the model list, the status. Errors become Faults.

Knows the OpenAI API. Knows nothing of Streamlit, languages or pages. Answers are received in one thread with one event
loop, so that a stop closes the connection at once, also before the first token. `key` is the reader's key for the
proxy, sent as `Authorization: Bearer`; without one the proxy decides by its settings.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping
from typing import Any

import httpx2
import openai

from .answer import Answer, Fault
from .settings import Settings

KINDS = {401: "refused", 403: "refused", 404: "unknown_model", 421: "refused", 429: "busy", 504: "timeout"}


class Proxy:
    """The client that all sessions of a process share. Its thread starts with the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._lock = threading.Lock()
        self._client: openai.AsyncOpenAI | None = None

    def ask(self, request: Mapping[str, Any], key: str | None = None) -> Answer:
        """Send `request` (a chat completion's body without the stream's fields) and return at once."""
        with self._lock:
            if not self._thread.is_alive():
                self._thread.start()
        answer = Answer(dict(request), self._loop)
        answer.start(lambda answer: self._receive(answer, key))
        return answer

    def models(self, key: str | None = None) -> dict[str, Any] | Fault:
        """The body of GET /v1/models."""
        return self._get("/v1/models", key)

    def status(self, key: str | None = None) -> dict[str, Any] | Fault:
        """The body of GET /status."""
        return self._get("/status", key)

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

    def _get(self, path: str, key: str | None) -> dict[str, Any] | Fault:
        settings = self._settings
        timeout = httpx2.Timeout(settings.status_timeout_seconds, connect=settings.connect_timeout_seconds)
        try:
            with httpx2.Client(trust_env=False, timeout=timeout) as client:
                response = client.get(settings.proxy_url + path, headers=_authorization(key))
            response.raise_for_status()
            body = response.json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            return fault(error)
        return body if isinstance(body, dict) else Fault("not_the_proxy")

    async def _receive(self, answer: Answer, key: str | None) -> None:
        try:
            await self._stream(answer, key)
            answer.state = "done" if answer.finish_reason else "failed"
            if not answer.finish_reason:  # the connection ended between two events
                answer.fault = Fault("interrupted")
        except Exception as error:  # whatever an upstream sends becomes the answer's fault and does not end the thread
            answer.state = "failed"
            answer.fault = fault(error, answer)

    async def _stream(self, answer: Answer, key: str | None) -> None:
        stream = await self._openai().chat.completions.create(
            **answer.request,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-request-id": answer.request_id, **_authorization(key)},
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
                        answer.add(choice.delta.content)
                    answer.finish_reason = choice.finish_reason or answer.finish_reason

    def _openai(self) -> openai.AsyncOpenAI:
        if self._client is None:
            silence = self._settings.answer_timeout_seconds
            timeout = httpx2.Timeout(silence, connect=self._settings.connect_timeout_seconds)
            self._client = openai.AsyncOpenAI(
                base_url=self._settings.proxy_url + "/v1",
                api_key="local",  # the client insists on one; the proxy without keys ignores it
                max_retries=0,  # a retry would hide the fault that the page shows
                timeout=timeout,
                http_client=httpx2.AsyncClient(trust_env=False, timeout=timeout),
            )
        return self._client


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def cache_state(header: str | None) -> str | None:
    """RFC 9211's Cache-Status in one word: `hit`, `stale`, `collapsed`, or the reason for forwarding."""
    if not header:
        return None
    parts = [part.strip() for part in re.sub(r'"(?:[^"\\]|\\.)*"', '""', header).split(",")[-1].split(";")]
    forward = next((part.removeprefix("fwd=") for part in parts if part.startswith("fwd=")), None)
    if "hit" in parts:
        return "hit"
    return "collapsed" if "collapsed" in parts else forward


def fault(error: Exception, answer: Answer | None = None) -> Fault:
    """The kind of failure, and the proxy's own words where it sent any."""
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
        status = error.response.status_code
        return Fault("refused" if KINDS.get(status) == "refused" else "not_the_proxy", status)
    if isinstance(error, openai.APIError):  # an error event inside the stream
        return Fault("interrupted" if begun else "model_down", message=error.message)
    return Fault("not_the_proxy")  # neither JSON nor events: another program uses that port

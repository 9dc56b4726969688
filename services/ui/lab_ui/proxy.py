"""All HTTP calls to the proxy: streamed answers, and requests with one JSON answer. Errors become Faults.

Knows the OpenAI API. Knows nothing of Streamlit, languages or pages. One thread with one event loop receives all
streamed answers, so that a stop closes the connection at once, also before the first token. `key` is the reader's key
for the proxy, sent as `Authorization: Bearer`; None: the proxy's settings decide whether it answers without a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import openai

from .answer import Alternative, Answer, Fault, Token
from .settings import Settings
from .surprise import text_of
from .traces import Span, Traces

# Error code of the proxy, or HTTP status -> kind of fault. The code is looked up first.
KINDS: dict[str | int | None, str] = {
    "context_length_exceeded": "too_long", "model_not_allowed": "model_not_allowed", "host_not_allowed": "wrong_host",
    "origin_not_allowed": "wrong_host", "rate_limit_exceeded": "limited", "insufficient_quota": "budget",
    "upstream_rate_limited": "upstream_limited", "keys_unavailable": "keys_unavailable", "draining": "draining",
    "limits_unavailable": "keys_unavailable", "upstream_key_refused": "upstream_key",
    "upstream_error": "upstream_error", 401: "key_invalid", 403: "refused", 404: "unknown_model", 413: "too_long",
    421: "wrong_host", 429: "busy", 503: "model_down", 504: "timeout",
}  # fmt: skip
PHASE_SECONDS = 0.3  # between two requests for a running answer's phase
T = TypeVar("T")
REMEMBERED = 500  # answers kept in memory, so that a reloaded page finds them again


@dataclass(frozen=True)
class Reply:
    """A JSON answer of the proxy: its object, its headers (names in lower case), and the seconds it took."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]
    seconds: float
    status: int = 200

    @property
    def cache(self) -> str | None:
        return cache_state(self.headers.get("cache-status"))

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")


class Proxy:
    """The client that all sessions of a process share. Its thread starts with the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._lock = threading.Lock()
        self._client: openai.AsyncOpenAI | None = None
        self._phases: httpx2.AsyncClient | None = None
        self._http = httpx2.Client(trust_env=False, limits=httpx2.Limits(max_connections=200))
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._traces = Traces(settings.otlp_endpoint) if settings.otlp_endpoint else None

    def ask(
        self,
        request: Mapping[str, Any],
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        begun: Sequence[Token] = (),
    ) -> Answer:
        """Send `request` and return at once. `request`: body of a chat completion, or, if it has `prompt`, of a
        completion; without `stream` and `stream_options`. `begun`: tokens that come before the text of the completion.
        """
        with self._lock:
            if not self._thread.is_alive():
                self._thread.start()
            answer = Answer(dict(request), self._loop, text=text_of(begun), tokens=list(begun))
            self._answers[answer.id] = answer
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        answer.start(lambda answer: self._receive(answer, key, headers or {}))
        return answer

    def answer(self, id: str) -> Answer | None:  # noqa: A002 - the field's name
        """One of the last REMEMBERED answers, by its id, for a page that was reloaded."""
        return self._answers.get(id)

    def models(self, key: str | None = None) -> dict[str, Any] | Fault:
        """The body of GET /v1/models."""
        return self._body("/v1/models", key)

    def status(self, key: str | None = None) -> dict[str, Any] | Fault:
        """The body of GET /status."""
        return self._body("/status", key)

    def call(
        self,
        method: str,
        path: str,
        key: str | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
        base: str | None = None,
    ) -> Reply | Fault:
        """One request and its JSON answer. `seconds`: longest silence, by default `answer_timeout_seconds`. `base`:
        base URL of another service than the proxy."""
        if self._traces is None or method != "POST" or base is not None:
            return self._call(method, path, key, body=body, headers=headers, seconds=seconds, base=base)
        with self._traces.request(path, (body or {}).get("model")) as span:
            sent = {**(headers or {}), **span.headers}
            reply = self._call(method, path, key, body=body, headers=sent, seconds=seconds)
            span.status, span.error = reply.status, reply.kind if isinstance(reply, Fault) else None
        return reply

    def _call(
        self,
        method: str,
        path: str,
        key: str | None,
        *,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        seconds: float | None,
        base: str | None = None,
    ) -> Reply | Fault:
        settings = self._settings
        silence = settings.answer_timeout_seconds if seconds is None else seconds
        timeout = httpx2.Timeout(silence, connect=settings.connect_timeout_seconds)
        sent = {"x-request-id": uuid.uuid4().hex, **_authorization(key), **(headers or {})}
        began = time.perf_counter()
        try:
            response = self._http.request(
                method, (base or settings.proxy_url) + path, json=body, headers=sent, timeout=timeout
            )
            took = time.perf_counter() - began
            if not response.is_success:
                return _refusal(response, key)
            answered = response.json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            return fault(error)
        if not isinstance(answered, dict):
            return Fault("not_the_proxy")
        return Reply(answered, dict(response.headers), took, response.status_code)

    def calls(self, count: int, at_once: int, one: Callable[[int], T]) -> list[T]:
        """Results of `count` calls of `one`, in their order; at most `at_once` run at the same time."""
        if not count:
            return []
        with ThreadPoolExecutor(at_once, thread_name_prefix="calls") as pool:
            return list(pool.map(one, range(count)))

    def close(self) -> None:
        """Cancel all requests and end the thread."""

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._client is not None:
                await self._client.close()
            if self._phases is not None:
                await self._phases.aclose()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        self._loop.close()
        self._http.close()
        if self._traces is not None:
            self._traces.close()

    def _body(self, path: str, key: str | None) -> dict[str, Any] | Fault:
        reply = self.call("GET", path, key, seconds=self._settings.status_timeout_seconds)
        if isinstance(reply, Fault):
            # A GET names no model, so this 404 does not come from the proxy.
            return Fault("not_the_proxy", reply.status) if reply.kind == "unknown_model" else reply
        return dict(reply.body)

    async def _receive(self, answer: Answer, key: str | None, headers: Mapping[str, str]) -> None:
        watch = asyncio.create_task(self._watch_phase(answer, key))
        try:
            if self._traces is None:
                await self._stream(answer, key, headers)
            else:
                path = "/v1/completions" if "prompt" in answer.request else "/v1/chat/completions"
                with self._traces.request(path, answer.request.get("model")) as span:
                    await self._stream(answer, key, {**headers, **span.headers}, span)
            answer.state = "done" if answer.finish_reason else "failed"
            if not answer.finish_reason:  # the connection ended between two events
                answer.fault = Fault("interrupted")
        except Exception as error:  # any error becomes the answer's fault; the thread goes on
            answer.state = "failed"
            answer.fault = fault(error, answer, key)
        finally:
            watch.cancel()

    async def _watch_phase(self, answer: Answer, key: str | None) -> None:
        """Set the phase of an answer that has no token yet, as far as the proxy reports it."""
        if self._phases is None:
            self._phases = httpx2.AsyncClient(trust_env=False, timeout=self._settings.status_timeout_seconds)
        url = f"{self._settings.proxy_url}/v1/requests/{answer.request_id}/timing"
        while answer.first is None:
            await asyncio.sleep(PHASE_SECONDS)
            with contextlib.suppress(httpx2.HTTPError, ValueError, KeyError, TypeError, IndexError):
                reply = await self._phases.get(url, headers=_authorization(key))
                answer.phase = str(reply.json()["phases"][-1]["name"])

    async def _stream(self, answer: Answer, key: str | None, sent: Mapping[str, str], span: Span | None = None) -> None:
        client = self._openai()
        create: Any = client.completions.create if "prompt" in answer.request else client.chat.completions.create
        stream = await create(
            **answer.request,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-request-id": answer.request_id, **_authorization(key), **sent},
        )
        async with stream:
            headers = stream.response.headers
            answer.headers = dict(headers)
            if span is not None:
                span.status = stream.response.status_code
            answer.request_id = headers.get("x-request-id", answer.request_id)
            answer.cache = cache_state(headers.get("cache-status"))
            async for chunk in stream:
                if chunk.usage is not None:
                    answer.prompt_tokens = chunk.usage.prompt_tokens
                    answer.completion_tokens = chunk.usage.completion_tokens
                    details = chunk.usage.prompt_tokens_details
                    answer.cached_tokens = details.cached_tokens if details else None
                for choice in chunk.choices:
                    answer.tokens += _tokens(choice.logprobs)
                    content = choice.text if "prompt" in answer.request else choice.delta.content
                    if content:
                        answer.add(content)
                    answer.finish_reason = choice.finish_reason or answer.finish_reason

    def _openai(self) -> openai.AsyncOpenAI:
        if self._client is None:
            silence = self._settings.answer_timeout_seconds
            timeout = httpx2.Timeout(silence, connect=self._settings.connect_timeout_seconds)
            self._client = openai.AsyncOpenAI(
                base_url=self._settings.proxy_url + "/v1",
                api_key="local",  # the client requires one; a proxy without keys ignores it
                max_retries=0,  # a retry would hide a fault that the page should show
                timeout=timeout,
                http_client=httpx2.AsyncClient(trust_env=False, timeout=timeout),
            )
        return self._client


def _tokens(logprobs: Any) -> list[Token]:
    """Tokens of a chunk's logprobs: of a chat completion, or of a completion, whose older format has no bytes."""
    if logprobs is None:
        return []
    if content := getattr(logprobs, "content", None):
        return [
            Token(
                each.token,
                each.logprob,
                bytes(each.bytes or ()),
                tuple(Alternative(o.token, o.logprob, bytes(o.bytes or ())) for o in each.top_logprobs or ()),
            )
            for each in content
        ]
    tops = getattr(logprobs, "top_logprobs", None) or []
    return [
        Token(text, logprob or 0.0, b"", tuple(Alternative(*other) for other in (tops[place] or {}).items()))
        for place, (text, logprob) in enumerate(
            zip(getattr(logprobs, "tokens", None) or (), getattr(logprobs, "token_logprobs", None) or (), strict=False)
        )
        if place < len(tops)
    ]


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def cache_state(header: str | None) -> str | None:
    """The Cache-Status header (RFC 9211) in one word: `hit`, `collapsed`, or the value of `fwd`; None without one."""
    if not header:
        return None
    parts = [part.strip() for part in re.sub(r'"(?:[^"\\]|\\.)*"', '""', header).split(",")[-1].split(";")]
    forward = next((part.removeprefix("fwd=") for part in parts if part.startswith("fwd=")), None)
    if "hit" in parts:
        return "hit"
    return "collapsed" if "collapsed" in parts else forward


def kind(status: int, code: str | None, key: str | None) -> str:
    """The kind of fault of an error answer."""
    if status == 401 and not key:
        return "key_needed"
    found = (KINDS.get(code) if isinstance(code, str) else None) or KINDS.get(status)
    return found or ("upstream_error" if status >= 500 else "rejected")


def _refusal(response: httpx2.Response, key: str | None) -> Fault:
    """The Fault of an error answer. An answer without OpenAI's error object does not come from the proxy."""
    headers = dict(response.headers)
    try:
        error = response.json()["error"]
        message, code = str(error.get("message") or ""), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Fault("not_the_proxy", response.status_code)
    return Fault(
        kind(response.status_code, code, key), response.status_code, message, headers.get("retry-after"),
        code, headers.get("x-request-id"), headers,
    )  # fmt: skip


def fault(error: Exception, answer: Answer | None = None, key: str | None = None) -> Fault:
    """The Fault of an exception, with the proxy's message if it sent one."""
    begun = answer is not None and answer.first is not None
    if isinstance(error, openai.APIStatusError):
        headers = dict(error.response.headers)
        body = error.body if isinstance(error.body, Mapping) else {}
        if answer is not None:
            answer.request_id = headers.get("x-request-id", answer.request_id)
        return Fault(
            kind(error.status_code, error.code, key), error.status_code, str(body.get("message") or ""),
            headers.get("retry-after"), error.code, headers.get("x-request-id"), headers,
        )  # fmt: skip
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException):
        connecting = isinstance(error.__cause__ or error, httpx2.ConnectTimeout)
        return Fault("proxy_down" if connecting else "timeout")
    if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
        return Fault("interrupted" if begun else "proxy_down")
    if isinstance(error, openai.APIError):  # an error event inside the stream
        return Fault("interrupted" if begun else "model_down", message=error.message)
    return Fault("not_the_proxy")  # neither JSON nor an event stream: another program uses that port

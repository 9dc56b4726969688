"""OpenAI's endpoints for one model: requests in, JSON or server-sent events out.

`generation_app` and `embedding_app` are plain ASGI applications; Ray Serve, or any server, runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from prometheus_client import Gauge
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from . import wire
from .embedding import Embedder
from .engine import Engine, EngineError, Event, QueueFullError, Request
from .envelope import EventStream, Json, Record, Service, read_json, sse, until_gone
from .text import Growing, TemplateError, Text

T = TypeVar("T")

# A text this long takes milliseconds to tokenize: not on the event loop.
LONG_TEXT = 20_000
# The gauges are at most this old.
MEASURE_SECONDS = 0.5

# `sum` over the replicas of a model, each a process.
RUNNING = Gauge("model_running", "Requests in the batch.", ["model"], multiprocess_mode="livesum")
WAITING = Gauge("model_waiting", "Requests in the queue.", ["model"], multiprocess_mode="livesum")
KV_USED = Gauge("model_kv_used_ratio", "Part of the KV pages in use.", ["model"], multiprocess_mode="livemax")
FAULTS = Gauge("model_engine_faults", "Steps that failed since the start.", ["model"], multiprocess_mode="livesum")
PREEMPTED = Gauge(
    "model_preempted", "Requests sent back to the queue for their pages.", ["model"], multiprocess_mode="livesum"
)


class Generator:
    """One chat or base model: tokenizer, engine, and the way between the engine's thread and the event loop."""

    def __init__(self, *, name: str, kind: str, revision: str, text: Text, default_max_tokens: int) -> None:
        self.name, self.kind, self.revision, self.text = name, kind, revision, text
        self.default_max_tokens = default_max_tokens
        self._measured = 0.0
        self.stop_ids: frozenset[int] = frozenset()
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[Request, tuple[asyncio.Queue[tuple[int, Event]], int]] = {}

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "attach the engine first"  # noqa: S101
        return self._engine

    def attach(self, engine: Engine, stop_ids: frozenset[int]) -> None:
        self._engine, self.stop_ids = engine, stop_ids

    def deliver(self, events: list[Event]) -> None:
        """The engine's `deliver`: one hop into the event loop a step, however many requests it served."""
        if not events or time.monotonic() - self._measured > MEASURE_SECONDS:
            self._measure()
        if events and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: list[Event]) -> None:
        for event in events:
            if found := self._inboxes.get(event.request):
                found[0].put_nowait((found[1], event))

    async def run(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Event]]:
        """Submit all and yield what comes, with the request's index, until all have ended.

        However the caller leaves, the places of the unfinished are freed before the engine's next step.
        """
        self._loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._inboxes |= {request: (inbox, index) for index, request in enumerate(requests)}
        open_ = set(requests)
        try:
            self.engine.submit(*requests)
            while open_:
                index, event = await inbox.get()
                if event.finish or event.error:
                    open_.discard(event.request)
                yield index, event
        finally:
            for request in requests:
                self._inboxes.pop(request, None)
            if open_:
                self.engine.cancel(*open_)

    def _measure(self) -> None:
        self._measured = time.monotonic()
        stats = self.engine.stats()
        RUNNING.labels(self.name).set(stats.running)
        WAITING.labels(self.name).set(stats.waiting)
        KV_USED.labels(self.name).set(stats.pages_used / stats.pages_total)
        FAULTS.labels(self.name).set(stats.faults)
        PREEMPTED.labels(self.name).set(stats.preempted)


# Applications


def generation_app(model: Generator, *, max_body_bytes: int) -> ASGIApp:
    async def chat(http: HttpRequest) -> Response:
        if model.kind != "chat":
            raise wire.BadRequestError(
                f"{model.name} is a base model without a chat template; use /v1/completions.", param="model"
            )
        asked = wire.parse(wire.ChatRequest, await read_json(http, max_body_bytes))
        check_model(http, asked.model, model.name)
        messages = [message.plain() for message in asked.messages]
        try:
            ids = await tokenize(model.text.chat, messages, sum(len(message["content"]) for message in messages))
        except TemplateError as error:
            raise wire.BadRequestError(
                f"The model's chat template does not take these messages: {error}", param="messages"
            ) from None
        return await answer(http, asked, [ids], "messages", chat=True)

    async def complete(http: HttpRequest) -> Response:
        asked = wire.parse(wire.CompletionRequest, await read_json(http, max_body_bytes))
        check_model(http, asked.model, model.name)
        prompts = [
            check_ids(prompt, model.text.vocab_size, "prompt")
            if isinstance(prompt, list)
            else await tokenize(model.text.encode, prompt, len(prompt))
            for prompt in asked.prompts
        ]
        if not all(prompts):
            raise wire.BadRequestError("The prompt is empty: this model needs at least one token.", param="prompt")
        return await answer(http, asked, prompts, "prompt", chat=False)

    async def answer(
        http: HttpRequest, asked: wire.Generation, prompts: list[list[int]], source: str, *, chat: bool
    ) -> Response:
        record: Record = http.scope["record"]
        context, capacity = model.engine.context, model.engine.capacity
        if len(prompts) > capacity:
            raise wire.BadRequestError(
                f"{len(prompts)} prompts in one request: this model holds {capacity} at most.", param=source
            )
        requests = []
        for ids in prompts:
            limit = asked.limit or min(model.default_max_tokens, context - len(ids))
            if limit < 1 or len(ids) + limit > context:
                wanted = f" + {asked.limit} for {asked.limit_name}" if asked.limit else ""
                raise wire.BadRequestError(
                    f"This model's context is {context} tokens. Your request asks for {len(ids)} in {source}{wanted}. "
                    f"Shorten the prompt or lower {asked.limit_name}.",
                    param=source,
                    code="context_length_exceeded",
                )
            requests.append(
                Request(
                    ids,
                    limit,
                    model.stop_ids,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=asked.seed,
                )
            )
        record.prompt_tokens = sum(map(len, prompts))
        frame = wire.Answer(
            chat=chat,
            model=model.name,
            revision=model.revision,
            stream=bool(asked.stream),
            wants_usage=asked.wants_usage,
        )
        pieces = progress(model, requests, asked.stops, record)
        # The first event decides between an error's status and 200: after it only the stream itself can tell.
        first = await until_gone(http.receive, anext(pieces))
        if asked.stream:
            return EventStream(events(frame, first, pieces, requests, record))

        async def collect() -> Response:
            texts, finishes = ["" for _ in requests], ["" for _ in requests]
            async with contextlib.aclosing(chain(first, pieces)) as parts:
                async for index, text, finish in parts:
                    texts[index] += text
                    finishes[index] = finish or finishes[index]
            counted = wire.usage(record.prompt_tokens, record.completion_tokens)
            return Json(frame.whole(texts, finishes, counted))

        return await until_gone(http.receive, collect())

    return Service(
        {"/v1/chat/completions": chat, "/v1/completions": complete}, name=model.name, revision=model.revision
    )


async def progress(
    model: Generator, requests: list[Request], stops: list[str], record: Record
) -> AsyncGenerator[tuple[int, str, str | None]]:
    """(index, new text, finish reason or None) as it comes. Raises WireError when the engine gives up."""
    texts = [Growing(model.text.decode, stops) for _ in requests]
    done: set[int] = set()
    try:
        async with contextlib.aclosing(model.run(requests)) as run:
            async for index, event in run:
                if event.error:
                    raise wire.ServerError(f"The model could not finish this answer: {event.error}.")
                if record.ttft is None:
                    record.ttft = time.monotonic() - record.started
                if index in done:
                    continue
                text = texts[index].push(event.tokens)
                finish: str | None = event.finish
                if texts[index].stopped:
                    finish = "stop"
                    model.engine.cancel(requests[index])
                elif finish:
                    text += texts[index].rest()
                    # The held-back rest may have completed a stop string.
                    finish = "stop" if texts[index].stopped else finish
                record.completion_tokens = sum(request.generated for request in requests)
                if text or finish:
                    yield index, text, finish
                if finish:
                    done.add(index)
                    if len(done) == len(requests):
                        return
    except QueueFullError as error:
        raise wire.BusyError(
            "The model is busy: every place and the queue are taken. Retry after the time in Retry-After.",
            error.retry_after,
        ) from None
    except EngineError as error:
        raise wire.UnavailableError(f"The model takes no request now: {error}.") from None


async def chain(first: T, rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def events(
    frame: wire.Answer,
    first: tuple[int, str, str | None],
    pieces: AsyncGenerator[tuple[int, str, str | None]],
    requests: list[Request],
    record: Record,
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, `[DONE]` only after a whole one."""
    try:
        for index in range(len(requests)):
            if opening := frame.opening(index):
                yield sse(opening)
        async with contextlib.aclosing(chain(first, pieces)) as parts:
            async for index, text, finish in parts:
                if text:
                    yield sse(frame.piece(index, text))
                if finish:
                    yield sse(frame.piece(index, "", finish))
        if closing := frame.closing(wire.usage(record.prompt_tokens, record.completion_tokens)):
            yield sse(closing)
        yield b"data: [DONE]\n\n"
    except wire.WireError as error:
        record.outcome = "error"
        yield sse(error.body())


def embedding_app(model: Embedder, text: Text, name: str, revision: str, *, max_body_bytes: int) -> ASGIApp:
    # One forward at a time: torch already uses every core for it.
    worker = ThreadPoolExecutor(1, thread_name_prefix="embedding")

    async def embed(http: HttpRequest) -> Response:
        asked = wire.parse(wire.EmbeddingRequest, await read_json(http, max_body_bytes))
        check_model(http, asked.model, name)
        if asked.dimensions not in (None, model.dimensions):
            raise wire.BadRequestError(
                f"{name} has {model.dimensions} dimensions and cannot be shortened.",
                param="dimensions",
                code="unsupported_parameter",
            )
        record: Record = http.scope["record"]
        rows = [
            check_ids(item, text.vocab_size, "input")
            if isinstance(item, list)
            else await tokenize(text.encode, item, len(item))
            for item in asked.inputs
        ]
        for index, row in enumerate(rows):
            if not row:
                raise wire.BadRequestError(f"Input {index} has no token.", param="input", code="invalid_value")
            if len(row) > model.context:
                raise wire.BadRequestError(
                    f"This model's context is {model.context} tokens; input {index} has {len(row)}. Split it.",
                    param="input",
                    code="context_length_exceeded",
                )
        record.prompt_tokens = sum(map(len, rows))
        loop = asyncio.get_running_loop()
        vectors = await until_gone(http.receive, loop.run_in_executor(worker, model.embed, rows))
        packed = asked.encoding_format == "base64"
        return Json(wire.embeddings(name, vectors, [len(row) for row in rows], packed=packed))

    return Service({"/v1/embeddings": embed}, name=name, revision=revision)


async def tokenize(encode: Callable[[T], list[int]], given: T, length: int) -> list[int]:
    return await asyncio.to_thread(encode, given) if length > LONG_TEXT else encode(given)


def check_model(http: HttpRequest, asked: str, name: str) -> None:
    if asked != name:
        raise wire.NotFoundError(
            f"The model '{asked}' does not exist here; this address serves '{name}'.",
            param="model",
            code="model_not_found",
        )
    record: Record = http.scope["record"]
    record.model = name


def check_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    if max(ids) >= vocab_size:
        raise wire.BadRequestError(
            f"Token id {max(ids)} is not in the vocabulary: ids go up to {vocab_size - 1}.",
            param=param,
            code="invalid_value",
        )
    return ids

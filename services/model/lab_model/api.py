"""OpenAI's endpoints for one model: requests in, JSON or server-sent events out.

`generation_app` and `embedding_app` are plain ASGI applications; Ray Serve, or any server, runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection
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


def generation_app(model: Generator, *, max_body_bytes: int, hosts: Collection[str] = ()) -> ASGIApp:
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
        if len(asked.prompts) > model.engine.capacity:
            raise wire.BadRequestError(
                f"{len(asked.prompts)} prompts in one request: this model holds {model.engine.capacity} at most.",
                param="prompt",
            )
        prompts = await tokenize_all(model.text, asked.prompts, "prompt")
        return await answer(http, asked, prompts, "prompt", chat=False)

    async def answer(
        http: HttpRequest, asked: wire.Generation, prompts: list[list[int]], source: str, *, chat: bool
    ) -> Response:
        record: Record = http.scope["record"]
        context = model.engine.context
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

    posts = {"/v1/chat/completions": chat, "/v1/completions": complete}
    return Service(posts, name=model.name, revision=model.revision, hosts=hosts)


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
                # Of what was delivered: the engine may be steps ahead when a stop string is found here.
                record.completion_tokens += len(event.tokens) + (event.finish == "stop")
                text = texts[index].push(event.tokens)
                finish: str | None = event.finish
                if texts[index].stopped:
                    finish = "stop"
                    model.engine.cancel(requests[index])
                elif finish:
                    text += texts[index].rest()
                    # The held-back rest may have completed a stop string.
                    finish = "stop" if texts[index].stopped else finish
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


def embedding_app(
    model: Embedder,
    text: Text,
    name: str,
    revision: str,
    *,
    max_body_bytes: int,
    max_queued: int,
    hosts: Collection[str] = (),
) -> ASGIApp:
    # One forward at a time: torch already uses every core for it.
    worker = ThreadPoolExecutor(1, thread_name_prefix="embedding")
    waiting, seconds = 0, 0.1  # requests here now; how long one takes, from asking to answer

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
        rows = await tokenize_all(text, asked.inputs, "input")
        for index, row in enumerate(rows):
            if len(row) > model.context:
                raise wire.BadRequestError(
                    f"This model's context is {model.context} tokens; input {index} has {len(row)}. Split it.",
                    param="input",
                    code="context_length_exceeded",
                )
        record.prompt_tokens = sum(map(len, rows))
        nonlocal waiting, seconds
        if waiting > max_queued:
            raise wire.BusyError("The model is busy: its queue is full. Retry after the time in Retry-After.", seconds)
        waiting += 1
        left, started = threading.Event(), time.monotonic()
        try:
            work = asyncio.get_running_loop().run_in_executor(worker, model.embed, rows, left)
            vectors = await until_gone(http.receive, work)
        finally:
            left.set()
            waiting -= 1
        seconds += 0.1 * (time.monotonic() - started - seconds)
        packed = asked.encoding_format == "base64"
        return Json(wire.embeddings(name, vectors, [len(row) for row in rows], packed=packed))

    return Service({"/v1/embeddings": embed}, name=name, revision=revision, hosts=hosts)


async def tokenize(encode: Callable[[T], list[int]], given: T, length: int) -> list[int]:
    return await asyncio.to_thread(encode, given) if length > LONG_TEXT else encode(given)


async def tokenize_all(text: Text, given: list[str | list[int]], param: str) -> list[list[int]]:
    """Texts to token ids; token ids are checked. Raises BadRequestError for an empty one and for an unknown id."""

    def work() -> list[list[int]]:
        rows = [item if isinstance(item, list) else text.encode(item) for item in given]
        for index, row in enumerate(rows):
            if not row:
                raise wire.BadRequestError(
                    f"'{param}' {index} is empty: this model needs at least one token.",
                    param=param,
                    code="invalid_value",
                )
            if max(row) >= text.vocab_size:
                raise wire.BadRequestError(
                    f"Token id {max(row)} is not in the vocabulary: ids go up to {text.vocab_size - 1}.",
                    param=param,
                    code="invalid_value",
                )
        return rows

    long = len(given) > 100 or sum(map(len, given)) > LONG_TEXT
    return await asyncio.to_thread(work) if long else work()


def check_model(http: HttpRequest, asked: str, name: str) -> None:
    if asked != name:
        raise wire.NotFoundError(
            f"The model '{asked}' does not exist here; this address serves '{name}'.",
            param="model",
            code="model_not_found",
        )
    record: Record = http.scope["record"]
    record.model = name

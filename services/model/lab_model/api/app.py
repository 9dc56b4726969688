"""OpenAI's endpoints for one model: requests in, JSON or server-sent events out.

`generation_app` and `embedding_app` are plain ASGI applications; Ray Serve, or any server, runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import errors
from ..encoders.embedder import Embedder
from ..engine.sampler import Sampling
from ..engine.scheduler import Request
from ..errors import deadline_exceeded
from ..text.choice import Choice
from ..text.grammar import ANY_OBJECT, GrammarError, Grammars, Schema, TokenGrammar, answer_source
from ..text.tokenizer import TemplateError, Text
from ..text.tool_calls import Calls, ForcedCalls, FreeCalls, told
from .generator import Flow, Generator, Work
from .http.service import Endpoint, EventStream, Json, Record, Service, read_json, sse, until_gone
from .http.usage import Used
from .wire.answers import Answer, Piece, embeddings, usage
from .wire.chat import ChatRequest, ChosenFunction
from .wire.requests import CompletionRequest, EmbeddingRequest, Generation, parse

T = TypeVar("T")

# A text this long takes milliseconds to tokenize: not on the event loop.
LONG_TEXT = 20_000
LONGEST_TIMEOUT_MS = 24 * 3600 * 1000
# Applications


def generation_app(model: Generator, *, max_body_bytes: int, hosts: Collection[str] = ()) -> ASGIApp:
    def reading(answer: Callable[[Generator, HttpRequest, Any], Awaitable[Response]]) -> Endpoint:
        async def endpoint(http: HttpRequest) -> Response:
            return await answer(model, http, await read_json(http, max_body_bytes))

        return endpoint

    posts = {"/v1/chat/completions": reading(converse), "/v1/completions": reading(complete)}
    return Service(posts, name=model.name, revision=model.revision, hosts=hosts)


async def converse(model: Generator, http: HttpRequest, body: Any) -> Response:
    if model.kind != "chat":
        raise errors.BadRequestError(
            f"{model.name} is a base model without a chat template; use /v1/completions.", param="model"
        )
    asked = parse(ChatRequest, body)
    check_model(http, asked.model, model.name)
    messages = [message.plain() for message in asked.messages]
    chosen = asked.tool_choice or "auto"
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or () if chosen != "none"]
    size, shown = 0, list[dict[str, Any]]()
    if model.text.takes_tools:
        shown = tools
        # What its template writes besides the contents.
        size += sum(len(call.function.arguments) for message in asked.messages for call in message.tool_calls or ())
        size += len(tools) * (LONG_TEXT + 1)
    else:
        messages = told(messages, tools)
    size += sum(len(message["content"]) for message in messages)
    try:
        ids = await tokenize(lambda said: model.text.chat(said, shown), messages, size)
    except TemplateError as error:
        raise errors.BadRequestError(
            f"The model's chat template does not take these messages: {error}", param="messages"
        ) from None
    grammar = await grammar_of(model, asked)

    def calls() -> Calls | None:
        if not tools:
            return None
        most = 1 if asked.parallel_tool_calls is False else None
        return FreeCalls([tool["function"]["name"] for tool in tools], most) if chosen == "auto" else ForcedCalls()

    return await answer(model, http, asked, [ids], "messages", chat=True, grammar=grammar, calls=calls)


async def complete(model: Generator, http: HttpRequest, body: Any) -> Response:
    asked = parse(CompletionRequest, body)
    check_model(http, asked.model, model.name)
    check_capacity(model, len(asked.prompts), "prompt")
    prompts = await tokenize_all(model.text, model.vocab_size, asked.prompts, "prompt")
    return await answer(model, http, asked, prompts, "prompt", chat=False)


def check_capacity(model: Generator, count: int, param: str) -> None:
    if count > model.engine.capacity:
        raise errors.BadRequestError(
            f"{count} answers in one request: this model holds {model.engine.capacity} at most.", param=param
        )


async def answer(
    model: Generator,
    http: HttpRequest,
    asked: Generation,
    prompts: list[list[int]],
    source: str,
    *,
    chat: bool,
    grammar: TokenGrammar | None = None,
    calls: Callable[[], Calls | None] = lambda: None,
) -> Response:
    record: Record = http.scope["record"]
    context, each = model.engine.context, asked.n or 1
    check_capacity(model, len(prompts) * each, "n")
    unknown = max(asked.logit_bias or (0,))
    if unknown >= model.vocab_size:
        raise errors.BadRequestError(
            f"Token id {unknown} is not in the vocabulary: ids go up to {model.vocab_size - 1}.",
            param="logit_bias",
            code="invalid_value",
        )
    deadline = deadline_of(http)
    requests = []
    for ids in prompts:
        limit = asked.limit or min(model.default_max_tokens, context - len(ids))
        if limit < 1 or len(ids) + limit > context:
            wanted = f" + {asked.limit} for {asked.limit_name}" if asked.limit else ""
            raise errors.BadRequestError(
                f"This model's context is {context} tokens. Your request asks for {len(ids)} in {source}{wanted}. "
                f"Shorten the prompt or lower {asked.limit_name}.",
                param=source,
                code="context_length_exceeded",
            )
        for choice in range(each):
            own = grammar.again() if grammar else None
            sampling = sampling_of(asked, choice)
            requests.append(Request(ids, limit, model.stop_ids, sampling, grammar=own, deadline=deadline))
    record.prompt_tokens = sum(map(len, prompts))
    frame = Answer(
        chat=chat,
        model=model.name,
        revision=model.revision,
        stream=bool(asked.stream),
        wants_usage=asked.wants_usage,
    )

    def counted() -> dict[str, Any]:
        # The choices of one prompt share it: what the first found in the cache was not computed for this answer.
        record.cached_tokens = sum(request.reused for request in requests[::each])
        return usage(record.prompt_tokens, record.completion_tokens, record.cached_tokens)

    shown = asked.shown is not None
    choices = [Choice(index, model.text, asked.stops, logprobs=shown, calls=calls()) for index in range(len(requests))]
    record.work = work = Work(requests, each)
    pieces = model.run(Flow(work, choices, record, stream=bool(asked.stream)))
    # The first event decides between an error's status and 200: after it only the stream itself can tell.
    first = await until_gone(http.receive, anext(pieces))
    if asked.stream:
        return EventStream(events(frame, first, pieces, len(choices), counted=counted, record=record))

    async def collect() -> Response:
        gathered: list[list[Piece]] = [[] for _ in choices]
        async with contextlib.aclosing(chain(first, pieces)) as parts:
            async for part in parts:
                for piece in part:
                    gathered[piece.index].append(piece)
        return Json(frame.whole(gathered, counted()))

    return await until_gone(http.receive, collect())


def sampling_of(asked: Generation, choice: int) -> Sampling:
    """The parameters of one of `n` choices: seeded, each has a random stream of its own."""
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=asked.logit_bias or {},
        logprobs=asked.shown,
        seed=None if asked.seed is None else asked.seed + choice,
    )


def deadline_of(http: HttpRequest) -> float | None:
    """When the caller gives up, of `time.monotonic`; None: never. Raises BadRequestError, DeadlineExceededError."""
    given = http.headers.get("x-request-timeout-ms")
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 0 < int(given) <= LONGEST_TIMEOUT_MS):
        raise errors.BadRequestError(
            f"The header x-request-timeout-ms is whole milliseconds from 1 to {LONGEST_TIMEOUT_MS}.",
            param="x-request-timeout-ms",
            code="invalid_value",
        )
    record: Record = http.scope["record"]
    deadline = record.started + int(given) / 1000
    if time.monotonic() >= deadline:
        raise deadline_exceeded()
    return deadline


async def grammar_of(model: Generator, asked: ChatRequest) -> TokenGrammar | None:
    """What the answer is bound to, None: any text. Raises BadRequestError that names the schema at fault."""
    schema = asked.response_format.schema_ if asked.response_format else None
    chosen = asked.tool_choice or "auto"
    named = chosen.function.name if isinstance(chosen, ChosenFunction) else None
    must_call = chosen != "auto"
    tools = [] if chosen == "none" else asked.tools or []
    if chosen == "none" or not (must_call or schema or any(tool.function.strict for tool in tools)):
        tools = []
    functions = {
        tool.function.name: tool.function.schema_ if must_call or tool.function.strict else ANY_OBJECT
        for tool in tools
        if named in (None, tool.function.name)
    }
    if schema is None and not functions:
        return None

    def build(grammars: Grammars) -> TokenGrammar:
        try:
            several = named is None and asked.parallel_tool_calls is not False
            source = answer_source(schema, functions, must_call=must_call and bool(functions), several=several)
            return grammars.make(source)
        except GrammarError as error:
            for index, tool in enumerate(tools):
                if tool.function.name in functions:
                    check_schema(grammars, functions[tool.function.name], f"tools[{index}].function.parameters")
            if schema is not None:
                check_schema(grammars, schema, "response_format.json_schema.schema")
            raise unenforceable(error, "tools" if functions else "response_format") from None

    return await model.grammar(build)


def check_schema(grammars: Grammars, schema: Schema, param: str) -> None:
    try:
        grammars.make(answer_source(schema))
    except GrammarError as error:
        raise unenforceable(error, param) from None


def unenforceable(error: GrammarError, param: str) -> errors.BadRequestError:
    return errors.BadRequestError(f"'{param}' cannot be enforced: {error}", param=param, code="invalid_value")


async def chain(first: T, rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def events(
    frame: Answer,
    first: list[Piece],
    pieces: AsyncGenerator[list[Piece]],
    choices: int,
    *,
    counted: Callable[[], dict[str, Any]],
    record: Record,
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, `[DONE]` only after a whole one."""
    try:
        # Who speaks leaves with the first words, and what was used with the end: a write less each.
        opened = [opening for index in range(choices) if (opening := frame.opening(index))]
        async with contextlib.aclosing(chain(first, pieces)) as parts:
            async for part in parts:
                chunks = [chunk for piece in part for chunk in frame.chunks(piece)]
                yield b"".join(map(sse, opened + chunks))
                opened = []
        closing = frame.closing(counted())
        yield (sse(closing) if closing else b"") + b"data: [DONE]\n\n"
    except errors.ApiError as error:
        record.outcome = "error"
        yield sse(error.body())


class Forward:
    """What the embedder does for one request of the API."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.ended = asyncio.Event()
        self._rows, self._tokens = rows, 0

    def end(self, work: Future[list[list[float]]]) -> None:
        if not work.cancelled() and work.exception() is None:
            self._tokens = sum(len(row) for row, vector in zip(self._rows, work.result(), strict=True) if vector)
        self.ended.set()

    def used(self) -> Used:
        """Tokens of the inputs that were computed."""
        return Used(self._tokens, 0, 0)


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
        asked = parse(EmbeddingRequest, await read_json(http, max_body_bytes))
        check_model(http, asked.model, name)
        if asked.dimensions not in (None, model.dimensions):
            raise errors.BadRequestError(
                f"{name} has {model.dimensions} dimensions and cannot be shortened.",
                param="dimensions",
                code="unsupported_parameter",
            )
        record: Record = http.scope["record"]
        rows = await tokenize_all(text, text.vocab_size, asked.inputs, "input")
        for index, row in enumerate(rows):
            if len(row) > model.context:
                raise errors.BadRequestError(
                    f"This model's context is {model.context} tokens; input {index} has {len(row)}. Split it.",
                    param="input",
                    code="context_length_exceeded",
                )
        record.prompt_tokens = sum(map(len, rows))
        nonlocal waiting, seconds
        if waiting > max_queued:
            raise errors.BusyError(
                "The model is busy: its queue is full. Retry after the time in Retry-After.", seconds
            )
        waiting += 1
        left, started = threading.Event(), time.monotonic()
        try:
            work, loop = worker.submit(model.embed, rows, left), asyncio.get_running_loop()
            record.work = forward = Forward(rows)
            work.add_done_callback(lambda done: loop.call_soon_threadsafe(forward.end, done))
            vectors = await until_gone(http.receive, asyncio.wrap_future(work))
        finally:
            left.set()
            waiting -= 1
        seconds += 0.1 * (time.monotonic() - started - seconds)
        packed = asked.encoding_format == "base64"
        return Json(embeddings(name, vectors, [len(row) for row in rows], packed=packed))

    return Service({"/v1/embeddings": embed}, name=name, revision=revision, hosts=hosts)


async def tokenize(encode: Callable[[T], list[int]], given: T, length: int) -> list[int]:
    return await asyncio.to_thread(encode, given) if length > LONG_TEXT else encode(given)


async def tokenize_all(text: Text, vocab: int, given: list[str | list[int]], param: str) -> list[list[int]]:
    """Texts to token ids; token ids are checked. Raises BadRequestError for an empty one and for an unknown id."""

    def work() -> list[list[int]]:
        rows = [item if isinstance(item, list) else text.encode(item) for item in given]
        for index, row in enumerate(rows):
            if not row:
                raise errors.BadRequestError(
                    f"'{param}' {index} is empty: this model needs at least one token.",
                    param=param,
                    code="invalid_value",
                )
            if max(row) >= vocab:
                raise errors.BadRequestError(
                    f"Token id {max(row)} is not in the vocabulary: ids go up to {vocab - 1}.",
                    param=param,
                    code="invalid_value",
                )
        return rows

    long = len(given) > 100 or sum(map(len, given)) > LONG_TEXT
    return await asyncio.to_thread(work) if long else work()


def check_model(http: HttpRequest, asked: str, name: str) -> None:
    if asked != name:
        raise errors.NotFoundError(
            f"The model '{asked}' does not exist here; this address serves '{name}'.",
            param="model",
            code="model_not_found",
        )
    record: Record = http.scope["record"]
    record.model = name

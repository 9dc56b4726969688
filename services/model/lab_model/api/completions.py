"""POST /v1/completions, and the generation of answers, which chat uses too.

Knows prompts as token ids, and writes answers, whole or streamed. Knows nothing of messages or tools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.request import Request
from ..engine.sampling_params import SamplingParams
from ..errors import BadRequestError
from ..text.choice import Choice, Piece, TokenLogprob
from ..text.grammar import TokenGrammar
from ..text.pieces import cut, join, show
from ..text.tool_calls import CallParser
from .generator import EngineClient, EngineWork, OutputCollector
from .http.deadline import deadline_of
from .http.record import TIMINGS, Record
from .http.service import EventStream, Json, sse, until_disconnect
from .inputs import check_model, tokenize_all
from .inspect import score_all
from .wire.answers import Answer, usage
from .wire.requests import CompletionRequest, Generation

T = TypeVar("T")
COMPLETION_TOKENS = 16  # OpenAI's default at /v1/completions


async def completions(model: EngineClient, http: HttpRequest, request: CompletionRequest) -> Response:
    check_model(http, request.model, model.name)
    check_capacity(model, len(request.prompts), "prompt")
    prompts = await tokenize_all(model.text, model.vocab_size, request.prompts, "prompt")
    given = zip(request.prompts, prompts, strict=True)
    echoes = [await echo(model, http, *each, request.logprobs) for each in given] if request.echo else []
    return await generate(model, http, request, prompts, "prompt", chat=False, echoes=echoes)


class Echo(NamedTuple):
    """A prompt that the answer repeats before its own text. scored: its tokens, if logprobs are requested."""

    text: str
    scored: list[TokenLogprob] | None


async def echo(
    model: EngineClient, http: HttpRequest, prompt: str | list[int], ids: list[int], logprobs: int | None
) -> Echo:
    """The prompt, whose tokens are `ids`, as text. logprobs: alternatives of each token; None: no scores. Raises
    ApiError."""
    if isinstance(prompt, str):
        text, pieces = prompt, await asyncio.to_thread(cut, model.text, prompt, ids, special=True)
    else:
        written, pieces = join(model.text, ids)
        text = show(written)
    if logprobs is None:
        return Echo(text, None)
    scored = []
    for piece, score in zip(pieces, await score_all(model, http, ids, logprobs, "prompt"), strict=True):
        top = [(model.text.name(token), logprob) for token, logprob in score.top] if score else []
        scored.append(TokenLogprob(model.text.name(piece.id), score.logprob if score else None, top, piece.start))
    return Echo(text, scored)


async def generate(
    model: EngineClient,
    http: HttpRequest,
    params: Generation,
    prompts: list[list[int]],
    source: str,
    *,
    chat: bool,
    grammar: TokenGrammar | None = None,
    calls: Callable[[], CallParser | None] = lambda: None,
    echoes: Sequence[Echo] = (),
) -> Response:
    """The answer to `prompts`, with `params.n` choices for each. source: name of the field of the prompts, for errors.
    echoes: one for each prompt, or none."""
    record: Record = http.scope["record"]
    # 1. The engine's requests, one for each choice.
    context, each = model.engine.context, params.n or 1
    check_capacity(model, len(prompts) * each, "n")
    unknown = max(params.logit_bias or (0,))
    if unknown >= model.vocab_size:
        raise BadRequestError(
            f"Token id {unknown} is not in the vocabulary: ids go up to {model.vocab_size - 1}.",
            param="logit_bias",
            code="invalid_value",
        )
    deadline = deadline_of(http)
    timeline = record.timeline = TIMINGS.begin(record.call_id, record.started)
    requests = []
    for ids in prompts:
        limit = params.limit
        if limit is None:
            limit = min(model.default_max_tokens if chat else COMPLETION_TOKENS, context - len(ids))
        if (limit < 1 and params.limit is None) or len(ids) + limit > context:
            wanted = f" + {params.limit} for {params.limit_name}" if params.limit else ""
            raise BadRequestError(
                f"This model's context is {context} tokens. Your request asks for {len(ids)} in {source}{wanted}. "
                f"Shorten the prompt or lower {params.limit_name}.",
                param=source,
                code="context_length_exceeded",
            )
        for choice in range(each):
            own = grammar.again() if grammar else None
            sampling = sampling_of(params, choice)
            requests.append(Request(ids, limit, model.stop_ids, sampling, own, deadline, on_phase=timeline.mark))
    # 2. The collector of their output.
    record.prompt_tokens = sum(map(len, prompts))
    logprobs = params.top_count is not None
    repeated = [echo for echo in echoes for _ in range(each)] or [Echo("", None)] * len(requests)
    choices = [
        Choice(i, model.text, params.stops, logprobs=logprobs, calls=calls(), offset=len(echo.text))
        for i, echo in enumerate(repeated)
    ]
    record.work = work = EngineWork(requests, each)
    frame = Answer(
        chat=chat,
        model=model.name,
        revision=model.revision,
        stream=bool(params.stream),
        wants_usage=params.wants_usage,
    )

    def final_usage() -> dict[str, Any]:
        # The choices of a prompt share it, so only the prefix that the first choice found in the cache was not
        # computed. A prompt that was scored was computed for that.
        found = [request.prefix_hit_tokens for request in requests[::each]]
        record.cached_tokens = 0 if any(echo.scored for echo in echoes) else sum(found)
        return usage(record.prompt_tokens, record.completion_tokens, record.cached_tokens)

    # 3. The answer. The first pieces decide between an error status and 200; a later error is an event of the stream.
    if params.limit == 0:  # the answer is the echo alone
        pieces = one_of([Piece(i, finish="length") for i in range(len(requests))])
    else:
        timeline.mark("queue")
        pieces = model.run(OutputCollector(work, choices, record, stream=bool(params.stream)))
    first = await until_disconnect(http.receive, anext(pieces))
    first = [Piece(i, echo.text, scored=echo.scored) for i, echo in enumerate(repeated) if echoes] + first
    if params.stream:
        return EventStream(events(frame, first, pieces, len(choices), final_usage=final_usage))

    async def collect() -> Response:
        gathered: list[list[Piece]] = [[] for _ in choices]
        async with contextlib.aclosing(chain(first, pieces)) as parts:
            async for part in parts:
                for piece in part:
                    gathered[piece.index].append(piece)
        return Json(frame.whole(gathered, final_usage()))

    return await until_disconnect(http.receive, collect())


async def events(
    frame: Answer,
    first: list[Piece],
    pieces: AsyncGenerator[list[Piece]],
    choices: int,
    *,
    final_usage: Callable[[], dict[str, Any]],
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events; `[DONE]` only after a complete one."""
    # The role is sent with the first text, and the usage with the end, which saves a write for each.
    openings = [opening for index in range(choices) if (opening := frame.opening(index))]
    async with contextlib.aclosing(chain(first, pieces)) as parts:
        async for part in parts:
            chunks = [chunk for piece in part for chunk in frame.chunks(piece)]
            yield b"".join(map(sse, openings + chunks))
            openings = []
    closing = frame.closing(final_usage())
    yield (sse(closing) if closing else b"") + b"data: [DONE]\n\n"


def sampling_of(params: Generation, choice: int) -> SamplingParams:
    """The sampling parameters of one of `n` choices. With a seed each choice has its own random stream."""
    return SamplingParams(
        temperature=1.0 if params.temperature is None else params.temperature,
        top_p=1.0 if params.top_p is None else params.top_p,
        top_k=max(params.top_k or 0, 0),
        min_p=params.min_p or 0.0,
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        repetition_penalty=params.repetition_penalty or 1.0,
        logit_bias=params.logit_bias or {},
        logprobs=params.top_count,
        seed=None if params.seed is None else params.seed + choice,
    )


def check_capacity(model: EngineClient, count: int, param: str) -> None:
    if count > model.engine.capacity:
        raise BadRequestError(
            f"{count} answers in one request are too many: this model allows {model.engine.capacity}.", param=param
        )


async def one_of(item: T) -> AsyncGenerator[T]:
    yield item


async def chain(first: T, rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item

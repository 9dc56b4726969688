"""POST /v1/inspect/...: the tokens of a text, and the probability of each token.

Knows token ids, texts and the engine's scores. Does not compute logits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.request import Request, StepOutput
from ..engine.sampling_params import Logprob, SamplingParams
from ..engine.scoring import Candidate, NextToken, ScoringRequest, TokenScore, next_token, score_tokens
from ..errors import BadRequestError, ServerError
from ..text.choice import Piece
from ..text.openai_tokenizers import openai_tokenizer
from ..text.pieces import TokenPiece, Vocabulary, cut, join, name_of, show
from ..text.tokenizer import ModelTokenizer, TemplateError
from .generator import EngineClient, EngineWork, OutputCollector
from .http.deadline import deadline_of
from .http.record import Record
from .http.service import Json, until_disconnect
from .inputs import check_model, tokenize, tokenize_all
from .wire.answers import LEAST_LOGPROB, usage
from .wire.inspect import (
    DEFAULT_CANDIDATES,
    DEFAULT_STEPS,
    DetokenizeRequest,
    NextTokenRequest,
    Sampled,
    ScoreRequest,
    SourceRequest,
    StepsRequest,
    TokenizeRequest,
)

Object = dict[str, Any]
DEFAULT_ALTERNATIVES = 5


class TokenizerClient(Protocol):
    """A model of any kind, as tokenize and detokenize need it."""

    name: str
    text: ModelTokenizer


async def tokenize_text(model: TokenizerClient, http: HttpRequest, request: TokenizeRequest) -> Response:
    check_model(http, request.model or model.name, model.name)
    vocabulary = await vocabulary_of(model, request.tokenizer)
    answer: Object = {"model": model.name, "tokenizer": request.tokenizer or model.name}
    if request.messages is not None:
        ids = await chat_ids(model.text, request)
        found, pieces = join(vocabulary, ids)
        text = show(found)
    else:
        text, special = request.text or "", request.add_special_tokens is not False
        ids = await tokenize(lambda given: vocabulary.encode(given, special=special), text, len(text))
        pieces = cut(vocabulary, text, ids, special=special)
    sizes = {"count": len(ids), "characters": len(text), "bytes": len(text.encode())}
    return Json(answer | sizes | {"text": text, "ids": ids, "tokens": [token_of(piece) for piece in pieces]})


async def detokenize(model: TokenizerClient, http: HttpRequest, request: DetokenizeRequest) -> Response:
    check_model(http, request.model or model.name, model.name)
    vocabulary = await vocabulary_of(model, request.tokenizer)
    check_ids(request.ids, vocabulary.vocab_size, "ids")
    found, pieces = join(vocabulary, request.ids)
    answer = {"model": model.name, "tokenizer": request.tokenizer or model.name, "count": len(pieces)}
    try:
        text, complete = found.decode(), True
    except UnicodeDecodeError:
        text, complete = show(found), False
    if not request.tokenizer and not model.text.byte_level:
        text = model.text.tokenizer.decode(request.ids, skip_special_tokens=False)
    tokens = [token_of(piece) for piece in pieces]
    return Json(answer | {"text": text, "complete": complete, "bytes": list(found), "tokens": tokens})


async def next_tokens(model: EngineClient, http: HttpRequest, request: NextTokenRequest) -> Response:
    check_model(http, request.model or model.name, model.name)
    ids = await source_ids(model, request, request.token_ids)
    params, count = sampling_of(request), request.top or DEFAULT_CANDIDATES
    found: list[NextToken] = []

    def receive(_: int, logits: torch.Tensor) -> None:
        found[:] = [next_token(logits[0], params, count)]

    cached = await score(model, http, ids, first=len(ids) - 1, receive=receive, source=source_name(request))
    result = found[0]
    answer = {
        "model": model.name,
        "tokens": [candidate_of(model.text, each) for each in result.candidates],
        "kept": result.kept,
        "cut": result.cut,
        "entropy_bits": result.entropy,
        "vocabulary": model.engine.vocab,
        "prompt_ids": ids,
    }
    return Json(answer | {"usage": usage(len(ids), 0, cached)})


async def score_text(model: EngineClient, http: HttpRequest, request: ScoreRequest) -> Response:
    check_model(http, request.model or model.name, model.name)
    if request.token_ids is not None:
        ids = request.token_ids
        check_ids(ids, model.vocab_size, "token_ids")
        text, pieces = _joined(model.text, ids)
    elif request.messages is not None:
        ids = await chat_ids(model.text, request)
        text, pieces = _joined(model.text, ids)
    else:
        text = request.text or ""
        ids = await source_ids(model, request, None)
        pieces = cut(model.text, text, ids, special=True)
    if len(ids) < 2:
        raise BadRequestError(
            f"'{source_name(request)}' has only one token, but the first token of a text cannot be scored.",
            param=source_name(request),
            code="invalid_value",
        )
    top = DEFAULT_ALTERNATIVES if request.top is None else request.top
    scores = await score_all(model, http, ids, top, source_name(request))
    logprobs = [each.logprob for each in scores if each is not None]
    mean = -sum(logprobs) / len(logprobs)
    bits = -sum(logprobs) / math.log(2)
    scored_bytes = sum(len(piece.bytes) for piece in pieces[1:])
    tokens = [token_of(piece) | score_of(model.text, each) for piece, each in zip(pieces, scores, strict=True)]
    answer = {
        "model": model.name,
        "text": text,
        "tokens": tokens,
        "perplexity": math.exp(min(mean, 700)),
        "bits": bits,
        "bits_per_token": bits / len(logprobs),
        "bits_per_byte": bits / max(scored_bytes, 1),
    }
    return Json(answer | {"usage": usage(len(ids), 0, 0)})


async def generate_steps(model: EngineClient, http: HttpRequest, request: StepsRequest) -> Response:
    check_model(http, request.model or model.name, model.name)
    ids = await source_ids(model, request, request.token_ids)
    limit = min(request.max_tokens or DEFAULT_STEPS, model.engine.context - len(ids))
    if limit < 1:
        raise too_long(model, len(ids), source_name(request))
    top = DEFAULT_ALTERNATIVES if request.top is None else request.top
    sampling = sampling_of(request, logprobs=top, seed=request.seed)
    record: Record = http.scope["record"]
    record.prompt_tokens = len(ids)
    one = Request(ids, limit, model.stop_ids, sampling, deadline=deadline_of(http))
    collected = await run(model, http, one)
    steps = []
    for token, logprob in zip(collected.tokens, collected.logprobs, strict=True):
        alternatives = [_alternative(model.text, *each) for each in logprob.top]
        steps.append(_alternative(model.text, token, logprob.logprob) | {"alternatives": alternatives})
    record.cached_tokens = one.prefix_hit_tokens
    answer = {
        "model": model.name,
        "text": show(b"".join(name_of(model.text, token)[1] for token in collected.tokens)),
        "steps": steps,
        "token_ids": [*(request.token_ids or ()), *collected.tokens],
        "finish_reason": collected.finish,
        "prompt_ids": ids,
    }
    return Json(answer | {"usage": usage(len(ids), record.completion_tokens, record.cached_tokens)})


async def vocabulary_of(model: TokenizerClient, name: str | None) -> Vocabulary:
    """OpenAI's tokenizer of this name, or the model's own."""
    return await asyncio.to_thread(openai_tokenizer, name) if name else model.text


# ---- the engine


class RawOutput:
    """Replaces a `Choice`: stores the tokens and logprobs of the engine unchanged."""

    ends_itself = False

    def __init__(self) -> None:
        self.ended = False
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.finish: str | None = None

    def push(self, output: StepOutput) -> Piece | None:
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.finish = output.finish
        self.ended = output.finish is not None
        return Piece(0, finish=output.finish) if output.finish else None


async def run(model: EngineClient, http: HttpRequest, request: Request) -> RawOutput:
    """The engine's whole output for one request. Raises ApiError; a disconnect cancels the request."""
    record: Record = http.scope["record"]
    output = RawOutput()
    record.work = work = EngineWork([request], 1)
    collector = OutputCollector(work, [output], record, stream=False)

    async def collect() -> None:
        async for _ in model.run(collector):
            pass

    await until_disconnect(http.receive, collect())
    return output


async def score(
    model: EngineClient,
    http: HttpRequest,
    ids: Sequence[int],
    *,
    first: int,
    receive: Callable[[int, torch.Tensor], None],
    source: str,
) -> int:
    """Let the engine score a text, see ScoringRequest. Returns how many of its tokens came from the prefix cache.

    Raises ApiError; a text that is too long is an error of the field `source`.
    """
    if len(ids) >= model.engine.context:
        raise too_long(model, len(ids), source)
    record: Record = http.scope["record"]
    record.prompt_tokens = len(ids)
    request = ScoringRequest(ids, first=first, receive=receive, deadline=deadline_of(http))
    await run(model, http, request)
    # The output that ends it is not a token, so it sets no time to first token.
    record.completion_tokens, record.ttft = 0, None
    record.cached_tokens = request.prefix_hit_tokens
    return request.prefix_hit_tokens


async def score_all(
    model: EngineClient, http: HttpRequest, ids: Sequence[int], top: int, source: str
) -> list[TokenScore | None]:
    """The score of each token of a text with `top` alternatives, in their order; None for the first token, which has no
    score. Raises ApiError; a text that is too long is an error of the field `source`."""
    scores: list[TokenScore | None] = [None] * len(ids)

    def receive(first: int, logits: torch.Tensor) -> None:
        targets = ids[first + 1 : first + 1 + len(logits)]
        scores[first + 1 : first + 1 + len(targets)] = score_tokens(logits[: len(targets)], targets, top)

    if len(ids) > 1:
        await score(model, http, ids, first=0, receive=receive, source=source)
    if any(math.isnan(each.logprob) for each in scores if each is not None):
        raise ServerError("The model's logits were not finite.")
    return scores


def too_long(model: EngineClient, count: int, source: str) -> BadRequestError:
    return BadRequestError(
        f"This model's context is {model.engine.context} tokens, one of which is kept for the next token; '{source}' "
        f"has {count}. Shorten it.",
        param=source,
        code="context_length_exceeded",
    )


# ---- the request's text as token ids


def source_name(request: SourceRequest) -> str:
    """The field that holds the text."""
    names = ("messages", "text", "token_ids")
    return next(name for name in names if getattr(request, name, None) is not None)


async def chat_ids(tokenizer: ModelTokenizer, request: SourceRequest) -> list[int]:
    """The messages, rendered by the chat template. Raises BadRequestError."""
    if tokenizer.template is None:
        raise BadRequestError("This model has no chat template: send 'text'.", param="messages", code="invalid_value")
    messages = [message.plain() for message in request.messages or ()]
    size = sum(len(message["content"]) for message in messages)
    try:
        return await tokenize(tokenizer.chat, messages, size)
    except TemplateError as error:
        raise BadRequestError(
            f"The model's chat template does not accept these messages: {error}", param="messages"
        ) from None


async def source_ids(model: EngineClient, request: SourceRequest, more: list[int] | None) -> list[int]:
    """Token ids of the text or the messages, followed by `more`. Raises BadRequestError."""
    if request.messages is not None:
        ids = await chat_ids(model.text, request)
    else:
        (ids,) = await tokenize_all(model.text, model.vocab_size, [request.text or ""], "text")
    check_ids(more or (), model.vocab_size, "token_ids")
    return [*ids, *(more or ())]


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
    if ids and max(ids) >= vocab:
        raise BadRequestError(
            f"Token id {max(ids)} is not in the vocabulary: ids go up to {vocab - 1}.",
            param=param,
            code="invalid_value",
        )


def sampling_of(request: Sampled, **more: Any) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        **more,
    )


def _joined(tokenizer: ModelTokenizer, ids: Sequence[int]) -> tuple[str, list[TokenPiece]]:
    found, pieces = join(tokenizer, ids)
    return show(found), pieces


# ---- the answer's parts


def token_of(piece: TokenPiece) -> Object:
    shown = {"id": piece.id, "text": piece.text, "bytes": list(piece.bytes), "start": piece.start, "end": piece.end}
    return shown | {"special": piece.special}


def named(tokenizer: ModelTokenizer, token: int) -> Object:
    text, found, special = name_of(tokenizer, token)
    return {"id": token, "text": text, "bytes": list(found), "special": special}


def _alternative(tokenizer: ModelTokenizer, token: int, logprob: float) -> Object:
    logprob = max(logprob, LEAST_LOGPROB)
    return named(tokenizer, token) | {"logprob": logprob, "probability": math.exp(logprob)}


def score_of(tokenizer: ModelTokenizer, found: TokenScore | None) -> Object:
    """logprob, probability, rank, surprise in bits and the alternatives of one token; null for the first one."""
    if found is None:
        return dict.fromkeys(("logprob", "probability", "rank", "surprise_bits")) | {"alternatives": []}
    logprob = max(found.logprob, LEAST_LOGPROB)
    return {
        "logprob": logprob,
        "probability": math.exp(logprob),
        "rank": found.rank,
        "surprise_bits": -logprob / math.log(2),
        "alternatives": [_alternative(tokenizer, *each) for each in found.top],
    }


def candidate_of(tokenizer: ModelTokenizer, found: Candidate) -> Object:
    return named(tokenizer, found.token) | {
        "logit": found.logit,
        "logprob": max(found.logprob, LEAST_LOGPROB),
        "probability": math.exp(found.logprob),
        "after_temperature": found.tempered,
        "after_filters": found.final,
        "cut_by": found.cut_by,
    }

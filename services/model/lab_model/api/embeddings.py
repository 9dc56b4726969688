"""POST /v1/embeddings.

Knows texts, token ids and vectors. Knows nothing of how vectors are computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..encoders.probe import SentimentProbe
from ..encoders.queue import EncoderBusyError, EncoderHangsError, EncoderQueue
from ..errors import BadRequestError, BusyError, UnavailableError, deadline_exceeded
from ..text.tokenizer import ModelTokenizer
from .http.deadline import deadline_of
from .http.record import Record
from .http.service import Json, until_disconnect
from .inputs import check_model, tokenize_all
from .wire.answers import embedding_list
from .wire.requests import EmbeddingRequest


@dataclass(frozen=True)
class EncoderClient:
    """One encoder: its name, revision, tokenizer and queue.

    probe: computes the sentiment from its vectors; None for models for which it was not trained.
    """

    name: str
    revision: str
    text: ModelTokenizer
    queue: EncoderQueue
    probe: SentimentProbe | None = None
    kind: str = "embedding"


async def embeddings(model: EncoderClient, http: HttpRequest, request: EmbeddingRequest) -> Response:
    embedder: Any = model.queue.encoder
    check_model(http, request.model, model.name)
    if request.dimensions not in (None, embedder.dimensions):
        raise BadRequestError(
            f"{model.name} has {embedder.dimensions} dimensions and cannot be shortened.",
            param="dimensions",
            code="unsupported_parameter",
        )
    if request.input_vocabulary is None and not isinstance(request.inputs[0], str):
        raise BadRequestError(
            "The vocabulary of these token ids is not known. Clients such as LangChain's OpenAIEmbeddings send ids of "
            "OpenAI's vocabularies: send text instead (check_embedding_ctx_length=False there). If the ids are this "
            'model\'s own, add "input_vocabulary": "model".',
            param="input",
            code="invalid_value",
        )
    rows = await tokenize_all(model.text, model.text.vocab_size, request.inputs, "input")
    rows = [model.text.complete(row) for row in rows]
    vectors = await encode(model, http, rows, "input")
    base64 = request.encoding_format == "base64"
    return Json(embedding_list(model.name, vectors, [len(row) for row in rows], base64=base64))


async def encode(
    model: EncoderClient, http: HttpRequest, rows: Sequence[Sequence[int]], param: str, *, metered: int | None = None
) -> list[Any]:
    """The encoder's output for each row of token ids. metered: tokens of the request's usage, if not those of all rows.
    Raises BadRequestError for a row that is too long, BusyError, DeadlineExceededError, and UnavailableError if the
    encoder hangs. A disconnect cancels the work."""
    deadline = deadline_of(http)
    context = model.queue.encoder.context
    for index, row in enumerate(rows):
        if len(row) > context:
            raise BadRequestError(
                f"This model's context is {context} tokens; input {index} has {len(row)}. Split it.",
                param=param,
                code="context_length_exceeded",
            )
    record: Record = http.scope["record"]
    record.prompt_tokens = sum(map(len, rows)) if metered is None else metered
    try:
        with model.queue.submit(rows) as job:
            record.work = job
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await until_disconnect(http.receive, job.outputs)
    except TimeoutError:
        raise deadline_exceeded() from None
    except EncoderBusyError as error:
        raise BusyError(
            "The model is busy: its queue is full. Retry after the time in Retry-After.", error.retry_after
        ) from None
    except EncoderHangsError as error:
        raise UnavailableError(f"The model does not answer: {error}.") from None

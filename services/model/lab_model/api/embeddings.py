"""POST /v1/embeddings.

Knows texts, token ids and vectors. Knows nothing of how vectors are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..encoders.queue import EncoderBusyError, EncoderQueue
from ..errors import BadRequestError, BusyError
from ..text.tokenizer import ModelTokenizer
from .http.record import Record
from .http.service import Json, until_disconnect
from .inputs import check_model, tokenize_all
from .wire.answers import embedding_list
from .wire.requests import EmbeddingRequest, parse


@dataclass(frozen=True)
class EncoderClient:
    """One embedding model: its name, revision, tokenizer and queue."""

    name: str
    revision: str
    text: ModelTokenizer
    queue: EncoderQueue


async def embeddings(model: EncoderClient, http: HttpRequest, body: Any) -> Response:
    request, embedder = parse(EmbeddingRequest, body), model.queue.embedder
    check_model(http, request.model, model.name)
    if request.dimensions not in (None, embedder.dimensions):
        raise BadRequestError(
            f"{model.name} has {embedder.dimensions} dimensions and cannot be shortened.",
            param="dimensions",
            code="unsupported_parameter",
        )
    record: Record = http.scope["record"]
    rows = await tokenize_all(model.text, model.text.vocab_size, request.inputs, "input")
    for index, row in enumerate(rows):
        if len(row) > embedder.context:
            raise BadRequestError(
                f"This model's context is {embedder.context} tokens; input {index} has {len(row)}. Split it.",
                param="input",
                code="context_length_exceeded",
            )
    record.prompt_tokens = sum(map(len, rows))
    try:
        with model.queue.submit(rows) as job:
            record.work = job
            vectors = await until_disconnect(http.receive, job.vectors)
    except EncoderBusyError as error:
        raise BusyError(
            "The model is busy: its queue is full. Retry after the time in Retry-After.", error.retry_after
        ) from None
    base64 = request.encoding_format == "base64"
    return Json(embedding_list(model.name, vectors, [len(row) for row in rows], base64=base64))

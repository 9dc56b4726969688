"""Inputs that every endpoint reads: the model's name, texts as token ids.

Knows headers and the tokenizer. Knows nothing of single endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from ..errors import BadRequestError, NotFoundError
from ..text.tokenizer import ModelTokenizer
from .http.record import Record

T = TypeVar("T")

# Tokenizing a text of this many characters takes milliseconds, so it is done in a thread.
LONG_TEXT = 20_000


def check_model(http: HttpRequest, wanted: str, name: str) -> None:
    """Write the model into the request's record. Raises NotFoundError for another model's name."""
    if wanted != name:
        raise NotFoundError(
            f"This address serves the model '{name}', not '{wanted}'.",
            param="model",
            code="model_not_found",
        )
    record: Record = http.scope["record"]
    record.model = name


async def tokenize(encode: Callable[[T], list[int]], value: T, length: int) -> list[int]:
    """encode(value), in a thread if it is long. length: characters."""
    return await asyncio.to_thread(encode, value) if length > LONG_TEXT else encode(value)


async def tokenize_all(
    tokenizer: ModelTokenizer, vocab: int, inputs: list[str | list[int]], param: str
) -> list[list[int]]:
    """Texts to token ids; token ids are checked. Raises BadRequestError for an empty input and for an unknown id."""

    def work() -> list[list[int]]:
        rows = [item if isinstance(item, list) else tokenizer.encode(item) for item in inputs]
        for index, row in enumerate(rows):
            if not row:
                raise BadRequestError(
                    f"'{param}' {index} is empty: this model needs at least one token.",
                    param=param,
                    code="invalid_value",
                )
            if max(row) >= vocab:
                raise BadRequestError(
                    f"Token id {max(row)} is not in the vocabulary: ids go up to {vocab - 1}.",
                    param=param,
                    code="invalid_value",
                )
        return rows

    long = len(inputs) > 100 or sum(map(len, inputs)) > LONG_TEXT
    return await asyncio.to_thread(work) if long else work()

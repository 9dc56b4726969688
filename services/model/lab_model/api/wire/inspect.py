"""The requests of /v1/inspect: fields and limits.

Knows shapes. Knows nothing of HTTP servers, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from ...errors import BadRequestError
from .chat import Message
from .requests import MOST_INPUTS, MOST_LOGPROBS, Checked, Text, TokenIds, Whole

MOST_CHARACTERS = 100_000  # of a text: more is refused before it is tokenized
MOST_CANDIDATES = 200
MOST_STEPS = 256
DEFAULT_CANDIDATES = 20
DEFAULT_STEPS = 32

BoundedText = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
TokenizerName = Literal["cl100k_base", "o200k_base"]


class InspectRequest(Checked):
    """model: default is the first chat model of the catalogue."""

    model: Text | None = None


class SourceRequest(InspectRequest):
    """Either a text, or messages, which the model's chat template renders."""

    text: BoundedText | None = None
    messages: Messages | None = None

    def check(self) -> None:
        check_one(self, ("text", "messages"))


class TokenizeRequest(SourceRequest):
    """tokenizer: one of OpenAI's instead of the model's own; it has no chat template.
    add_special_tokens: whether to add those that the model expects around a text; messages have those of the template.
    """

    tokenizer: TokenizerName | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        super().check()
        if self.tokenizer and self.messages is not None:
            raise BadRequestError(
                f"'messages' needs a chat template, which {self.tokenizer} does not have: send 'text'.",
                param="messages",
                code="invalid_value",
            )


class DetokenizeRequest(InspectRequest):
    ids: TokenIds
    tokenizer: TokenizerName | None = None


class Sampled(SourceRequest):
    """The sampling parameters of chat, with their defaults; `token_ids` continue the text or the answer."""

    token_ids: TokenIds | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None


class NextTokenRequest(Sampled):
    """top: number of most likely tokens in the answer."""

    top: Annotated[Whole, Field(ge=1, le=MOST_CANDIDATES)] | None = None


class StepsRequest(Sampled):
    """top: number of alternatives for each step. max_tokens: largest number of steps."""

    top: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MOST_STEPS)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None


class ScoreRequest(SourceRequest):
    """token_ids: replaces a text. top: number of alternatives for each token."""

    token_ids: TokenIds | None = None
    top: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def check(self) -> None:
        check_one(self, ("text", "messages", "token_ids"))


def check_one(request: BaseModel, names: Sequence[str]) -> None:
    """Raises BadRequestError unless exactly one of these fields is given."""
    given = [name for name in names if getattr(request, name) is not None]
    if not given:
        raise BadRequestError(
            f"Missing required parameter: one of {', '.join(repr(name) for name in names)}.",
            param=names[0],
            code="missing_required_parameter",
        )
    if len(given) > 1:
        raise BadRequestError(
            f"'{given[1]}' cannot be combined with '{given[0]}': send one of them.",
            param=given[1],
            code="invalid_value",
        )


MOST_INSIDE_TOKENS = 48  # of a text for logit-lens and attention


class LensRequest(SourceRequest):
    """top: number of tokens for each layer and place."""

    top: Annotated[Whole, Field(ge=1, le=10)] | None = None


class AttentionRequest(SourceRequest):
    """layer: counted from 0; default: the first."""

    layer: Annotated[Whole, Field(ge=0)] | None = None


class MemoryRequest(InspectRequest):
    """tokens: length of a text whose share of the KV cache is computed."""

    tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None


class DeviceRequest(InspectRequest):
    pass

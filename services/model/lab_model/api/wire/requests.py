"""OpenAI's wire format of requests: fields, their limits, and what is refused by name.

Knows JSON. Knows nothing of HTTP servers, tokenizers or models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ...errors import BadRequestError

R = TypeVar("R", bound=BaseModel)


def _whole(value: Any) -> Any:
    # JSON has only one kind of number, so 64.0 equals 64.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
# fail_fast: a wrong list of a million entries must not create a million error objects.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1, max_length=131_072)]
MOST_INPUTS = 2048  # OpenAI's limit of embedding inputs
MOST_CHOICES = 128  # OpenAI's limit of `n`
MOST_LOGPROBS = 20
Text = Annotated[str, StringConstraints(min_length=1)]
# Each token's text is searched for stop strings: both limits bound the cost.
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Object = dict[str, Any]

# Accepted with any value, because they cannot change an answer.
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields of the API that are not supported: only values that change nothing are accepted. The fields of an endpoint's
# own model are not looked up here: chat has `response_format`, completions refuse it.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "top_logprobs": (0,),
    "echo": (False,),  # completions have it
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


def _biases(value: Any) -> Any:
    # Checked by hand: a wrong map of a million entries must not create a million error objects.
    if not isinstance(value, dict):
        return value
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise ValueError(f"{name[:20]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {name} is not a number from -100 to 100")
        biases[int(name)] = float(bias)
    return biases


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Checked(BaseModel):
    """A request whose fields are checked against each other."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def check(self) -> None:
        """Raises BadRequestError."""


class Generation(Checked):
    """The fields that chat and completions share."""

    model: Text
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many alternatives `logprobs` has for each token; None: no logprobs."""

    @property
    def limit(self) -> int | None:
        """The caller's limit on the answer, in tokens."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens"


class CompletionRequest(Generation):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    )
    # 0 is allowed with `echo`: the answer is the prompt alone, for its logprobs.
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Whole | None = None

    @property
    def top_count(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)

    def check(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequestError(
                "Invalid value for 'max_tokens': without 'echo' it must be at least 1.",
                param="max_tokens",
                code="invalid_value",
            )
        # The best n of n are all of them, and 1 is the default.
        if self.best_of not in (None, 1, self.n or 1):
            raise BadRequestError(
                "Unsupported parameter: 'best_of' is not supported with this model, unless it equals 'n'.",
                param="best_of",
                code="unsupported_parameter",
            )


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    )
    # The vocabulary of token ids in the input: OpenAI's clients send ids of OpenAI's vocabularies for every model.
    input_vocabulary: Literal["model"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


def _several(value: Any) -> list[str | list[int]]:
    """A list of single inputs, from a string, a list of strings, token ids or a list of token ids."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


def parse(shape: type[R], body: Any) -> R:
    """The parsed request. Raises only BadRequestError, which names the parameter."""
    if not isinstance(body, dict):
        raise BadRequestError("The body must be a JSON object.", code="invalid_json")
    # `null` is the same as leaving a field out.
    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name in [name for name in given if name in NOT_SUPPORTED and name not in shape.model_fields]:
        value = given.pop(name)
        # 0 == False in Python, not in JSON.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NOT_SUPPORTED[name]):
            raise BadRequestError(
                f"Unsupported parameter: '{name}' is not supported with this model.",
                param=name,
                code="unsupported_parameter",
            )
    for message in given["messages"] if isinstance(given.get("messages"), list) else ():
        # The SDK's message objects have these fields when they are sent back; empty ones have no meaning.
        if isinstance(message, dict):
            for name in ("name", "refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning_content"):
                if name in message and not message[name]:
                    del message[name]
    try:
        request = shape.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None
    if isinstance(request, Generation) and request.stream_options and not request.stream:
        raise BadRequestError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    if isinstance(request, Checked):
        request.check()
    return request


def _refusal(error: ValidationError, body: Any) -> BadRequestError:
    # A union reports a fault for each member. The caller most likely meant the member whose entries are right but too
    # many, or else the one whose fault is deepest and farthest in its list.
    def likely(fault: Mapping[str, Any]) -> tuple[bool, int, list[int], bool]:
        places = [part for part in fault["loc"] if isinstance(part, int)]
        return fault["type"] == "too_long", len(fault["loc"]), places, not fault["type"].endswith("_type")

    fault = max(error.errors(include_url=False, include_context=False), key=likely)
    name, value = "", body
    for depth, part in enumerate(fault["loc"], 1):
        # pydantic puts the names of a union's members between the parts of the path.
        missing = fault["type"] == "missing" and depth == len(fault["loc"])
        if isinstance(value, dict) and isinstance(part, str) and (part in value or missing):
            name, value = f"{name}.{part}" if name else part, value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            name, value = f"{name}[{part}]", value[part]
    if fault["type"] == "extra_forbidden":
        return BadRequestError(f"Unrecognized request argument: '{name}'.", param=name, code="unknown_parameter")
    if fault["type"] == "missing":
        return BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return BadRequestError(f"Invalid value for '{name}': {fault['msg']}.", param=name, code="invalid_value")

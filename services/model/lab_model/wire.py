"""OpenAI's wire format: what is accepted, what is refused by name, what an answer looks like.

Knows JSON and status codes; knows nothing of HTTP servers, tokens or models.
"""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

# Errors: one tree, and how each looks on the wire.


class WireError(Exception):
    """Becomes OpenAI's error envelope."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class BadRequestError(WireError):
    pass


class NotFoundError(WireError):
    status = 404


class MethodNotAllowedError(WireError):
    status = 405
    code = "method_not_allowed"


class BodyTooLargeError(WireError):
    status = 413
    code = "request_too_large"


class BodyTooSlowError(WireError):
    status = 408
    code = "request_timeout"


class HostError(WireError):
    status = 421
    code = "host_not_allowed"


class MediaTypeError(WireError):
    status = 415
    code = "unsupported_media_type"


class BusyError(WireError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        # Whole seconds, at least one: RFC 9110 knows no fractions here.
        self.headers = {"retry-after": str(max(1, round(retry_after + 0.499)))}


class ServerError(WireError):
    status = 500
    type = "server_error"
    code: str | None = "model_fault"


class UnavailableError(ServerError):
    status = 503
    code = "model_unavailable"


# Requests

R = TypeVar("R", bound=BaseModel)


def _whole(value: Any) -> Any:
    # JSON knows one kind of number: 64.0 is 64.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
# fail_fast: a wrong list of a million entries must not become a million error objects.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1, max_length=131_072)]
MOST_INPUTS = 2048  # OpenAI's limit of embedding inputs
Text = Annotated[str, StringConstraints(min_length=1)]

# Accepted whatever they say, because they cannot change an answer.
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Known to the API and not supported here: only the value that changes nothing passes.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(BaseModel):
    """What chat and completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """The caller's bound on the answer, in tokens."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens"


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_INPUTS)]

    def plain(self) -> dict[str, str]:
        """For a chat template: `developer` is OpenAI's newer word for `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"


class CompletionRequest(Generation):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


def _several(value: Any) -> list[str | list[int]]:
    """A string, a list of strings, token ids or a list of them: always a list of single inputs."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


def parse(shape: type[R], body: Any) -> R:
    """The request, or a BadRequestError that names the parameter. Raises nothing else."""
    if not isinstance(body, dict):
        raise BadRequestError("The body must be a JSON object.")
    # `null` is the same as leaving a field out.
    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name in [name for name in given if name in NOT_SUPPORTED]:
        value = given.pop(name)
        # 0 == False in Python, not in JSON.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NOT_SUPPORTED[name]):
            raise BadRequestError(
                f"Unsupported parameter: '{name}' is not supported with this model.",
                param=name,
                code="unsupported_parameter",
            )
    for message in given["messages"] if isinstance(given.get("messages"), list) else ():
        # What the SDK's own message objects carry when they are sent back; empty, it says nothing.
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
    return request


def _refusal(error: ValidationError, body: Any) -> BadRequestError:
    # A union reports a fault for each of its members; the deepest is about what the caller most likely meant.
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda fault: (len(fault["loc"]), not fault["type"].endswith("_type")))
    name, value = "", body
    for part in fault["loc"]:
        # pydantic puts the names of a union's members between the parts of the path.
        if isinstance(value, dict) and isinstance(part, str) and (part in value or fault["type"] == "missing"):
            name, value = f"{name}.{part}" if name else part, value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            name, value = f"{name}[{part}]", value[part]
    if fault["type"] == "extra_forbidden":
        return BadRequestError(f"Unrecognized request argument: '{name}'.", param=name, code="unknown_parameter")
    if fault["type"] == "missing":
        return BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return BadRequestError(f"Invalid value for '{name}': {fault['msg']}.", param=name, code="invalid_value")


# Answers


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Answer:
    """The frame of one answer: what all its chunks, or its JSON, have in common."""

    def __init__(self, *, chat: bool, model: str, revision: str, stream: bool, wants_usage: bool) -> None:
        self._chat, self._stream, self._wants_usage = chat, stream, wants_usage
        kind = "chat.completion" if chat else "text_completion"
        self._frame: dict[str, Any] = {
            "id": new_id("chatcmpl" if chat else "cmpl"),
            "object": f"{kind}.chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": revision,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chat stream's first chunk says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def piece(self, index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        return self._chunk(index, {"content": text} if text else {}, finish, text)

    def closing(self, counted: dict[str, int]) -> dict[str, Any] | None:
        """The last chunk of a stream whose caller asked for usage."""
        return {**self._frame, "choices": [], "usage": counted} if self._wants_usage else None

    def whole(self, texts: Sequence[str], finishes: Sequence[str], counted: dict[str, int]) -> dict[str, Any]:
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        return {**self._frame, "choices": choices, "usage": counted}

    def _chunk(self, index: int, delta: Mapping[str, Any], finish: str | None, text: str = "") -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        chunk = {**self._frame, "choices": [{"index": index, **said, "logprobs": None, "finish_reason": finish}]}
        return {**chunk, "usage": None} if self._wants_usage else chunk


def embeddings(model: str, vectors: Sequence[Sequence[float]], counts: list[int], *, packed: bool) -> dict[str, Any]:
    """OpenAI's embedding list. `packed`: base64 of little-endian float32, which the official client asks for.

    `usage.per_input_tokens` is ours: a cache that keeps single inputs needs it to add up another batch's usage.
    """
    data = [
        {"object": "embedding", "index": index, "embedding": pack(vector) if packed else vector}
        for index, vector in enumerate(vectors)
    ]
    total = sum(counts)
    counted = {"prompt_tokens": total, "total_tokens": total, "per_input_tokens": counts}
    return {"object": "list", "data": data, "model": model, "usage": counted}


def pack(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

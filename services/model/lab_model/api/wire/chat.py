"""The chat request: messages, tools, response format.

Knows OpenAI's shapes. Knows nothing of HTTP servers, tokens or models.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ...errors import BadRequestError
from .requests import MOST_INPUTS, MOST_LOGPROBS, Generation, Object, Text, Whole

MOST_TOOLS = 128  # OpenAI's limit


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text
    arguments: str


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: Text
    type: Literal["function"]
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """For a chat template, which writes arguments as JSON itself; truncated arguments stay text."""
        try:
            arguments: Any = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_INPUTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_call_id: Text | None = None

    def plain(self) -> dict[str, Any]:
        """For a chat template. `developer` is OpenAI's newer name for `system`."""
        content = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id:
            plain["tool_call_id"] = self.tool_call_id
        return plain


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> Object:
        """The JSON Schema of its arguments; a function without parameters takes none."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function


class ChosenName(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text


class ChosenFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: ChosenName


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[Object, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_(self) -> Object | None:
        """The JSON Schema of the answer; None: any text."""
        return self.json_schema.schema_ if self.json_schema else {"type": "object"} if self.type != "text" else None


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    def check(self) -> None:
        """Check fields against each other. Raises BadRequestError."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        form = self.response_format
        if form and (form.type == "json_schema") != (form.json_schema is not None):
            raise BadRequestError(
                "'response_format' has a 'json_schema' when its type is json_schema, and only then.",
                param="response_format.json_schema",
                code="invalid_value",
            )
        self._check_tools()
        known: set[str] = set()
        for index, message in enumerate(self.messages):
            place = f"messages[{index}]"
            if message.content is None and not message.tool_calls:
                raise BadRequestError(
                    f"Missing required parameter: '{place}.content'.",
                    param=f"{place}.content",
                    code="missing_required_parameter",
                )
            if message.tool_calls and message.role != "assistant":
                raise BadRequestError(
                    f"Unrecognized request argument: '{place}.tool_calls': only an assistant calls tools.",
                    param=f"{place}.tool_calls",
                    code="unknown_parameter",
                )
            known |= {call.id for call in message.tool_calls or ()}
            if (message.role == "tool") != (message.tool_call_id is not None) or (
                message.tool_call_id and message.tool_call_id not in known
            ):
                raise BadRequestError(
                    f"'{place}.tool_call_id' names the call that a message of role 'tool' answers, and must be the id "
                    "of one in an earlier message.",
                    param=f"{place}.tool_call_id",
                    code="invalid_value",
                )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        for index, tool in enumerate(self.tools or ()):
            if tool.function.schema_["type"] != "object":
                raise BadRequestError(
                    f"'tools[{index}].function.parameters': arguments are an object.",
                    param=f"tools[{index}].function.parameters.type",
                    code="invalid_value",
                )
        twice = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise BadRequestError(
                f"'tools[{twice}].function.name': there are two functions of this name.",
                param=f"tools[{twice}].function.name",
                code="invalid_value",
            )
        if isinstance(self.tool_choice, ChosenFunction) and self.tool_choice.function.name not in names:
            raise BadRequestError(
                "'tool_choice' names a function that is not among 'tools'.", param="tool_choice", code="invalid_value"
            )
        if self.tool_choice == "required" and not names:
            raise BadRequestError("'tool_choice' needs 'tools'.", param="tool_choice", code="invalid_value")

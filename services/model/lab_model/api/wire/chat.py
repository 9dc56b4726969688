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
OLDER = "call_0"  # id of the call of a `function_call`, which has none


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["refusal"]
    refusal: str


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text
    arguments: str


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: Text
    type: Literal["function"]
    function: CalledFunction
    index: Whole | None = None  # of a stream's delta that a client stored unchanged; without effect

    def plain(self) -> dict[str, Any]:
        """The call for a chat template, which writes arguments as JSON itself; truncated arguments stay text."""
        try:
            arguments: Any = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


Part = TextPart | RefusalPart


class Message(BaseModel):
    """A message. `name` and `annotations` have no effect, because chat templates do not use them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MOST_INPUTS)] | None = None
    name: Text | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: Text | None = None
    annotations: list[Any] | None = None

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of an assistant; `function_call` is OpenAI's older form of one."""
        older = self.function_call
        return [*(self.tool_calls or ()), *([ToolCall(id=OLDER, type="function", function=older)] if older else ())]

    def plain(self) -> dict[str, Any]:
        """The message for a chat template. `developer` is OpenAI's newer name of `system`, `function` its older name of
        `tool`."""
        content = self.content or self.refusal or ""
        if isinstance(content, list):
            content = "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        plain: dict[str, Any] = {"role": role, "content": content}
        if self.calls:
            plain["tool_calls"] = [call.plain() for call in self.calls]
        if self.tool_call_id or self.role == "function":
            plain["tool_call_id"] = self.tool_call_id or OLDER
        return plain

    def check(self, place: str) -> None:
        """Check fields against the role. place: `messages[0]`. Raises BadRequestError."""
        if self.content is None and self.refusal is None and not self.calls:
            raise _missing(f"{place}.content")
        if self.role == "function" and self.name is None:
            raise _missing(f"{place}.name")
        for name in ("tool_calls", "function_call", "refusal"):
            if getattr(self, name) and self.role != "assistant":
                raise BadRequestError(
                    f"Unrecognized request argument: '{place}.{name}': only an assistant's message may have it.",
                    param=f"{place}.{name}",
                    code="unknown_parameter",
                )
        for index, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if isinstance(part, RefusalPart) and self.role != "assistant":
                raise BadRequestError(
                    f"Invalid value for '{place}.content[{index}].type': only an assistant's message may be a refusal.",
                    param=f"{place}.content[{index}].type",
                    code="invalid_value",
                )


def _missing(name: str) -> BadRequestError:
    return BadRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> Object:
        """The JSON Schema of its arguments; a function without parameters accepts none."""
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


class AllowedNames(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)]


class AllowedTools(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames


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
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    @property
    def must_call(self) -> bool:
        """Whether the answer must consist of calls only."""
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, ChosenFunction)

    @property
    def several_calls(self) -> bool:
        """Whether the answer may contain more than one call."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, ChosenFunction)

    @property
    def chosen(self) -> list[str] | None:
        """Names of the functions that may be called; None: all."""
        choice = self.tool_choice
        if isinstance(choice, ChosenFunction):
            return [choice.function.name]
        if isinstance(choice, AllowedTools):
            return [tool.function.name for tool in choice.allowed_tools.tools]
        return [] if choice == "none" else None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        chosen = self.chosen
        return [tool for tool in self.tools or () if chosen is None or tool.function.name in chosen]

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
                "'response_format.json_schema' is required if the type is json_schema, and not allowed otherwise.",
                param="response_format.json_schema",
                code="invalid_value",
            )
        self._check_tools()
        known: set[str] = set()
        for index, message in enumerate(self.messages):
            place = f"messages[{index}]"
            message.check(place)
            known |= {call.id for call in message.tool_calls or ()}
            if (message.role == "tool") != (message.tool_call_id is not None) or (
                message.tool_call_id and message.tool_call_id not in known
            ):
                raise BadRequestError(
                    f"'{place}.tool_call_id' must be the id of a tool call in an earlier message.",
                    param=f"{place}.tool_call_id",
                    code="invalid_value",
                )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        for index, tool in enumerate(self.tools or ()):
            if tool.function.schema_["type"] != "object":
                raise BadRequestError(
                    f"'tools[{index}].function.parameters' must be the schema of an object.",
                    param=f"tools[{index}].function.parameters.type",
                    code="invalid_value",
                )
        twice = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise BadRequestError(
                f"'tools[{twice}].function.name': another function has the same name.",
                param=f"tools[{twice}].function.name",
                code="invalid_value",
            )
        if set(self.chosen or ()) - set(names):
            raise BadRequestError(
                "'tool_choice' names a function that is not in 'tools'.", param="tool_choice", code="invalid_value"
            )
        if self.must_call and not names:
            raise BadRequestError("'tool_choice' needs 'tools'.", param="tool_choice", code="invalid_value")

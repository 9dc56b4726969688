"""POST /v1/chat/completions: turns messages, tools and response format into a prompt and a grammar.

Knows the chat request. Does not generate answers; `completions` does that for both endpoints.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import BadRequestError
from ..text.grammar import ANY_OBJECT, GrammarError, Grammars, Schema, TokenGrammar, answer_source
from ..text.tokenizer import TemplateError
from ..text.tool_calls import CallParser, ForcedToolCallParser, ToolCallParser, render_tools
from .completions import generate
from .generator import EngineClient
from .inputs import LONG_TEXT, check_model, tokenize
from .wire.chat import ChatRequest


async def chat_completions(model: EngineClient, http: HttpRequest, request: ChatRequest) -> Response:
    if model.kind != "chat":
        raise BadRequestError(
            f"{model.name} is a base model without a chat template; use /v1/completions.", param="model"
        )
    check_model(http, request.model, model.name)
    messages = [message.plain() for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.callable_tools]
    size, template_tools = 0, list[dict[str, Any]]()
    if model.text.takes_tools:
        template_tools = tools
        # The text that the template adds to the contents.
        size += sum(len(call.function.arguments) for message in request.messages for call in message.calls)
        size += len(tools) * (LONG_TEXT + 1)
    else:
        messages = render_tools(messages, tools)
    size += sum(len(message["content"]) for message in messages)
    try:
        ids = await tokenize(lambda rendered: model.text.chat(rendered, template_tools), messages, size)
    except TemplateError as error:
        raise BadRequestError(
            f"The model's chat template does not accept these messages: {error}", param="messages"
        ) from None
    grammar = await grammar_of(model, request)

    def calls() -> CallParser | None:
        if not tools:
            return None
        if request.must_call:
            return ForcedToolCallParser()
        most = 1 if request.parallel_tool_calls is False else None
        return ToolCallParser([tool["function"]["name"] for tool in tools], most)

    return await generate(model, http, request, [ids], "messages", chat=True, grammar=grammar, calls=calls)


async def grammar_of(model: EngineClient, request: ChatRequest) -> TokenGrammar | None:
    """The grammar of the answer; None: any text. Raises BadRequestError, which names the faulty schema."""
    schema = request.response_format.schema_ if request.response_format else None
    tools = request.callable_tools
    if not (request.must_call or schema or any(tool.function.strict for tool in tools)):
        tools = []
    functions = {
        tool.function.name: tool.function.schema_ if request.must_call or tool.function.strict else ANY_OBJECT
        for tool in tools
    }
    if schema is None and not functions:
        return None

    def build(grammars: Grammars) -> TokenGrammar:
        try:
            must_call = request.must_call and bool(functions)
            source = answer_source(schema, functions, must_call=must_call, several=request.several_calls)
            return grammars.make(source)
        except GrammarError as error:
            for index, tool in enumerate(request.tools or ()):
                if tool.function.name in functions:
                    check_schema(grammars, functions[tool.function.name], f"tools[{index}].function.parameters")
            if schema is not None:
                check_schema(grammars, schema, "response_format.json_schema.schema")
            raise unenforceable(error, "tools" if functions else "response_format") from None

    return await model.grammar(build)


def check_schema(grammars: Grammars, schema: Schema, param: str) -> None:
    try:
        grammars.make(answer_source(schema))
    except GrammarError as error:
        raise unenforceable(error, param) from None


def unenforceable(error: GrammarError, param: str) -> BadRequestError:
    return BadRequestError(f"'{param}' cannot be enforced: {error}", param=param, code="invalid_value")

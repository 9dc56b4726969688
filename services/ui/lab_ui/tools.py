"""The tools page: functions as JSON Schema, the model's call, its result, the answer. Knows the format of tool calls;
does not draw."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 128
MAX_TEXT = 4000  # characters of a schema or a result
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip
_WEATHER = {"seoul": "12 °C, light rain", "busan": "16 °C, clear", "paris": "9 °C, cloudy", "london": "8 °C, fog"}
_CAPITALS = {"france": "Paris", "korea": "Seoul", "south korea": "Seoul", "germany": "Berlin", "japan": "Tokyo"}


@dataclass(frozen=True)
class Example:
    """A function: its schema, a question that needs it, and `run`, which computes its result from the arguments."""

    schema: Mapping[str, Any]
    question: str
    run: Callable[[Mapping[str, Any]], str]


def _schema(name: str, about: str, **properties: str) -> dict[str, Any]:
    fields = {field: {"type": "string", "description": text} for field, text in properties.items()}
    return {
        "name": name,
        "description": about,
        "parameters": {
            "type": "object", "properties": fields, "required": list(fields), "additionalProperties": False
        },
    }  # fmt: skip


def calculate(text: str) -> float:
    """Value of an expression of numbers, + - * / and parentheses. Raises ValueError for anything else."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("only numbers, + - * / and parentheses are allowed")

    try:
        return value(ast.parse(text[:200], mode="eval"))
    except (SyntaxError, ZeroDivisionError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(str(error)) from None


def _calculator(arguments: Mapping[str, Any]) -> str:
    try:
        return f"{calculate(str(arguments.get('expression', ''))):g}"
    except ValueError as error:
        return f"error: {error}"


EXAMPLES: dict[str, Example] = {
    "weather": Example(
        _schema("get_weather", "The weather in a city now.", city="Name of the city, in English"),
        "What is the weather in Seoul?",
        lambda found: _WEATHER.get(str(found.get("city", "")).lower().split(",")[0], "unknown city"),
    ),
    "calculator": Example(
        _schema("calculate", "Computes an arithmetic expression.", expression="For example 12 * (3 + 4)"),
        "How much is 17 * 23?",
        _calculator,
    ),
    "capital": Example(
        _schema("get_capital", "The capital of a country.", country="Name of the country, in English"),
        "What is the capital of Germany?",
        lambda found: _CAPITALS.get(str(found.get("country", "")).lower(), "unknown country"),
    ),
}
CHOICES = ("auto", "required", "none")


@dataclass(frozen=True)
class Call:
    """The model's call of a function. `text`: arguments as received; `arguments`: None if not a JSON object."""

    id: str
    name: str
    text: str
    arguments: dict[str, Any] | None


def parse_schema(text: str) -> dict[str, Any] | None:
    """A function's schema; None if `text` is not a JSON object with a `name`."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return schema if isinstance(schema, dict) and isinstance(schema.get("name"), str) else None


def request(model: str, question: str, schema: Mapping[str, Any], choice: str) -> dict[str, Any]:
    return {
        "model": model, "messages": [{"role": "user", "content": question}],
        "tools": [{"type": "function", "function": dict(schema)}], "tool_choice": choice, "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }  # fmt: skip


def message(body: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's message of an answer; empty if there is none."""
    try:
        found = body["choices"][0]["message"]
    except (KeyError, IndexError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def call_of(message: Mapping[str, Any]) -> Call | None:
    """The first call in a message; None if there is none."""
    try:
        call = message["tool_calls"][0]
        name, text, id_ = str(call["function"]["name"]), str(call["function"]["arguments"]), str(call["id"])
    except (KeyError, IndexError, TypeError):
        return None
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    return Call(id_, name, text, arguments if isinstance(arguments, dict) else None)


def with_result(request: Mapping[str, Any], message: Mapping[str, Any], call: Call, result: str) -> dict[str, Any]:
    """The second request: the question, the call and its result. `tool_choice` is `none`, so the model must answer."""
    calls = {"role": "assistant", "content": message.get("content"), "tool_calls": message["tool_calls"][:1]}
    answer = {"role": "tool", "tool_call_id": call.id, "content": result}
    return {**request, "messages": [*request["messages"], calls, answer], "tool_choice": "none"}

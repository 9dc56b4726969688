"""Rules of caching: the caller's directives (RFC 9111), requests that bypass the cache, answers that are not stored.

Knows parsed bodies and answers. Knows nothing of redis or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from ..endpoints import COMPLETIONS, ENDPOINTS
from .entry import inputs


@dataclass(frozen=True, slots=True)
class CacheControl:
    """Directives of the caller's `Cache-Control`. Unknown or malformed ones are ignored, as RFC 9111 requires."""

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age: int | None = None

    @classmethod
    def read(cls, header: str) -> CacheControl:
        if not header:
            return NO_DIRECTIVES
        directives = {}
        for part in header.lower().split(","):
            name, _, value = part.strip().partition("=")
            directives[name.strip()] = value.strip().strip('"')
        age = directives.get("max-age", "")
        return cls(
            no_store="no-store" in directives,
            no_cache="no-cache" in directives,
            only_if_cached="only-if-cached" in directives,
            max_age=int(age[:12]) if age.isascii() and age.isdigit() else None,
        )


NO_DIRECTIVES = CacheControl()


def bypass_reason(endpoint: str, body: Mapping[str, Any], default_temperature: Any, store_sampled: bool) -> str | None:
    """Reason why this request bypasses the cache, as a word for `detail=`; None: it does not."""
    if body.get("store") is True:
        return "store"
    if body.get("background") is True:
        return "background"
    if body.get("previous_response_id") is not None:
        return "previous-response"
    options = body.get("stream_options")
    known = {"include_usage": (True, False, None), "include_obfuscation": (False, None)}
    if options and not all(
        name in known and isinstance(value, bool | None) and value in known[name] for name, value in options.items()
    ):
        return "stream-options"  # the upstream may refuse them, which an entry would hide
    row = ENDPOINTS[endpoint]
    if row.per_input:
        if not inputs(body.get(row.input_field)):
            return "input"
        given = body.get("parameters")
        parameters = given if row.generates and isinstance(given, dict) else {}
        hot = parameters.get("temperature") and parameters.get("seed") is None
        return "sampled" if hot and not store_sampled else None
    temperature = body.get("temperature")
    temperature = default_temperature if temperature is None else temperature
    greedy = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature <= 0
    if greedy or body.get("seed") is not None or store_sampled:
        return None
    return "sampled"


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "index": int, "finish_reason": str, "logprobs": dict, "text": str, "message": dict, "role": str, "content": str,
    "refusal": str, "reasoning": str, "reasoning_content": str, "tool_calls": list, "function": dict,
    "arguments": str, "name": str, "usage": dict, "prompt_tokens": int, "completion_tokens": int, "total_tokens": int,
}  # fmt: skip


def has_choices(answer: Any) -> bool:
    """The answer has choices, each an object."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)


def is_well_formed(answer: Any) -> bool:
    """The fields that are read of a chat or text answer are of OpenAI's types, or null."""
    if not has_choices(answer) or not _typed(answer) or not _typed(answer.get("usage") or {}):
        return False
    for choice in answer["choices"]:
        message = choice.get("message") or {}
        if not _typed(choice) or not _typed(message):
            return False
        for call in message.get("tool_calls") or ():
            if not isinstance(call, dict) or not _typed(call) or not _typed(call.get("function") or {}):
                return False
    return True


def _typed(fields: Mapping[str, Any]) -> bool:
    return all(
        value is None or name not in _TYPES or (isinstance(value, _TYPES[name]) and not isinstance(value, bool))
        for name, value in fields.items()
    )


def unstorable_reason(endpoint: str, body: Mapping[str, Any], answer: Any) -> str | None:
    """Reason why this answer to `body` must not be stored, as a word for `detail=`; None: it may be stored."""
    if not isinstance(answer, dict) or answer.get("error") is not None:
        return "error"
    if not is_well_formed(answer):
        return "malformed"
    choices = answer.get("choices")
    prompt = body.get("prompt") if endpoint == COMPLETIONS else None
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if not isinstance(choices, list) or len(choices) != (body.get("n") or 1) * prompts:
        return "choices"
    # Text completions have a default of 16 tokens.
    limits = ("max_tokens", "max_completion_tokens")
    limited = endpoint == COMPLETIONS or any(body.get(limit) is not None for limit in limits)
    allowed = {"stop", "tool_calls", "length"} if limited else {"stop", "tool_calls"}
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("finish_reason") not in allowed:
            return "finish-reason"
        if endpoint == COMPLETIONS:
            if not choice.get("text"):
                return "empty"
            continue
        message = choice.get("message")
        if not isinstance(message, dict):
            return "empty"
        calls = message.get("tool_calls") or []
        if not (calls or message.get("content") or message.get("refusal")):
            return "empty"
        if not all(_is_complete(call) for call in calls):
            return "tool-arguments"
    return None


def _is_complete(call: Any) -> bool:
    """A complete tool call: a name, and arguments that are JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return isinstance(call, dict) and isinstance(call.get("custom"), dict)
    try:
        orjson.loads(function["arguments"])
    except (KeyError, TypeError, orjson.JSONDecodeError):
        return False
    return bool(function.get("name"))

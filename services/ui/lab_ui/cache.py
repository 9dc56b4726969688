"""The cache page: phases of a request, its key, the difference of two requests, and many requests at once.

Knows the formats of /cache/explain, of Cache-Status (RFC 9211) and of a request's timing. Does not draw.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer import Answer, Fault
from .formats import milliseconds, number
from .proxy import Reply
from .texts import Texts

QUESTION = "What is the capital of France?"
MAX_CALLS, MAX_AT_ONCE = 200, 32
MAX_BODY = 20_000  # characters of a request that the reader edits
SHOWN_HEADERS = ("cache-status", "age", "x-model-revision", "x-model-alias", "x-model-fallback", "x-request-id")
PATHS = {"chat": "/v1/chat/completions", "embeddings": "/v1/embeddings"}
# Changes of a request whose effect on the key the reader guesses: name -> whether the key stays the same.
CHANGES: dict[str, bool] = {
    "order": True, "zero": True, "default": True, "stream": True, "user": True,
    "capital": False, "space": False, "temperature": False, "system": False, "model": True,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A part of a request's time: milliseconds since the proxy received the request, or, if the proxy reports no
    timing, since the ui sent it."""

    name: str
    begin: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.begin


def chat_body(model: str, question: str, max_tokens: int = 32) -> dict[str, Any]:
    """A request of this page. Its temperature is 0, so that the proxy may store the answer."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}


def changed(body: Mapping[str, Any], change: str, alias: str | None = None) -> dict[str, Any]:
    """The request with one change of CHANGES. `alias`: another name of the same model; None: the name stays."""
    other: dict[str, Any] = json.loads(json.dumps(body))
    message = other["messages"][-1]
    match change:
        case "order":
            return dict(reversed(list(other.items())))
        case "zero":
            other["temperature"] = 0.0
        case "default":
            other |= {"n": 1, "presence_penalty": 0}
        case "stream":
            other |= {"stream": True, "stream_options": {"include_usage": True}}
        case "user":
            other["user"] = "student-7"
        case "capital":
            message["content"] = message["content"].swapcase()
        case "space":
            message["content"] += " "
        case "temperature":
            other["temperature"] = 0.7
        case "system":
            other["messages"].insert(0, {"role": "system", "content": "Be brief."})
        case "model":
            other["model"] = alias or other["model"]
    return other


def measured_phases(answer: Answer) -> list[Phase]:
    """Three phases that the ui measures of a streamed answer: to the first token, to the last token, to the end."""
    if answer.first is None or answer.last is None:
        return []
    start = answer.started
    marks = [("to_first", start, answer.first), ("decode", answer.first, answer.last)]
    if answer.ended is not None:
        marks.append(("end", answer.last, answer.ended))
    return [Phase(name, (a - start) * 1000, (b - start) * 1000) for name, a, b in marks]


def reported_phases(body: Mapping[str, Any]) -> list[Phase]:
    """The phases of GET /v1/requests/{id}/timing; entries of another shape are left out."""
    found = []
    for each in body.get("phases") or []:
        if isinstance(each, Mapping) and isinstance(each.get("name"), str):
            begin, length = each.get("start_ms"), each.get("ms")
            if isinstance(begin, int | float) and isinstance(length, int | float):
                found.append(Phase(each["name"], float(begin), float(begin + length)))
    return found


def header_parts(header: str, texts: Texts) -> list[tuple[str, str]]:
    """Each part of a Cache-Status header with its meaning; an unknown part has an empty one."""
    parts = [part.strip() for part in re.split(r';(?=(?:[^"]*"[^"]*")*[^"]*$)', header) if part.strip()]
    found = []
    for part in parts:
        name, _, value = part.partition("=")
        key = f"cache.part.{name.replace('-', '_')}"
        if name == "fwd" and f"cache.part.fwd_{value}" in texts:
            key = f"cache.part.fwd_{value}"
        found.append((part, texts(key, value=value.strip('"')) if key in texts else ""))
    return found


def parse_body(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is not one."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def pretty(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, indent=2)


def at(body: Any, path: str) -> str:
    """The value at a path of /cache/explain's `differs`, as JSON; `–` if the body has none."""
    for name, place in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            body = body[int(place)] if place else body[name]
        except (KeyError, IndexError, TypeError):
            return "–"
    return json.dumps(body, ensure_ascii=False)


@dataclass(frozen=True)
class Calls:
    """The replies to many calls of one request. Times are in seconds."""

    replies: Sequence[Reply | Fault]

    @property
    def states(self) -> Counter[str]:
        """Cache state or kind of fault -> how often it occurred."""
        return Counter(each.kind if isinstance(each, Fault) else each.cache or "other" for each in self.replies)

    def median(self, state: str) -> float | None:
        times = [each.seconds for each in self.replies if isinstance(each, Reply) and each.cache == state]
        return statistics.median(times) if times else None

    @property
    def first_fault(self) -> Fault | None:
        return next((each for each in self.replies if isinstance(each, Fault)), None)

    def figures(self, texts: Texts) -> dict[str, str]:
        """Label -> value, for draw_strip."""
        shown = {state_text(state, texts): number(count) for state, count in self.states.most_common()}
        for state in ("miss", "hit"):
            if (median := self.median(state)) is not None:
                shown[texts("cache.median", state=state_text(state, texts))] = f"{milliseconds(median)} ms"
        miss, hit = self.median("miss"), self.median("hit")
        if miss and hit:
            shown[texts("cache.faster")] = f"{number(miss / hit)}×"
        return shown

    def dots(self, texts: Texts) -> list[tuple[int, float, str, str]]:
        """(number, milliseconds, state, milliseconds as text) of each call that was answered."""
        return [
            (place, each.seconds * 1000, state_text(each.cache or "other", texts), f"{milliseconds(each.seconds)} ms")
            for place, each in enumerate(self.replies, 1)
            if isinstance(each, Reply)
        ]


def state_text(state: str, texts: Texts) -> str:
    for key in (f"cache_state.{state}", f"faults.{state}.what"):
        if key in texts:
            return texts(key)
    return texts("cache_state.other")

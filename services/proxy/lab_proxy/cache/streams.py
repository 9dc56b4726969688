"""Both wire modes of an answer: a stream (SSE) accumulated into JSON, JSON replayed as a stream. Works on bytes."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from ..canonical import dump
from ..endpoints import CHAT
from .entry import new_id

MAX_EVENT_BYTES = 16 * 1024 * 1024
_EVENT_END = re.compile(rb"\r\n\r?\n|\n\r?\n|\r\r")
_PIECE = re.compile(r"\S+\s*|\s+")  # one event of a replayed stream: about a token, never half a character
MAX_PIECES = 2000  # of one text: 1 MB as an event for each word took 65 MB and 1.45 s of the event loop
_NO_USAGE = b',"usage":null}\n\n'
_TEXTS = ("reasoning", "reasoning_content", "content", "refusal")
_CONTENT = (*_TEXTS, "tool_calls")
_OWN = frozenset({"id", "created", "object", "choices", "usage", "obfuscation"})


class SseParser:
    """Splits chunks of a stream of server-sent events into whole events with their blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now. Raises ValueError if one is larger than 16 MiB."""
        buffer = self._rest + data
        start, events = 0, []
        for end in _EVENT_END.finditer(buffer, max(0, len(self._rest) - 3)):
            events.append(buffer[start : end.end()])
            start = end.end()
        self._rest = buffer[start:]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError("an event of the stream is too large")
        return events


def event_data(event: bytes) -> bytes | None:
    """The `data` of one event; None for a comment or an event without data."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2 and b"\r" not in event:
        return event[6:-2]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def for_caller(event: bytes, chunk: dict[str, Any], usage: bool) -> bytes:
    """The event for this caller: verbatim, or without the usage that only the proxy requested."""
    if usage or "usage" not in chunk:
        return event
    if chunk.pop("usage") and not chunk.get("choices"):
        return b""
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def has_content(chunk: Mapping[str, Any]) -> bool:
    """The chunk holds content of the answer, not just its frame."""
    for part in chunk.get("choices") or ():
        delta = part.get("delta")
        if part.get("text") or (delta and any(delta.get(name) for name in _CONTENT)):
            return True
    return False


def pass_through(event: bytes, usage: bool) -> bytes:
    """An event of a live stream, unchanged except for usage that this caller did not request."""
    if usage or b'"usage"' not in event:
        return event
    if event.endswith(_NO_USAGE):  # the end of OpenAI's chunks but the last: no string value ends like this
        return event[: -len(_NO_USAGE)] + b"}\n\n"
    data = event_data(event)
    return event if data is None or data == b"[DONE]" else for_caller(event, orjson.loads(data), usage=False)


class RewrittenEvents:
    """Events of another request's stream, with an `id` and `created` of this caller's own, and usage only if it was
    requested. `content_events`: events with content; `usage`: of the answer."""

    def __init__(self, endpoint: str, usage: bool, created: int) -> None:
        self._include_usage = usage
        self._own = {"id": new_id(endpoint), "created": created}
        self.content_events = 0
        self.usage: Any = None

    def rewrite(self, event: bytes) -> bytes:
        data = event_data(event)
        if data is None or data == b"[DONE]":
            return event
        chunk = orjson.loads(data)
        if chunk.get("error") is not None:
            return event
        self.content_events += has_content(chunk)
        self.usage = chunk.get("usage") or self.usage
        for name, value in self._own.items():
            if name in chunk:
                chunk[name] = value
        return for_caller(b"data: " + dump(chunk) + b"\n\n", chunk, self._include_usage)


class _Text(list[str]):
    """A text as a list of pieces: appending to a string would copy all of it at each event."""


def _joined(value: Any) -> Any:
    """The value with each _Text replaced by its string."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _joined(inner) for name, inner in value.items()}
    return [_joined(inner) for inner in value] if isinstance(value, list) else value


class StreamAccumulator:
    """Accumulates the chunks of a stream into the JSON answer of the same request without `stream`."""

    def __init__(self, endpoint: str) -> None:
        self._chat = endpoint == CHAT
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: dict[str, Any] | None = None
        self.content_chunks = 0  # chunks with content; counted by the caller of `feed`

    def feed(self, chunk: Mapping[str, Any], *, keep: bool = True) -> None:
        """Add one chunk. Raises TypeError, ValueError or AttributeError for a malformed one. Without `keep` only its
        usage counts, and the answer is given up: it is too large to be stored."""
        if not keep:
            self._top, self._choices = {}, {}
            self.usage = chunk.get("usage") or self.usage
            return
        for name, value in chunk.items():
            if name not in _OWN and (value is not None or name not in self._top):
                self._top[name] = value
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        for part in chunk.get("choices") or []:
            choice = self._choices.setdefault(part.get("index") or 0, {"finish_reason": None})
            for name, value in part.items():
                if name == "delta":
                    delta = value or {}
                    _add(choice.setdefault("message", {}), delta)
                elif name == "text":
                    if not isinstance(value, str | None):
                        raise TypeError("a text is no string")
                    _add(choice, {"text": value or ""})
                elif name == "logprobs" and value and choice.get("logprobs"):
                    _add(choice["logprobs"], value)
                elif name != "index" and (value is not None or name not in choice):
                    choice[name] = value

    def answer(self) -> dict[str, Any]:
        """The JSON answer so far; policy.unstorable_reason checks whether it is complete."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            made = {"index": index, **_joined(choice)}
            if self._chat:
                message = {"role": "assistant", "content": None, **made.get("message", {})}
                if message.get("tool_calls"):
                    calls = message["tool_calls"]
                    message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                made["message"] = message
            choices.append(made)
        kind = "chat.completion" if self._chat else "text_completion"
        return {"object": kind, **self._top, "choices": choices, "usage": self.usage}


def _add(whole: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Merge a delta as the openai client does: text is joined, indexed lists are merged item by item."""
    for name, value in delta.items():
        have = whole.get(name)
        if isinstance(value, list):
            have = whole[name] = [] if have is None else have
            for item in value:
                if not isinstance(item, dict):
                    have.append(item)
                    continue
                at = item.get("index")
                found = None if at is None else next((entry for entry in have if entry.get("index") == at), None)
                if found is None:
                    have.append(found := {})
                _add(found, item)
            if have and all(isinstance(entry, dict) and "index" in entry for entry in have):
                have.sort(key=lambda entry: entry["index"])
        elif isinstance(value, dict):
            whole[name] = have if isinstance(have, dict) else {}
            _add(whole[name], value)
        elif isinstance(value, str) and isinstance(have, str | _Text) and name not in {"role", "type", "id"}:
            if isinstance(have, str):
                have = whole[name] = _Text([have])
            have.append(value)
        elif value is not None or name not in whole:
            whole[name] = value


def replay(endpoint: str, answer: Mapping[str, Any], identity: str, created: int, usage: bool) -> Iterator[bytes]:
    """The events of a stream that accumulates to `answer`, with `[DONE]`. `usage`: the caller's include_usage."""
    chat = endpoint == CHAT
    top = {"id": identity, "created": created, "object": "chat.completion.chunk" if chat else "text_completion"}
    top |= {name: value for name, value in answer.items() if name not in _OWN}
    head = b"data: " + orjson.dumps(top)[:-1] + b',"choices":['
    tail = b'],"usage":null}\n\n' if usage else b"]}\n\n"
    for choice in answer["choices"]:
        for part in _chat_parts(choice) if chat else _text_parts(choice):
            yield head + orjson.dumps(part) + tail
    if usage and answer.get("usage"):
        yield head + b'],"usage":' + orjson.dumps(answer["usage"]) + b"}\n\n"
    yield b"data: [DONE]\n\n"


def replay_pieces(endpoint: str, body: bytes, usage: bool) -> list[bytes]:
    """The replay of an entry's body, to be kept: joined by `"id":…,"created":…,` it is the whole stream."""
    identity = new_id(endpoint)  # random: the answer cannot contain it
    events = b"".join(replay(endpoint, orjson.loads(body), identity, 0, usage))
    return events.split(b'"id":"%s","created":0,' % identity.encode())


def _frame(choice: Mapping[str, Any], own: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of every chunk of a choice, and fields of its last chunk only."""
    every = {"index": choice.get("index", 0), "finish_reason": None}
    if "logprobs" in choice:
        every["logprobs"] = None
    last = {name: value for name, value in choice.items() if name not in {own, "index", "logprobs"}}
    return every, last


def _split(text: str) -> list[str]:
    """The text in pieces of a word, or of several if it has more words than MAX_PIECES."""
    words: list[str] = _PIECE.findall(text)
    step = -(-len(words) // MAX_PIECES)
    return words if step <= 1 else ["".join(words[at : at + step]) for at in range(0, len(words), step)]


def _chat_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    every, last = _frame(choice, "message")
    message, logprobs = choice["message"], choice.get("logprobs")
    first = {name: "" if name in _TEXTS and value else value for name, value in message.items() if name != "tool_calls"}
    if message.get("tool_calls") == []:
        first["tool_calls"] = []
    yield {**every, "delta": first}
    for name in _TEXTS:
        text = message.get(name) or ""
        for piece in _split(text) if not logprobs else filter(None, [text]):
            carried = {"logprobs": logprobs} if logprobs else {}
            logprobs = None
            yield {**every, "delta": {name: piece}, **carried}
    for index, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function")
        if not isinstance(function, dict):
            yield {**every, "delta": {"tool_calls": [{"index": index, **call}]}}
            continue
        opened = {"index": index, **call, "function": {**function, "arguments": ""}}
        rest = {"index": index, "function": {"arguments": function.get("arguments", "")}}
        for part in (opened, rest):
            yield {**every, "delta": {"tool_calls": [part]}}
    yield {**every, **({"logprobs": logprobs} if logprobs else {}), "delta": {}, **last}


def _text_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    every, last = _frame(choice, "text")
    logprobs = choice.get("logprobs")
    text = choice.get("text") or ""
    for piece in [text] if logprobs else _split(text):
        yield {**every, "text": piece, **({"logprobs": logprobs} if logprobs else {})}
    yield {**every, "text": "", **last}

"""What may be stored, and both wire modes of it: a stream gathered into JSON, JSON replayed as a stream.

Works on parsed answers and bytes. Knows nothing of redis, HTTP or who asks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import getrandbits  # an id is no secret
from typing import Any

import orjson

from ..canonical import CONTRACT, dump

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

OBJECT_BYTES = 1500  # of an entry and its place in a table, measured, beside its body
MAX_EVENT_BYTES = 16 * 1024 * 1024

_EVENT_END = re.compile(rb"\r\n\r?\n|\n\r?\n|\r\r")
_PIECE = re.compile(r"\S+\s*|\s+")  # what a replayed stream sends at once: about a token, never half a character
_NO_USAGE = b',"usage":null}\n\n'
_TEXTS = ("reasoning", "reasoning_content", "content", "refusal")
_SAID = (*_TEXTS, "tool_calls")
_OWN = frozenset({"id", "created", "object", "choices", "usage", "obfuscation"})


# ---- what may be stored


def bypass_reason(endpoint: str, body: Mapping[str, Any], default_temperature: Any, keep_sampled: bool) -> str | None:
    """Why the cache has nothing to do with this request: a word for `detail=`, or None where it has."""
    if body.get("store") is True:
        return "store"
    if body.get("background") is True:
        return "background"
    if body.get("previous_response_id") is not None:
        return "previous-response"
    options = body.get("stream_options")
    if options and not (set(options) == {"include_usage"} and isinstance(options["include_usage"], bool)):
        return "stream-options"  # the upstream may refuse them: an entry must not answer in its place
    if endpoint == EMBEDDINGS:
        return None if inputs(body.get("input")) else "input"
    temperature = body.get("temperature")
    temperature = default_temperature if temperature is None else temperature
    greedy = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature <= 0
    if greedy or body.get("seed") is not None or keep_sampled:
        return None
    return "sampled"


def unstorable_reason(endpoint: str, body: Mapping[str, Any], answer: Any) -> str | None:
    """Why this answer to `body` must not be stored: a word for `detail=`, or None where it is whole."""
    if not isinstance(answer, dict) or answer.get("error") is not None:
        return "error"
    choices = answer.get("choices")
    prompt = body.get("prompt") if endpoint == COMPLETIONS else None
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if not isinstance(choices, list) or len(choices) != (body.get("n") or 1) * prompts:
        return "choices"
    limited = any(body.get(limit) is not None for limit in ("max_tokens", "max_completion_tokens"))
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
        if not all(_callable(call) for call in calls):
            return "tool-arguments"
    return None


def _callable(call: Any) -> bool:
    """A tool call that a program could make: a name, and arguments that parse."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return isinstance(call, dict) and isinstance(call.get("custom"), dict)
    try:
        orjson.loads(function["arguments"])
    except (KeyError, TypeError, orjson.JSONDecodeError):
        return False
    return bool(function.get("name"))


# ---- the stored form


@dataclass(slots=True)
class Entry:
    """An answer at rest. `body` is JSON that is served by splicing: a chat or text answer without `id` and `created`,
    or one embedding's vector. `about` is what a hit needs beside it: `usage`, and for embeddings the answer's frame."""

    body: bytes
    ttl: int
    stored_at: float
    metadata: dict[str, Any] = field(default_factory=dict)
    epoch: str = ""  # the epoch it belongs to: a flush is a new epoch
    grace: int = 0  # seconds after the TTL in which a stale answer may still be of use
    canonical_form: bytes = b""  # canonical, of the request: canonical JSON has no line break
    weight: int = field(init=False)  # bytes that it takes in this process, about
    replays: dict[bool, list[bytes]] = field(init=False, default_factory=dict)  # by include_usage: see replay_pieces

    def __post_init__(self) -> None:
        self.weight = len(self.body) + len(self.canonical_form) + OBJECT_BYTES

    def attach_request(self, form: bytes, grace: int) -> None:
        """Keep the request's canonical form with it, and be of use for `grace` seconds after the TTL."""
        self.canonical_form, self.grace = form, grace
        self.weight += len(form)

    def pack(self) -> bytes:
        head = {"v": CONTRACT, "at": self.stored_at, "ttl": self.ttl, "grace": self.grace, "stamp": self.epoch}
        rest = self.canonical_form + b"\n" + self.body
        return orjson.dumps(head | {"crc": zlib.crc32(rest), "about": self.metadata}) + b"\n" + rest

    @classmethod
    def unpack(cls, raw: Any) -> Entry | None:
        """The entry in `raw`, or None for garbage, half an entry and an entry of another version."""
        if not isinstance(raw, bytes):
            return None
        head, found, rest = raw.partition(b"\n")
        try:
            said = orjson.loads(head)
            if not found or said["v"] != CONTRACT or said["crc"] != zlib.crc32(rest):
                return None
            form, _, body = rest.partition(b"\n")
            about, stamp, grace = dict(said["about"]), str(said["stamp"]), int(said["grace"])
            return cls(body, int(said["ttl"]), float(said["at"]), about, stamp, grace, form)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return None

    def age(self, now: float) -> int:
        return max(0, int(now - self.stored_at))


def of_answer(answer: Mapping[str, Any], ttl: int, now: float, stamp: str) -> Entry:
    """A chat or text answer as an entry: without the `id` and `created` of then."""
    kept = {name: value for name, value in answer.items() if name not in {"id", "created"}}
    return Entry(orjson.dumps(kept), ttl, now, {"usage": answer.get("usage")}, stamp)


def new_id(endpoint: str) -> str:
    """An answer's `id`, of the kind that OpenAI gives out at this endpoint."""
    return f"{'cmpl' if endpoint == COMPLETIONS else 'chatcmpl'}-{getrandbits(112):028x}"


def renewed(body: bytes, identity: str, created: int) -> bytes:
    """A stored body with an `id` and `created` of its own, spliced in without parsing."""
    return b'{"id":"%s","created":%d,' % (identity.encode(), created) + body[1:]


# ---- streams


class SseParser:
    """Splits a stream of server-sent events, however it is cut, into whole events with their blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ValueError when one event is larger than 16 MiB."""
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


def asked_for(event: bytes, chunk: dict[str, Any], usage: bool) -> bytes:
    """An event as this caller asked for it: verbatim, or without the usage that only the proxy wanted."""
    if usage or "usage" not in chunk:
        return event
    if chunk.pop("usage") and not chunk.get("choices"):
        return b""
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def tells(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk holds some of the answer itself, as against its frame."""
    for part in chunk.get("choices") or ():
        delta = part.get("delta")
        if delta and any(delta.get(said) for said in _SAID):
            return True
        if part.get("text"):
            return True
    return False


class PassThroughEvents:
    """Events of a live stream as they came, but for usage that this caller did not ask for."""

    content_events, usage = 0, None  # whoever asked the upstream counts for itself

    def __init__(self, usage: bool) -> None:
        self._include_usage = usage

    def rewrite(self, event: bytes) -> bytes:
        if self._include_usage or b'"usage"' not in event:
            return event
        if event.endswith(_NO_USAGE):  # as OpenAI ends every chunk but the last: no string ends like this
            return event[: -len(_NO_USAGE)] + b"}\n\n"
        data = event_data(event)
        return event if data is None or data == b"[DONE]" else asked_for(event, orjson.loads(data), usage=False)


class RewrittenEvents:
    """Events of a stream that somebody else asked for: with an `id` and `created` of this caller's own, and the usage
    only where it asked for it. `pieces`: events that told of the answer; `told`: its usage."""

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
        self.content_events += tells(chunk)
        self.usage = chunk.get("usage") or self.usage
        for name, value in self._own.items():
            if name in chunk:
                chunk[name] = value
        return asked_for(b"data: " + dump(chunk) + b"\n\n", chunk, self._include_usage)


class StreamAccumulator:
    """Chunks of a stream added up to the JSON answer that the same request would have had without `stream`."""

    def __init__(self, endpoint: str) -> None:
        self._chat = endpoint == CHAT
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: dict[str, Any] | None = None
        self.content_chunks = 0  # chunks with something of the answer itself; counted by who feeds it

    def feed(self, chunk: Mapping[str, Any]) -> None:
        """Add one chunk. Raises TypeError, ValueError or AttributeError for nonsense."""
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
                    choice["text"] = choice.get("text", "") + value
                elif name == "logprobs" and value and choice.get("logprobs"):
                    _add(choice["logprobs"], value)
                elif name != "index" and (value is not None or name not in choice):
                    choice[name] = value

    def answer(self) -> dict[str, Any]:
        """The JSON answer so far; why_unfit says whether it is whole."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            made = {"index": index, **choice}
            if self._chat:
                message = {"role": "assistant", "content": None, **choice.get("message", {})}
                if message.get("tool_calls"):
                    calls = message["tool_calls"]
                    message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                made["message"] = message
            choices.append(made)
        kind = "chat.completion" if self._chat else "text_completion"
        return {"object": kind, **self._top, "choices": choices, "usage": self.usage}


def _add(whole: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a delta as the openai client does: text is joined, indexed lists are merged entry by entry."""
    for name, value in delta.items():
        have = whole.get(name)
        if isinstance(value, list):
            if have is None:
                have = whole[name] = []
            for item in value:
                if not isinstance(item, dict):
                    have.append(item)
                    continue
                at = item.get("index")
                found = None if at is None else next((entry for entry in have if entry.get("index") == at), None)
                if found is None:
                    found = {}
                    have.append(found)
                _add(found, item)
            if have and all(isinstance(entry, dict) and "index" in entry for entry in have):
                have.sort(key=lambda entry: entry["index"])
        elif isinstance(value, dict) and isinstance(have, dict):
            _add(have, value)
        elif isinstance(value, dict):
            whole[name] = {}
            _add(whole[name], value)
        elif isinstance(value, str) and isinstance(have, str) and name not in {"role", "type", "id"}:
            whole[name] = have + value
        elif value is not None or name not in whole:
            whole[name] = value


def replay(endpoint: str, answer: Mapping[str, Any], identity: str, created: int, usage: bool) -> Iterator[bytes]:
    """The events of a stream that adds up to `answer`, `[DONE]` included. `usage`: as the caller's include_usage."""
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
    """The replay of an entry's body, made once for many: joined by `"id":…,"created":…,` it is the whole stream."""
    identity = new_id(endpoint)  # random: nothing in the answer looks like it
    events = b"".join(replay(endpoint, orjson.loads(body), identity, 0, usage))
    return events.split(b'"id":"%s","created":0,' % identity.encode())


def _frame(choice: Mapping[str, Any], own: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every chunk of a choice says, and what only its last one does."""
    every = {"index": choice.get("index", 0), "finish_reason": None}
    if "logprobs" in choice:
        every["logprobs"] = None
    last = {name: value for name, value in choice.items() if name not in {own, "index", "logprobs"}}
    return every, last


def _pieces(text: str, whole: bool) -> list[str]:
    return [text] if whole else _PIECE.findall(text)


def _chat_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    every, last = _frame(choice, "message")
    message, logprobs = choice["message"], choice.get("logprobs")
    first = {name: "" if name in _TEXTS and value else value for name, value in message.items() if name != "tool_calls"}
    if message.get("tool_calls") == []:
        first["tool_calls"] = []
    yield {**every, "delta": first}
    for name in _TEXTS:
        for piece in _pieces(message.get(name) or "", whole=bool(logprobs)):
            if not piece:
                continue
            carried = {"logprobs": logprobs} if logprobs else {}
            logprobs = None
            yield {**every, "delta": {name: piece}, **carried}
    for index, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function")
        if not isinstance(function, dict):
            yield {**every, "delta": {"tool_calls": [{"index": index, **call}]}}
            continue
        opened = {"index": index, **call, "function": {**function, "arguments": ""}}
        yield {**every, "delta": {"tool_calls": [opened]}}
        rest = {"index": index, "function": {"arguments": function.get("arguments", "")}}
        yield {**every, "delta": {"tool_calls": [rest]}}
    yield {**every, **({"logprobs": logprobs} if logprobs else {}), "delta": {}, **last}


def _text_parts(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    every, last = _frame(choice, "text")
    logprobs = choice.get("logprobs")
    for piece in _pieces(choice.get("text") or "", whole=bool(logprobs)):
        yield {**every, "text": piece, **({"logprobs": logprobs} if logprobs else {})}
    yield {**every, "text": "", **last}


# ---- embeddings


def inputs(value: Any) -> list[Any] | None:
    """The single inputs of an embeddings request (a text or a list of token ids each); None for an unknown shape."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) and item for item in value):
        return value
    return None


def shares(total: int, weights: list[int]) -> list[int]:
    """`total` split in proportion to `weights` by the largest remainder: whole numbers that sum to it exactly."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    split = [total * weight // whole for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in order[: total - sum(split)]:
        split[i] += 1
    return split


def of_vectors(answer: Any, units: list[Any], ttl: int, now: float, stamp: str) -> list[Entry]:
    """One entry for each of `units`. Raises ValueError where the answer does not hold one vector for each.

    An input's tokens are what `usage.per_input_tokens` says, else its share of the total by length.
    """
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = [row["embedding"] for row in rows]
        if [row["index"] for row in rows] != list(range(len(units))) or not all(vectors):
            raise ValueError("not one vector for each input")
        usage = answer.get("usage") or {}
        told: Any = usage.get("per_input_tokens")
        exact = isinstance(told, list) and len(told) == len(units)
        lengths = [len(unit) for unit in units]
        tokens: list[int] = list(told) if exact else shares(usage.get("prompt_tokens") or 0, lengths)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not an answer with vectors") from error
    frame = {name: value for name, value in answer.items() if name not in {"data", "usage", "id", "created"}}
    return [
        Entry(orjson.dumps(vector), ttl, now, {"tokens": count, "exact": exact, "frame": frame}, stamp)
        for vector, count in zip(vectors, tokens, strict=True)
    ]


def to_vectors(kept: list[Entry], order: list[int]) -> tuple[bytes, dict[str, Any]]:
    """One answer from single vectors, and its usage: `order` names the vector of each input, duplicates and all."""
    counts = [kept[place].metadata["tokens"] for place in order]
    usage: dict[str, Any] = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    if all(entry.metadata["exact"] for entry in kept):
        usage["per_input_tokens"] = counts
    rows = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%s}' % (index, kept[place].body)
        for index, place in enumerate(order)
    )
    return b'{"data":[' + rows + b"]," + orjson.dumps(kept[0].metadata["frame"] | {"usage": usage})[1:], usage

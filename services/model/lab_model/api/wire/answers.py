"""OpenAI's wire format of answers: JSON, and the chunks of a stream.

Knows the shapes; knows nothing of requests, HTTP servers or models.
"""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = dict[str, Any]
LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON has not


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompt: int, completion: int, cached: int) -> Object:
    """Tokens. cached: those of the prompt that were not computed again."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# A token as `logprobs` shows it: its name, and its bytes where it has any.
Named = tuple[str, list[int] | None]


class Scored(NamedTuple):
    """One token of an answer with its logprob, and the best alternatives with theirs."""

    token: Named
    logprob: float
    top: list[tuple[Named, float]]
    start: int  # its place in the text, in characters


class CallPart(NamedTuple):
    """A piece of a tool call: id and name at its beginning, then arguments."""

    call: int  # which of the answer's calls
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Piece:
    """What one step brought one choice."""

    index: int
    text: str = ""
    finish: str | None = None
    scored: list[Scored] | None = None  # None: no logprobs were asked for
    calls: Sequence[CallPart] = ()


class Answer:
    """The frame of one answer: what all its chunks, or its JSON, have in common."""

    def __init__(self, *, chat: bool, model: str, revision: str, stream: bool, wants_usage: bool) -> None:
        self._chat, self._stream, self._wants_usage = chat, stream, wants_usage
        kind = "chat.completion" if chat else "text_completion"
        self._frame: Object = {
            "id": new_id("chatcmpl" if chat else "cmpl"),
            "object": f"{kind}.chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": revision,
        }

    def opening(self, index: int) -> Object | None:
        """A chat stream's first chunk says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def chunks(self, piece: Piece) -> Iterator[Object]:
        """A piece of a stream; its end is a chunk of its own."""
        if piece.text or piece.scored:
            yield self._chunk(piece.index, {"content": piece.text}, None, piece.text, self._logprobs(piece.scored))
        for part in piece.calls:
            function = {"name": part.name, "arguments": part.arguments}
            call: Object = {"index": part.call, "id": part.id, "type": "function", "function": function}
            if part.id is None:
                call = {"index": part.call, "function": {"arguments": part.arguments}}
            yield self._chunk(piece.index, {"tool_calls": [call]}, None)
        if piece.finish:
            yield self._chunk(piece.index, {}, piece.finish)

    def closing(self, counted: Object) -> Object | None:
        """The last chunk of a stream whose caller asked for usage."""
        return {**self._frame, "choices": [], "usage": counted} if self._wants_usage else None

    def whole(self, choices: Sequence[Sequence[Piece]], counted: Object) -> Object:
        """The JSON of all the pieces of each choice."""
        return {**self._frame, "choices": [self._choice(i, p) for i, p in enumerate(choices)], "usage": counted}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Object:
        text = "".join([piece.text for piece in pieces])
        finish = next((piece.finish for piece in pieces if piece.finish), None)
        asked = any(piece.scored is not None for piece in pieces)
        logprobs = self._logprobs([one for piece in pieces for one in piece.scored or ()] if asked else None)
        said: Object = {"text": text}
        if self._chat:
            calls: list[Object] = []
            for part in [part for piece in pieces for part in piece.calls]:
                if part.id is not None:
                    function = {"name": part.name, "arguments": part.arguments}
                    calls.append({"id": part.id, "type": "function", "function": function})
                else:
                    calls[part.call]["function"]["arguments"] += part.arguments
            message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
            said = {"message": {**message, "tool_calls": calls} if calls else message}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, scored: Sequence[Scored] | None) -> Object | None:
        if scored is None:
            return None
        if self._chat:

            def entry(token: Named, logprob: float) -> Object:
                return {"token": token[0], "logprob": max(logprob, LEAST_LOGPROB), "bytes": token[1]}

            content = [
                {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
                for one in scored
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [one.token[0] for one in scored],
            "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in scored],
            # The chosen token is always there: one more than asked for, where it is none of the best.
            "top_logprobs": [
                {token[0]: logprob for token, logprob in one.top} | {one.token[0]: one.logprob} for one in scored
            ],
            "text_offset": [one.start for one in scored],
        }

    def _chunk(
        self, index: int, delta: Object, finish: str | None, text: str = "", logprobs: Object | None = None
    ) -> Object:
        said: Object = {"delta": delta} if self._chat else {"text": text}
        chunk = {**self._frame, "choices": [{"index": index, **said, "logprobs": logprobs, "finish_reason": finish}]}
        return {**chunk, "usage": None} if self._wants_usage else chunk


def embeddings(model: str, vectors: Sequence[Sequence[float]], counts: list[int], *, packed: bool) -> Object:
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

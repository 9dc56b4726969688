"""OpenAI's wire format of answers: JSON, and the chunks of a stream.

Knows shapes. Knows nothing of requests, HTTP servers or models.
"""

from __future__ import annotations

import struct
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

from ...text.choice import Piece, TokenLogprob, TokenName
from ..http.service import new_id

Object = dict[str, Any]
LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON does not have, as OpenAI does


def usage(prompt: int, completion: int, cached: int) -> Object:
    """Numbers of tokens. cached: those of the prompt that came from the prefix cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Answer:
    """Writes one answer. Its chunks, or its JSON, share one frame of id, model and time."""

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
        """The first chunk of a chat stream: the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def chunks(self, piece: Piece) -> Iterator[Object]:
        """The chunks of one piece; the finish reason has its own."""
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

    def closing(self, counts: Object) -> Object | None:
        """The last chunk of a stream whose caller asked for usage."""
        return {**self._frame, "choices": [], "usage": counts} if self._wants_usage else None

    def whole(self, choices: Sequence[Sequence[Piece]], counts: Object) -> Object:
        """The JSON of a complete answer. choices: all pieces of each choice."""
        return {**self._frame, "choices": [self._choice(i, p) for i, p in enumerate(choices)], "usage": counts}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Object:
        text = "".join([piece.text for piece in pieces])
        finish = next((piece.finish for piece in pieces if piece.finish), None)
        wanted = any(piece.scored is not None for piece in pieces)
        logprobs = self._logprobs([one for piece in pieces for one in piece.scored or ()] if wanted else None)
        body: Object = {"text": text}
        if self._chat:
            calls: list[Object] = []
            for part in [part for piece in pieces for part in piece.calls]:
                if part.id is not None:
                    function = {"name": part.name, "arguments": part.arguments}
                    calls.append({"id": part.id, "type": "function", "function": function})
                else:
                    calls[part.call]["function"]["arguments"] += part.arguments
            message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
            body = {"message": {**message, "tool_calls": calls} if calls else message}
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, scored: Sequence[TokenLogprob] | None) -> Object | None:
        if scored is None:
            return None
        if self._chat:

            def entry(token: TokenName, logprob: float | None) -> Object:
                return {"token": token[0], "logprob": finite(logprob), "bytes": token[1]}

            content = [
                {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
                for one in scored
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [one.token[0] for one in scored],
            "token_logprobs": [finite(one.logprob) for one in scored],
            # Always with the chosen token: one entry more than wanted where it is not among the best.
            "top_logprobs": [
                None
                if one.logprob is None
                else {token[0]: finite(logprob) for token, logprob in [*one.top, (one.token, one.logprob)]}
                for one in scored
            ],
            "text_offset": [one.start for one in scored],
        }

    def _chunk(
        self, index: int, delta: Object, finish: str | None, text: str = "", logprobs: Object | None = None
    ) -> Object:
        body: Object = {"delta": delta} if self._chat else {"text": text}
        chunk = {**self._frame, "choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish}]}
        return {**chunk, "usage": None} if self._wants_usage else chunk


def finite(logprob: float | None) -> float | None:
    """The logprob as JSON can express it."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def embedding_list(model: str, vectors: Sequence[Sequence[float]], counts: list[int], *, base64: bool) -> Object:
    """OpenAI's embedding list. base64: of little-endian float32, which the official client requests.

    `usage.per_input_tokens` is an extension: a cache of single inputs needs it to compute the usage of another batch.
    """
    data = [
        {"object": "embedding", "index": index, "embedding": to_base64(vector) if base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    total = sum(counts)
    usage_ = {"prompt_tokens": total, "total_tokens": total, "per_input_tokens": counts}
    return {"object": "list", "data": data, "model": model, "usage": usage_}


def to_base64(vector: Sequence[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

"""One streamed answer: events in, times and tokens out. Knows SSE and OpenAI's chunks; nothing of HTTP or Locust."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson


class AnswerError(Exception):
    """An answer that is none. The message is its kind: few different ones, so that they can be counted."""


@dataclass
class Answer:
    """One request. Times are seconds of one monotonic clock.

    `events` are the arrivals of events that carried content: the first is the first token (TTFT is counted from
    `began`, before the connection is taken), the gaps between them are the inter-token latency (ITL): of several tokens
    where an event holds them, as the model service's do when it has many streams.
    """

    scenario: str
    number: int
    began: float
    ended: float = 0.0
    events: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache: str = "none"
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.events[0] - self.began

    @property
    def seconds(self) -> float:
        """End to end: from before the request to the end of the stream."""
        return self.ended - self.began

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first, by the time they took; None for an answer that came in one piece."""
        span = self.events[-1] - self.events[0] if self.events else 0.0
        return (self.completion_tokens - 1) / span if span > 0 and self.completion_tokens > 1 else None


def read_stream(answer: Answer, readline: Callable[[], bytes], clock: Callable[[], float]) -> None:
    """Read to the end of the stream. `readline` gives one line as soon as it is there, b"" at the end.

    Raises AnswerError for an error event, a stream without [DONE], and an answer without content or usage.
    """
    done = False
    usage: dict[str, Any] | None = None
    while line := readline():
        now = clock()
        if not line.startswith(b"data:"):
            continue  # an empty line, a comment, `event:`
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue  # to the end of the body: only then the connection can be used again
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise AnswerError("event that is not JSON") from None
        if "error" in event:
            raise AnswerError(f"error in the stream: {kind_of(event)}")
        if any(choice["delta"].get("content") for choice in event.get("choices") or ()):
            answer.events.append(now)
        usage = event.get("usage") or usage
    answer.ended = clock()
    if not done:
        raise AnswerError("stream without [DONE]")
    if not answer.events:
        raise AnswerError("answer without content")
    if usage is None:
        raise AnswerError("answer without usage")
    answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def kind_of(body: Any) -> str:
    """Type or code of OpenAI's error envelope; never its message, which may differ each time."""
    error = body.get("error") if isinstance(body, dict) else None
    reply = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return str(reply or "unknown")


def cache_state(header: str | None) -> str:
    """RFC 9211's Cache-Status in short: hit, miss, collapsed (joined a request under way), `bypass: why`, none."""
    if not header:
        return "none"
    parts = [part.strip() for part in header.split(";")[1:]]
    if "hit" in parts:
        return "hit"
    if "collapsed" in parts:
        return "collapsed"
    reply = dict(part.split("=", 1) for part in parts if "=" in part)
    forwarded, why = reply.get("fwd", "unknown"), reply.get("detail", "").strip('"')
    return f"{forwarded}: {why}" if why and forwarded != "miss" else forwarded

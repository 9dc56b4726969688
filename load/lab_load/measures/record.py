"""One request: turns events into times and tokens. Knows SSE and OpenAI's chunks; nothing of HTTP or Locust."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

CHANNELS = (
    "content",
    "reasoning_content",
    "reasoning",
    "refusal",
    "tool_calls",
)  # of a delta: all are generated tokens


class AnswerError(Exception):
    """A failed answer. The message is the kind of failure; there are few kinds, so that they can be counted."""


@dataclass(slots=True)
class Record:
    """One request. Times are seconds of one monotonic clock.

    `intended`: start time by the arrival process; in a closed loop it equals `started`. All latencies count from it, so
    that time spent waiting inside the generator counts. `events`: arrival times of events with content in any channel.
    An event can hold several tokens, so TPOT takes the number of tokens from the usage.
    """

    scenario: str
    number: int  # line number in the workload file
    question: int
    intended: float
    started: float
    ended: float = 0.0
    events: array[float] = field(default_factory=lambda: array("d"))
    first_visible: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache: str = "none"
    status: int = 0  # 0: no response came
    retry_after: str = ""
    replica: str = ""
    abandoned: bool = False  # the workload closed the stream before its end
    error: str = ""

    @property
    def lag(self) -> float:
        """Schedule lag in seconds: real start minus intended start."""
        return self.started - self.intended

    @property
    def ttft(self) -> float | None:
        return self.events[0] - self.intended if self.events else None

    @property
    def visible(self) -> float | None:
        return None if self.first_visible is None else self.first_visible - self.intended

    @property
    def seconds(self) -> float:
        """End-to-end seconds: to the last event with content; of a failure or an answer without events, to its end."""
        last = self.events[-1] if self.events and not self.error else self.ended
        return last - self.intended

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies (ITL): seconds between events with content."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for at most one token."""
        if len(self.events) < 1 or self.completion_tokens <= 1:
            return None
        return (self.events[-1] - self.events[0]) / (self.completion_tokens - 1)

    @property
    def state(self) -> str:
        """The cache state without its reason: hit, miss, collapsed, bypass, …, none."""
        return self.cache.partition(":")[0]

    def shift(self, seconds: float) -> None:
        """Turn its times into those of another machine's clock."""
        self.intended += seconds
        self.started += seconds
        self.ended += seconds
        self.events = array("d", (moment + seconds for moment in self.events))
        if self.first_visible is not None:
            self.first_visible += seconds

    def to_wire(self) -> dict[str, Any]:
        """The record as a message between Locust's processes."""
        return {name: list(self.events) if name == "events" else getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Record:
        return cls(**{**fields, "events": array("d", fields["events"])})

    def line(self, began: float, *, steady: bool) -> dict[str, Any]:
        """The record as a line of records.jsonl. Times are seconds since `began`, the start of the run."""
        gaps = sorted(self.gaps)

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(moment - began, 6)

        return {
            "scenario": self.scenario, "number": self.number, "question": self.question, "steady": steady,
            "intended": since(self.intended), "started": since(self.started),
            "first_event": since(self.events[0] if self.events else None), "first_visible": since(self.first_visible),
            "last_content": since(self.events[-1] if self.events else None), "ended": since(self.ended),
            "ttft": self.ttft, "e2e": self.seconds, "tpot": self.tpot,
            "gaps": {"count": len(gaps), "median": gaps[len(gaps) // 2], "max": gaps[-1]} if gaps else {"count": 0},
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens, "cache": self.cache, "status": self.status, "replica": self.replica,
            "retry_after": self.retry_after, "abandoned": self.abandoned, "error": self.error,
        }  # fmt: skip


def read_stream(
    record: Record,
    readline: Callable[[], bytes],
    clock: Callable[[], float],
    *,
    stop_after: int | None = None,
    pause: Callable[[], None] | None = None,
) -> None:
    """Read a stream to its end. `readline` returns one line as soon as it arrives, b"" at the end.

    `stop_after`: abandon the stream after this many events with content. `pause`: called after each of them, for slow
    readers. Raises AnswerError for an error event, a stream without [DONE], and an answer without content or usage.
    """
    done = False
    usage: dict[str, Any] | None = None
    while line := readline():
        now = clock()  # before parsing, which is not the server's time
        if not line.startswith(b"data:"):
            continue  # an empty line, a comment, `event:`
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue  # read to the end of the body, so that the connection can be used again
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise AnswerError("event is not JSON") from None
        if "error" in event:
            raise AnswerError(f"error in the stream: {error_kind(event)}")
        if take_event(record, event, now):
            if len(record.events) == stop_after:
                record.ended, record.abandoned = now, True
                return
            if pause is not None:
                pause()
        usage = event.get("usage") or usage
    record.ended = clock()
    if not done:
        raise AnswerError("stream without [DONE]")
    if not record.events:
        raise AnswerError("answer without content")
    if usage is None:
        raise AnswerError("answer without usage")
    take_usage(record, usage)
    if len(record.events) > record.completion_tokens:
        raise AnswerError("more events with content than tokens in the usage")


def take_event(record: Record, event: Mapping[str, Any], now: float) -> bool:
    """Record an event's arrival. False if it has no content: only the role, the end, or the usage."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice  # /v1/completions has `text` in the choice itself
        visible = bool(delta.get("content") or delta.get("text"))
        if visible or any(delta.get(name) for name in CHANNELS):
            record.events.append(now)
            if visible and record.first_visible is None:
                record.first_visible = now
            return True
    return False


def take_usage(record: Record, usage: Mapping[str, Any]) -> None:
    """Take the numbers of tokens from OpenAI's usage object."""
    record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    record.completion_tokens = int(usage.get("completion_tokens") or 0)
    record.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def error_kind(body: Any) -> str:
    """Code or type of OpenAI's error object; not its message, which can differ each time."""
    error = body.get("error") if isinstance(body, dict) else None
    kind = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return str(kind or "unknown")


def cache_state(header: str | None) -> str:
    """RFC 9211's Cache-Status in short: hit, miss, collapsed (joined a running request), `bypass: reason`, none."""
    if not header:
        return "none"
    parts = [part.strip() for part in header.split(";")[1:]]
    if "hit" in parts:
        return "hit"
    if "collapsed" in parts:
        return "collapsed"
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    forwarded, reason = named.get("fwd", "unknown"), named.get("detail", "").strip('"')
    return f"{forwarded}: {reason}" if reason and forwarded != "miss" else forwarded

"""One choice of an answer while it grows: the engine's tokens in, pieces for the wire out.

Brings text, stop strings, tool calls and logprobs together; knows nothing of HTTP or other choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..api.wire.answers import CallPart, Piece, Scored
from ..engine.sampler import Logprob
from ..engine.scheduler import Event
from .tokenizer import Growing, Text
from .tool_calls import Calls, Said


class Choice:
    """`logprobs`: whether they were asked for; `calls`: how tool calls are found, None where there are none."""

    def __init__(
        self, index: int, text: Text, stops: Sequence[str] = (), *, logprobs: bool = False, calls: Calls | None = None
    ) -> None:
        self.ended = False
        self.ends_itself = bool(stops) or calls is not None  # perhaps, by what it says
        self._index, self._text, self._calls = index, text, calls
        self._growing = Growing(text.decoding(), stops, aligned=logprobs)
        self._tokens: list[tuple[int, Logprob]] = []
        self._shown = 0  # how many of them are out, or passed over

    def push(self, event: Event) -> Piece | None:
        """What is certain after this step, None: nothing new. Sets `ended`; the engine may not know that yet."""
        text = self._growing.push(event.tokens)
        finish: str | None = event.finish
        if finish and not self._growing.stopped:
            text += self._growing.rest()
        cut = self._growing.stopped  # the held-back rest may have completed a stop string
        if cut:
            finish = "stop"
        calls: list[CallPart] = []
        scored: list[Scored] | None = None
        if self._calls is None:
            if self._growing.starts is not None:
                self._tokens += zip(event.tokens, event.logprobs, strict=True)
                scored = self._score(math.inf if finish and not cut else self._growing.length, None)
        else:
            parts = self._calls.push(text, last=bool(finish))
            said = [part for part in parts if isinstance(part, Said)]
            calls = [part for part in parts if isinstance(part, CallPart)]
            text = "".join([part.text for part in said])
            if self._calls.done:
                finish = "stop"
            if finish == "stop" and self._calls.count:
                finish = "tool_calls"
            if self._growing.starts is not None:
                self._tokens += zip(event.tokens, event.logprobs, strict=True)
                scored = self._score(self._calls.at, said)
        self.ended = finish is not None
        if text or finish or scored or calls:
            return Piece(self._index, text, finish, scored, calls)
        return None

    def _score(self, until: float, said: Sequence[Said] | None) -> list[Scored]:
        """The tokens that begin before `until`, a place in the text; of an answer with calls those of what is said."""
        out = []
        starts = self._growing.starts or []
        while self._shown < len(self._tokens) and starts[self._shown] < until:
            start = starts[self._shown]
            token, logprob = self._tokens[self._shown]
            self._shown += 1
            if said is None or any(part.start <= start < part.start + len(part.text) for part in said):
                top = [(self._text.name(other), value) for other, value in logprob.top]
                out.append(Scored(self._text.name(token), logprob.logprob, top, start))
        return out

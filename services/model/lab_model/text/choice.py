"""One choice of an answer while it is generated: the engine's tokens in, pieces for the API out.

Combines text, stop strings, tool calls and logprobs. Knows nothing of HTTP or of other choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.request import StepOutput
from ..engine.sampling_params import Logprob
from .decoding import IncrementalDetokenizer
from .tokenizer import ModelTokenizer
from .tool_calls import CallParser, CallPart, TextSpan

# A token in `logprobs`: its name, and its bytes where it has any.
TokenName = tuple[str, list[int] | None]


class TokenLogprob(NamedTuple):
    """One token of an answer with its logprob, and the best alternatives with theirs."""

    token: TokenName
    logprob: float
    top: list[tuple[TokenName, float]]
    start: int  # its offset in the text, in characters


@dataclass(slots=True)
class Piece:
    """What one or more steps added to one choice."""

    index: int
    text: str = ""
    finish: str | None = None
    scored: list[TokenLogprob] | None = None  # None: the request has no logprobs
    calls: Sequence[CallPart] = ()


class Choice:
    """logprobs: whether pieces carry them. calls: the parser for tool calls, None without tools."""

    def __init__(
        self,
        index: int,
        text: ModelTokenizer,
        stops: Sequence[str] = (),
        *,
        logprobs: bool = False,
        calls: CallParser | None = None,
    ) -> None:
        self.ended = False
        self.ends_itself = bool(stops) or calls is not None  # its text may end it
        self._index, self._text, self._calls = index, text, calls
        self._detokenizer = IncrementalDetokenizer(text.decoding(), stops, aligned=logprobs)
        self._tokens: list[tuple[int, Logprob]] = []
        self._shown = 0  # how many of them have been returned or skipped

    def push(self, output: StepOutput) -> Piece | None:
        """What is final after this step; None: nothing new. Sets `ended`, also where the engine does not know it."""
        text = self._detokenizer.push(output.tokens)
        finish: str | None = output.finish
        if finish and not self._detokenizer.stopped:
            text += self._detokenizer.rest()
        stopped = self._detokenizer.stopped  # the held-back rest may have completed a stop string
        if stopped:
            finish = "stop"
        calls: list[CallPart] = []
        scored: list[TokenLogprob] | None = None
        if self._calls is None:
            if self._detokenizer.starts is not None:
                self._tokens += zip(output.tokens, output.logprobs, strict=True)
                scored = self._score(math.inf if finish and not stopped else self._detokenizer.length, None)
        else:
            parts = self._calls.push(text, last=bool(finish))
            spans = [part for part in parts if isinstance(part, TextSpan)]
            calls = [part for part in parts if isinstance(part, CallPart)]
            text = "".join([part.text for part in spans])
            if self._calls.done:
                finish = "stop"
            if finish == "stop" and self._calls.count:
                finish = "tool_calls"
            if self._detokenizer.starts is not None:
                self._tokens += zip(output.tokens, output.logprobs, strict=True)
                scored = self._score(self._calls.at, spans)
        self.ended = finish is not None
        if text or finish or scored or calls:
            return Piece(self._index, text, finish, scored, calls)
        return None

    def _score(self, until: float, spans: Sequence[TextSpan] | None) -> list[TokenLogprob]:
        """Logprobs of the tokens that begin before `until`, an offset; with tool calls only of those in `spans`."""
        out = []
        starts = self._detokenizer.starts or []
        while self._shown < len(self._tokens) and starts[self._shown] < until:
            start = starts[self._shown]
            token, logprob = self._tokens[self._shown]
            self._shown += 1
            if spans is None or any(span.start <= start < span.start + len(span.text) for span in spans):
                top = [(self._text.name(other), value) for other, value in logprob.top]
                out.append(TokenLogprob(self._text.name(token), logprob.logprob, top, start))
        return out

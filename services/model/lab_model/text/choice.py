"""One choice of an answer while it is generated: turns the engine's tokens into pieces for the API.

Combines text, stop strings, tool calls and logprobs. Knows nothing of HTTP or of other choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.request import StepOutput
from ..engine.sampling_params import Logprob
from .decoding import UNFINISHED, IncrementalDetokenizer, StopSearch
from .tokenizer import ModelTokenizer
from .tool_calls import CallParser, CallPart, TextSpan

# A token in `logprobs`: its name, and its bytes where it has any.
TokenName = tuple[str, list[int] | None]


class TokenLogprob(NamedTuple):
    """One token of an answer with its logprob, and the best alternatives with theirs. logprob: None for the first token
    of an echoed prompt, which has no logprob."""

    token: TokenName
    logprob: float | None
    top: list[tuple[TokenName, float]]
    start: int  # its offset in the text, in characters


@dataclass(slots=True)
class Piece:
    """The part of one choice that one or more steps added."""

    index: int
    text: str = ""
    finish: str | None = None
    scored: list[TokenLogprob] | None = None  # None: the request has no logprobs
    calls: Sequence[CallPart] = ()


class VisibleText:
    """The answer's text outside tool calls, cut at the first stop string; the text of calls is not searched."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = StopSearch(stops)
        self._held: list[TextSpan] = []  # what StopSearch holds back, with its places

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stops.stopped

    @property
    def begin(self) -> float:
        """The offset in the answer at which the held-back text begins; infinite if none is held back."""
        return self._held[0].start if self._held else math.inf

    def push(self, span: TextSpan) -> list[TextSpan]:
        """Add text; returns the text that is now final."""
        self._held.append(span)
        return self._take(len(self._stops.push(span.text)))

    def rest(self) -> list[TextSpan]:
        """The held-back text, at the end."""
        return self._take(len(self._stops.rest()))

    def _take(self, length: int) -> list[TextSpan]:
        out = []
        while self._held and length:
            text, start = self._held.pop(0)
            out.append(TextSpan(text[:length], start))
            if len(text) > length:
                self._held.insert(0, TextSpan(text[length:], start + length))
            length -= len(out[-1].text)
        return out


class Choice:
    """logprobs: whether pieces carry them. calls: the parser for tool calls, None without tools. offset: characters
    before the answer in the text that `logprobs` refer to, those of an echoed prompt."""

    def __init__(
        self,
        index: int,
        text: ModelTokenizer,
        stops: Sequence[str] = (),
        *,
        logprobs: bool = False,
        calls: CallParser | None = None,
        offset: int = 0,
    ) -> None:
        self.ended = False
        self.ends_itself = bool(stops) or calls is not None  # its text may end it
        self._index, self._text, self._calls, self._offset = index, text, calls, offset
        # With tools, the text is searched for stop strings after calls have been removed from it.
        self._detokenizer = IncrementalDetokenizer(text.decoding(), () if calls else stops, aligned=logprobs)
        self._visible = VisibleText(stops)
        self._tokens: list[tuple[int, Logprob]] = []
        self._shown = 0  # how many of them have been returned or skipped

    def push(self, output: StepOutput) -> Piece | None:
        """The piece that is final after this step; None: nothing new. Sets `ended`, also if the engine does not know
        that the answer has ended."""
        text = self._detokenizer.push(output.tokens)
        finish: str | None = output.finish
        if finish and not self._detokenizer.stopped:
            rest = self._detokenizer.rest()
            # Arguments that a limit cut off must be a prefix of the whole, so without U+FFFD for half a character.
            text += rest.rstrip(UNFINISHED) if self._calls and finish == "length" else rest
        stopped = self._detokenizer.stopped  # the held-back rest may have completed a stop string
        if stopped:
            finish = "stop"
        spans: list[TextSpan] | None = None
        if self._calls is None:
            piece = Piece(self._index, text, finish)
            until = math.inf if finish and not stopped else self._detokenizer.length
        else:
            piece, spans = self._without_calls(text, finish, self._calls)
            until = min(self._calls.at, self._visible.begin)
        if self._detokenizer.starts is not None:
            self._tokens += zip(output.tokens, output.logprobs, strict=True)
            piece.scored = self._score(until, spans)
        self.ended = piece.finish is not None
        return piece if piece.text or piece.finish or piece.scored or piece.calls else None

    def _without_calls(self, text: str, finish: str | None, parser: CallParser) -> tuple[Piece, list[TextSpan]]:
        """The piece of a text that may contain tool calls, and the spans of its visible text."""
        calls: list[CallPart] = []
        spans: list[TextSpan] = []
        for part in parser.push(text, last=bool(finish), cut=finish == "length"):
            if isinstance(part, CallPart):
                calls.append(part)
            else:
                spans += self._visible.push(part)
            if self._visible.stopped:
                break
        if self._visible.stopped or parser.done:
            finish = "stop"
        if finish:
            spans += self._visible.rest()
        if finish == "stop" and parser.count:
            finish = "tool_calls"
        return Piece(self._index, "".join([span.text for span in spans]), finish, calls=calls), spans

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
                out.append(TokenLogprob(self._text.name(token), logprob.logprob, top, self._offset + start))
        return out

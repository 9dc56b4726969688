"""A question and a long text as token rows that fit a reader: overlapping windows over the text.

Knows one tokenizer. Knows nothing of models or HTTP.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Tokenizer

from .tokenizer import ModelTokenizer

STRIDE_SHARE = (
    4  # of a window's text a quarter comes again in the next one, so that an answer at its end is whole there
)


class Window(NamedTuple):
    """One row. first, stop: the tokens of the text; offsets: begin and end of each token in the text, in characters."""

    ids: list[int]
    first: int
    stop: int
    offsets: list[tuple[int, int]]


class PairWindows:
    """context: tokens of one row."""

    def __init__(self, text: ModelTokenizer, context: int) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
        self._context = context

    def question_tokens(self, question: str) -> int:
        return len(self._tokenizer.encode(question, add_special_tokens=False).ids)

    def cut(self, question: str, text: str) -> list[Window]:
        """The windows, in the order of the text. The question may take half of the context at most."""
        room = self._context - self.question_tokens(question) - self._tokenizer.num_special_tokens_to_add(True)
        self._tokenizer.enable_truncation(self._context, stride=room // STRIDE_SHARE, strategy="only_second")
        found = self._tokenizer.encode(question, text)
        self._tokenizer.no_truncation()
        windows = []
        for each in [found, *found.overflowing]:
            places = [place for place, sequence in enumerate(each.sequence_ids) if sequence == 1]
            if places:
                windows.append(Window(each.ids, places[0], places[-1] + 1, each.offsets))
        return windows

"""Extractive question answering by a Hugging Face reader: scores for the begin and the end of an answer, span search.

Knows tensors and token places. Knows nothing of HTTP or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .classifier import positions
from .padding import padded


class Ends(NamedTuple):
    """Logits of one row, (tokens,) both: that the answer begins, and that it ends, at each token. The sum for the first
    token is the model's score of no answer (Rajpurkar et al. 2018, SQuAD 2.0)."""

    start: torch.Tensor
    end: torch.Tensor


class Span(NamedTuple):
    """Tokens first to last of a row, and the probability that they are the answer. none: the probability that this row
    has no answer."""

    first: int
    last: int
    score: float
    none: float


class Reader:
    """Not thread-safe: the caller runs one `forward` at a time.

    separator: the id after which a row's second part begins, for models with token types.
    """

    def __init__(self, model: Any, context: int, separator: int) -> None:
        self._model, self._separator = model, separator
        self.context = min(context, positions(model.config) or context)
        self._typed = getattr(model.config, "type_vocab_size", 0) > 1

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]]) -> list[Ends]:
        """The scores of each row: question and a part of the text, with the special tokens of the model."""
        ids, mask = padded(rows, self._model.device)
        more = {}
        if self._typed:
            # 1 after the first separator.
            ends = (ids == self._separator).cumsum(-1) - (ids == self._separator).int()
            more = {"token_type_ids": (ends > 0).long() * mask}
        output = self._model(input_ids=ids, attention_mask=mask, **more)
        starts, ends_ = output.start_logits.float().cpu(), output.end_logits.float().cpu()  # (rows, width)
        return [Ends(starts[i, : len(row)], ends_[i, : len(row)]) for i, row in enumerate(rows)]


def best_span(found: Ends, first: int, stop: int, longest: int) -> Span:
    """The most probable span of at most `longest` tokens within [first, stop) of a row.

    A span's probability is that of its begin times that of its end, among the tokens of [first, stop) and the first
    token, which stands for no answer.
    """
    width = len(found.start)
    allowed = torch.zeros(width, dtype=torch.bool)
    allowed[0] = True
    allowed[first:stop] = True
    starts = found.start.masked_fill(~allowed, float("-inf")).softmax(-1)
    ends = found.end.masked_fill(~allowed, float("-inf")).softmax(-1)
    pairs = starts[first:stop, None] * ends[None, first:stop]  # (tokens, tokens)
    pairs = pairs.triu().tril(longest - 1)
    place = int(pairs.argmax())
    begin, end = divmod(place, stop - first)
    return Span(first + begin, first + end, float(pairs[begin, end]), float(starts[0] * ends[0]))

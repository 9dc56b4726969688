"""The interface between the scheduler and a runner, which computes logits over a pool of KV pages.

Knows page numbers and shapes. Knows nothing of weights or of scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one request in a prefill, at least one. pages: those of the tokens [0, stop)."""

    start: int
    stop: int
    pages: Sequence[int]


class Runner(Protocol):
    """A model with its pool of pages. Logits are (rows, vocab), float32.

    batch_invariant: the result for a token depends neither on the number of tokens that are computed with it nor on
    whether it is prefilled or decoded.
    """

    batch_invariant: bool
    context: int
    vocab: int  # token ids below it have an embedding

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        ...

    @property
    def token_bytes(self) -> int:
        """Size of the keys and values of one token."""
        ...

    @property
    def pool_bytes(self) -> int:
        """Size of the pool of pages."""
        ...

    def allocate(self, pages: int) -> None:
        """Allocate the pool. Page 0 is never assigned; it pads rows that have fewer pages than others."""
        ...

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Compute the tokens of the spans, whose `ids` are concatenated. Returns the logits of each span's last
        token."""
        ...

    def all_logits(self, ids: Sequence[int], pages: Sequence[int], start: int = 0) -> torch.Tensor:
        """Prefill one text, or, if its beginning is computed, its tokens from `start` on. Returns the logits of each of
        `ids`. pages: those of the text from its beginning."""
        ...

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute one more token for each row. positions: of these tokens in their texts."""
        ...

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Zero pages before they get a new holder, where attention reads beyond a row's own tokens. A NaN of an earlier
        request would spoil the result even if it is masked, because 0 * NaN is NaN."""
        ...

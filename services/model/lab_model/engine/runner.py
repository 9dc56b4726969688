"""What the scheduler expects of a runner, which computes logits over a pool of KV pages.

Knows page numbers and shapes. Knows nothing of weights or of scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one request in a prefill, at least one. pages: those that hold [0, stop)."""

    start: int
    stop: int
    pages: Sequence[int]


class Runner(Protocol):
    """A model with its pool of pages. Logits are (rows, vocab), float32.

    batch_invariant: the result for a token depends neither on how many others are computed with it nor on whether it
    is prefilled or decoded.
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
        """Make the pool. Page 0 is never assigned and fills the rows that have fewer pages than others."""
        ...

    def prefill(self, ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Compute the spans' tokens, whose `ids` follow each other. The logits of each span's last token."""
        ...

    def all_logits(self, ids: Sequence[int], pages: Sequence[int], start: int = 0) -> torch.Tensor:
        """A prefill of one text, or of the tokens from `start` on of one whose beginning is computed. The logits of
        each of `ids`. pages: those of the text from its beginning."""
        ...

    def decode(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """One more token for each row. positions: of these tokens in their texts."""
        ...

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Before pages get a new holder: zero what attention reads beyond a row's own tokens. A NaN left by an
        earlier request would spoil the result even where it is masked, because 0 * NaN is NaN."""
        ...

"""Sentence embeddings from a Hugging Face encoder: token ids in, vectors out.

Pooling over the tokens and normalization, as the model was trained (Reimers and Gurevych 2019). Knows nothing of HTTP
or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from .padding import padded

Pooling = Literal["mean", "cls", "last", "max"]


class Embedder:
    """Not thread-safe: the caller runs one `forward` at a time."""

    def __init__(self, model: Any, context: int, pooling: Pooling = "mean", *, normalize: bool = True) -> None:
        """pooling: a text's vector is the mean of its tokens' vectors, the first (`cls`), the last, or the maximum."""
        self._model, self._pooling, self._normalize = model, pooling, normalize
        places = int(getattr(model.config, "max_position_embeddings", context))
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if (padding := getattr(table, "padding_idx", None)) is not None:
            places -= padding + 1  # RoBERTa's positions begin after its padding
        self.context = min(context, places)
        self.dimensions = int(model.config.hidden_size)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector of `dimensions` floats for each list of 1 to `context` ids, of length 1 if the model normalizes."""
        ids, mask = padded(rows, self._model.device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (rows, width, dim)
        pooled = self._pool(hidden, mask)
        if self._normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        vectors: list[list[float]] = pooled.tolist()
        return vectors

    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden: (rows, width, dim); mask: (rows, width), 1 for tokens. (rows, dim)."""
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        if self._pooling == "max":
            return hidden.masked_fill(mask[..., None] == 0, -math.inf).amax(1)
        weight = mask[..., None].float()
        return (hidden * weight).sum(1) / weight.sum(1)

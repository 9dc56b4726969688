"""Sentence embeddings from a Hugging Face encoder: token ids in, unit vectors out.

Mean pooling over the tokens and normalization, as sentence-transformers models of this family are trained
(Reimers and Gurevych 2019). Knows nothing of HTTP or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .padding import padded


class Embedder:
    """Not thread-safe: the caller runs one `forward` at a time."""

    def __init__(self, model: Any, context: int) -> None:
        self._model = model
        self.context = min(context, int(getattr(model.config, "max_position_embeddings", context)))
        self.dimensions = int(model.config.hidden_size)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector of `dimensions` floats, length 1, for each list of token ids (1 to `context` of them)."""
        ids, mask = padded(rows, self._model.device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (rows, width, dim)
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
        return vectors

"""Sentence embeddings from a Hugging Face encoder: token ids in, unit vectors out.

Mean pooling over the tokens and normalization, as sentence-transformers models of this family are trained
(Reimers and Gurevych 2019). Knows nothing of HTTP or text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

# Tokens of one forward, padding included: bounds the memory of activations, and the time until a cancelled request ends
# (about 200 ms on 2 cores).
BATCH_TOKENS = 1024


class Embedder:
    """Not thread-safe: the caller runs one `embed` at a time."""

    def __init__(self, model: Any, context: int) -> None:
        self._model = model
        self.context = min(context, int(getattr(model.config, "max_position_embeddings", context)))
        self.dimensions = int(model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Sequence[int]], cancelled: threading.Event) -> list[list[float]]:
        """One vector of `dimensions` floats, length 1, for each list of token ids (1 to `context` of them).

        Set `cancelled` from another thread to end it after the current forward; inputs not computed by then have empty
        vectors.
        """
        vectors: list[list[float]] = [[] for _ in inputs]
        # Inputs of similar length together: less padding.
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]), reverse=True)
        while order and not cancelled.is_set():
            width = len(inputs[order[0]])
            part, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
            for i, vector in zip(part, self._forward([inputs[i] for i in part], width), strict=True):
                vectors[i] = vector
        return vectors

    def _forward(self, rows: list[Sequence[int]], width: int) -> list[list[float]]:
        device = self._model.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)  # (rows, width)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (rows, width, dim)
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
        return vectors

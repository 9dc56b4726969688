"""Text classification by a Hugging Face sequence classifier: token ids in, one probability for each label out.

Knows tensors. Knows nothing of HTTP or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .padding import padded


class Classifier:
    """Not thread-safe: the caller runs one `forward` at a time.

    labels: by index. The probabilities add up to 1, unless the model's configuration says that several labels can apply
    at once (`problem_type: multi_label_classification`).
    """

    def __init__(self, model: Any, context: int) -> None:
        self._model = model
        self.context = min(context, positions(model.config) or context)
        self.labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        self._several = model.config.problem_type == "multi_label_classification" or len(self.labels) == 1

    @torch.inference_mode()
    def forward(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The probability of each label for each list of token ids (1 to `context` of them)."""
        ids, mask = padded(rows, self._model.device)
        logits = self._model(input_ids=ids, attention_mask=mask).logits.float()  # (rows, labels)
        chances: list[list[float]] = (logits.sigmoid() if self._several else logits.softmax(-1)).tolist()
        return chances


def positions(config: Any) -> int | None:
    """Number of tokens for which the model has positions. RoBERTa's first position is 2, so it has two fewer than its
    configuration says."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    shifted = config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    return int(most) - 2 if shifted else int(most)

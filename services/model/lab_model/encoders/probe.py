"""Sentiment by a linear probe: logistic regression over one embedding model's sentence vectors (Alain and Bengio 2016).

`make train-probe` writes sentiment.json. Knows vectors. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

POSITIVE, NEGATIVE = "POSITIVE", "NEGATIVE"
FILE = Path(__file__).with_name("sentiment.json")
# Largest difference of the check sentence's vector: other batches and processors round differently.
TOLERANCE = 0.01


class SentimentProbe:
    """weights: one for each dimension. check_text, check_vector: a sentence and its vector by the model for which the
    probe was trained."""

    def __init__(self, weights: Sequence[float], bias: float, check_text: str, check_vector: Sequence[float]) -> None:
        self._weights, self._bias = list(weights), bias
        self.check_text, self._check_vector = check_text, list(check_vector)

    @classmethod
    def load(cls, path: Path = FILE) -> SentimentProbe:
        """Raises OSError, ValueError or KeyError for a missing or damaged file."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(fields["weights"], fields["bias"], fields["check"]["text"], fields["check"]["vector"])

    def fits(self, vector: Sequence[float]) -> bool:
        """Whether `vector`, a model's vector of the check sentence, is that of the model of the training."""
        return len(vector) == len(self._weights) and all(
            abs(one - other) < TOLERANCE for one, other in zip(vector, self._check_vector, strict=False)
        )

    def positive(self, vector: Sequence[float]) -> float:
        """The probability that the text is positive."""
        logit = sum(weight * value for weight, value in zip(self._weights, vector, strict=True)) + self._bias
        return 1 / (1 + math.exp(-logit))

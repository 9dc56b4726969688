"""What is asked, and how often. A question is a function of seed, salt and number; knows nothing of HTTP or Locust."""

from __future__ import annotations

import bisect
import itertools
import math
import random

WORDS = (
    "river", "stone", "window", "market", "garden", "teacher", "letter", "winter", "bridge", "engine", "music",
    "paper", "forest", "island", "doctor", "mirror", "kitchen", "planet", "silver", "harbor", "candle", "castle",
    "desert", "farmer", "guitar", "hammer", "insect", "jungle", "ladder", "meadow", "needle", "ocean", "pencil",
    "rabbit", "saddle", "ticket", "valley", "wagon", "anchor", "basket", "camera", "dragon", "eagle", "feather",
    "glacier", "helmet", "ivory", "jacket",
)  # fmt: skip


def question(seed: int, salt: str, number: int, words: int) -> str:
    """Question `number` of a run.

    Salt and number come first: questions of one run then share no beginning that a prefix cache could keep, and
    questions of two runs share none either.
    """
    chosen = random.Random(f"{seed}/{number}").choices(WORDS, k=words)  # noqa: S311 reproducible, not secret
    return f"{salt}-{number}: write about {' '.join(chosen)}."


class Zipf:
    """Numbers 1…n, number k with probability k^-s / Σ i^-s: how unevenly people ask (Breslau et al., 1999)."""

    def __init__(self, n: int, s: float, seed: int) -> None:
        weights = [k**-s for k in range(1, n + 1)]
        total = math.fsum(weights)
        self.probabilities = [weight / total for weight in weights]
        self._cumulative = list(itertools.accumulate(weights))
        self._random = random.Random(f"zipf/{seed}")  # noqa: S311 as above

    def draw(self) -> int:
        """The next number. One sequence a run, whoever asks: the i-th draw depends on the seed alone."""
        return bisect.bisect_right(self._cumulative, self._random.random() * self._cumulative[-1]) + 1

    def expected_hits(self, draws: int) -> tuple[float, float]:
        """Hits of a perfect, cold cache in `draws` draws: the mean, and an upper bound of the standard deviation.

        A miss is the first draw of a number, so E[hits] = n − Σ (1 − (1 − p_k)^n). Whether k was drawn is a Bernoulli
        variable, and these are negatively associated, so the variance is at most the sum of theirs.
        """
        drawn = [-math.expm1(draws * math.log1p(-p)) if p < 1 else float(draws > 0) for p in self.probabilities]
        return draws - math.fsum(drawn), math.sqrt(math.fsum(q * (1 - q) for q in drawn))

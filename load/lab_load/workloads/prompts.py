"""Questions and their popularity. A question is a function of seed, salt, number and language."""

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
KOREAN = (
    "강물", "바위", "창문", "시장", "정원", "선생님", "편지", "겨울", "다리", "기차", "음악", "종이", "숲속", "섬",
    "의사", "거울", "부엌", "행성", "은빛", "항구", "촛불", "성곽", "사막", "농부", "기타", "망치", "곤충", "밀림",
    "사다리", "초원", "바늘", "바다", "연필", "토끼", "안장", "차표", "골짜기", "수레", "닻",
    "바구니", "사진기", "용", "독수리", "깃털",
)  # fmt: skip


def question(seed: int, salt: str, number: int, words: int, language: str = "en") -> str:
    """Question `number` of a run. `language`: `en`, `ko`, or `both`: odd numbers in Korean.

    Salt and number come first, so that questions, of one run or of two, share no prefix that a prefix cache could keep.
    """
    korean = language == "ko" or (language == "both" and number % 2 == 1)
    chosen = " ".join(_words(seed, number, words, KOREAN if korean else WORDS))
    return f"{salt}-{number}: {chosen}에 대해 써 주세요." if korean else f"{salt}-{number}: write about {chosen}."


def sentence(seed: int, number: int, words: int) -> str:
    """A text that is used as an earlier answer of a conversation."""
    return " ".join(_words(seed, -number - 1, words, WORDS)) + "."


def _words(seed: int, number: int, words: int, vocabulary: tuple[str, ...]) -> list[str]:
    return random.Random(f"{seed}/{number}").choices(vocabulary, k=words)  # noqa: S311 reproducible, not secret


class Zipf:
    """Draws numbers 1…n, number k with probability k^-s / Σ i^-s, as in web requests (Breslau et al., 1999)."""

    def __init__(self, n: int, s: float, seed: int) -> None:
        weights = [k**-s for k in range(1, n + 1)]
        total = math.fsum(weights)
        self.probabilities = [weight / total for weight in weights]
        self._cumulative = list(itertools.accumulate(weights))
        self._random = random.Random(f"zipf/{seed}")  # noqa: S311 as above

    def draw(self) -> int:
        """The next number. The i-th draw depends on the seed only."""
        return bisect.bisect_right(self._cumulative, self._random.random() * self._cumulative[-1]) + 1

    def expected_hits(self, draws: int) -> tuple[float, float]:
        """Hits of an unlimited cache that is cold at first: mean, and an upper bound of the standard deviation.

        A miss is the first draw of a number, so E[hits] = n − Σ (1 − (1 − p_k)^n). Whether k was drawn is a Bernoulli
        variable, and these are negatively associated, so the variance is at most the sum of theirs.
        """
        drawn = [-math.expm1(draws * math.log1p(-p)) if p < 1 else float(draws > 0) for p in self.probabilities]
        return draws - math.fsum(drawn), math.sqrt(math.fsum(q * (1 - q) for q in drawn))

    def ttl_hit_ratio(self, rate: float, ttl: float) -> float:
        """Long-run hit ratio with a TTL in seconds that hits do not renew, at `rate` requests/s (Poisson).

        Question k is fetched, then hit p_k·rate·ttl times on average: Σ p_k · λ_k T / (1 + λ_k T).
        """
        return math.fsum(p * p * rate * ttl / (1 + p * rate * ttl) for p in self.probabilities)

    def lru_hit_ratio(self, capacity: int) -> float:
        """Long-run hit ratio of an LRU cache of `capacity` entries, by Che's approximation (Che et al., 2002).

        The characteristic time t solves Σ (1 − e^(−p_k t)) = capacity; then the ratio is Σ p_k (1 − e^(−p_k t)).
        """
        if capacity >= len(self.probabilities):
            return 1.0
        low, high = 0.0, 1.0
        while math.fsum(-math.expm1(-p * high) for p in self.probabilities) < capacity:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            full = math.fsum(-math.expm1(-p * middle) for p in self.probabilities) < capacity
            low, high = (middle, high) if full else (low, middle)
        return math.fsum(p * -math.expm1(-p * high) for p in self.probabilities)

"""The parameters of a workload; together with the seed they determine every byte of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "ko", "both"]


@dataclass(frozen=True)
class Shape:
    """Lengths in words and tokens, times in seconds."""

    seed: int = 1
    requests: int = 100
    users: int = 8
    prompt_words: int = 40
    max_tokens: int = 64
    language: Language = "en"
    prompts: int = 100
    zipf_exponent: float = 1.0
    prefix_groups: int = 4
    ttl_seconds: float | None = None

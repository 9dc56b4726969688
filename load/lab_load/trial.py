"""One run: what was set, what is asked next, what came back. Knows nothing of HTTP or Locust."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .answer import Answer
from .prompts import Zipf, question
from .settings import Settings
from .target import Target


@dataclass
class Trial:
    """Times are seconds of `time.perf_counter`, but for `started`."""

    name: str
    settings: Settings
    target: Target
    salt: str = ""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.perf_counter)
    full: float | None = None  # when all users were there
    stopped: float | None = None  # from here on nobody asks anew
    users: int = 0
    asked: int = 0
    answers: list[Answer] = field(default_factory=list)
    cpu_began: float = field(default_factory=time.process_time)
    cpu_most: float = 0.0  # percent of a core, the highest that Locust saw in 5 s

    def __post_init__(self) -> None:
        self.salt = self.settings.salt or secrets.token_hex(4)
        self.zipf = Zipf(self.settings.prompts, self.settings.zipf_exponent, self.settings.seed)
        self._fresh = 0

    def fresh(self) -> int:
        """A number that no other question of this run has."""
        self._fresh += 1
        return self._fresh

    def text(self, number: int) -> str:
        return question(self.settings.seed, self.salt, number, self.settings.prompt_words)

    @property
    def unfinished(self) -> int:
        """Asked, and cut off when the time to drain was over."""
        return self.asked - len(self.answers)

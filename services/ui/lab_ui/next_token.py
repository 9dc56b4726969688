"""The next-token page: probabilities of tokens before and after the sampling parameters, the guess and its score.

Knows the format of /v1/inspect/next-token; does not draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .wire import Piece, number, objects, piece

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "Water boils at 100 degrees",
    "Two plus two is",
    "The opposite of hot is",
)
MAX_PROMPT = 2000  # characters
TOP = 100  # candidates to request
BARS = 12  # candidates to show


@dataclass(frozen=True)
class Candidate:
    """A token that can come next. `probability`: the model's; `heated`: after temperature; `final`: after the filters;
    `cut_by`: the filter that removed it."""

    piece: Piece
    probability: float
    heated: float
    final: float
    cut_by: str | None


@dataclass
class Score:
    """Counts of guesses: all, those that were the most likely token, those among the five most likely."""

    rounds: int = 0
    first: int = 0
    five: int = 0

    def count(self, rank: int | None) -> None:
        self.rounds += 1
        self.first += rank == 1
        self.five += rank is not None and rank <= 5


def candidates(body: Mapping[str, Any]) -> list[Candidate]:
    """The candidates of an answer, the most likely first."""
    found = []
    for entry in objects(body, "tokens"):
        token = piece(entry)
        if token is not None:
            cut_by = entry.get("cut_by")
            found.append(
                Candidate(token, number(entry, "probability"), number(entry, "after_temperature"),
                          number(entry, "after_filters"), cut_by if isinstance(cut_by, str) else None)
            )  # fmt: skip
    return found


def rank_of(guess: str, found: Sequence[Candidate]) -> int | None:
    """Rank of the guessed word, 1 for the most likely; None if it is not among the candidates. A token that is the
    beginning of the word counts, because a word can have several tokens."""
    word = _plain(guess)
    for rank, each in enumerate(found, 1):
        text = _plain(each.piece.text or "")
        if text and word and (word == text or (word.startswith(text) and len(text) >= min(3, len(word)))):
            return rank
    return None


def text_after(text: str, chosen: Sequence[Piece]) -> str:
    """The prompt followed by the chosen tokens."""
    data = b"".join(each.data or (each.text or "").encode() for each in chosen)
    return text + data.decode(errors="replace")


def _plain(text: str) -> str:
    return re.sub(r"[^\w]+", "", text.casefold()) or text.strip()

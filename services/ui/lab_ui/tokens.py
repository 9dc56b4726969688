"""The tokens page: two texts cut by several tokenizers, and the ratio of their tokens. Knows the format of
/v1/inspect/tokenize; does not draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .wire import TOKENIZERS, Piece, pieces

MAX_TEXT = 5000  # characters of a text
SHOWN = 1500  # tokens to draw
PAIRS = {  # the same text in Korean and in English
    "model": ("대규모 언어 모델은 다음 토큰을 예측합니다.", "Large language models predict the next token."),
    "weather": ("오늘은 비가 오고 바람이 세게 붑니다.", "It is raining and windy today."),
    "history": (
        "세종대왕은 1443년에 훈민정음을 만들었습니다.",
        "King Sejong created the Korean alphabet in 1443.",
    ),
    "code": ("합계 = sum(숫자들)  # 모두 더하기", "total = sum(numbers)  # add them all"),
}


@dataclass(frozen=True)
class Cut:
    """The tokens of one text by one tokenizer."""

    tokenizer: str
    count: int
    characters: int
    bytes: int
    pieces: list[Piece]

    @property
    def split(self) -> int:
        """Number of tokens that are only a part of a character."""
        return sum(piece.text is None for piece in self.pieces)


def tokenizers(listing: Mapping[str, Any]) -> list[str]:
    """Names that /v1/inspect/tokenize accepts: the ready models of the lab, and OpenAI's tokenizers."""
    entries = [each for each in listing.get("data") or [] if isinstance(each, Mapping)]
    local = [
        str(each["id"])
        for each in entries
        if isinstance(each.get("id"), str) and "kind" in each and not each.get("alias_of")
        and each.get("state", "ready") == "ready"
    ]  # fmt: skip
    return [*local, *TOKENIZERS]


def body(tokenizer: str, text: str) -> dict[str, Any]:
    named = {"tokenizer": tokenizer} if tokenizer in TOKENIZERS else {"model": tokenizer}
    return {"text": text, "add_special_tokens": False} | named


def cut(tokenizer: str, text: str, answer: Mapping[str, Any]) -> Cut:
    found = pieces(answer)
    return Cut(tokenizer, len(found), len(text), len(text.encode()), found)


def ratio(one: Cut, other: Cut) -> float | None:
    """Tokens of `one` divided by tokens of `other`; None if `other` has none."""
    return one.count / other.count if other.count else None

"""Reads tokens from answers of /v1/inspect. Entries of another shape are left out: answers are not trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .answer import Alternative, Token

TOKENIZERS = ("cl100k_base", "o200k_base")  # OpenAI's tokenizers, which the model service has too


@dataclass(frozen=True)
class Piece:
    """A token of a text. `text` is None if its bytes are not whole characters."""

    id: int
    text: str | None
    data: bytes
    special: bool = False

    @property
    def label(self) -> str:
        """The token's text with visible white space, or its bytes in hexadecimal."""
        if self.text is None:
            return self.data.hex(" ")
        return self.text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def piece(entry: Mapping[str, Any]) -> Piece | None:
    number, text, data = entry.get("id"), entry.get("text"), entry.get("bytes")
    if not isinstance(number, int) or not isinstance(text, str | None):
        return None
    whole = isinstance(data, list) and all(isinstance(each, int) and 0 <= each < 256 for each in data)
    return Piece(number, text, bytes(data) if whole and data else b"", bool(entry.get("special")))


def objects(body: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    """The JSON objects in the list `name`."""
    listed = body.get(name)
    return [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []


def pieces(body: Mapping[str, Any], name: str = "tokens") -> list[Piece]:
    return [found for entry in objects(body, name) if (found := piece(entry)) is not None]


def number(entry: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    value = entry.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


def _alternative(entry: Mapping[str, Any]) -> Alternative | None:
    found = piece(entry)
    if found is None:
        return None
    return Alternative("\ufffd" if found.text is None else found.text, number(entry, "logprob", -99.0), found.data)


def scored(body: Mapping[str, Any], name: str) -> list[tuple[Token, list[int]]]:
    """The tokens in the list `name`, each with the ids of its alternatives."""
    found = []
    for entry in objects(body, name):
        token = _alternative(entry)
        if token is None:
            continue
        others = [(other, _alternative(other)) for other in objects(entry, "alternatives")]
        known = [(other, each) for other, each in others if each is not None]
        top = tuple(each for _, each in known)
        found.append((Token(token.text, token.logprob, token.data, top), [int(other["id"]) for other, _ in known]))
    return found

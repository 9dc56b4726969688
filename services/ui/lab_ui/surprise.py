"""Tokens with their surprise and alternatives, as drawing/tokens.py takes them. Knows probabilities; does not draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .answer import Alternative, Token

FULL = 8.0  # bits of surprise that have the full colour: a token that was likely by less than 1 in 256


def bits(logprob: float) -> float:
    """Surprise: 0 for a certain token, 1 more for each halving of its probability."""
    return max(0.0, -logprob / math.log(2))


def label(token: Alternative) -> str:
    """The token's text; its bytes in hexadecimal where they are only a part of a character."""
    if token.data and "\ufffd" in token.text:
        return " ".join(f"{byte:02x}" for byte in token.data)
    return token.text


def view(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """For each token: `text`, `raw` (bytes instead of text), `bits`, `p`, `top` (text, p, whether it was chosen)."""
    return [
        {
            "text": label(token),
            "raw": label(token) != token.text,
            "bits": round(bits(token.logprob), 2),
            "share": round(min(1.0, bits(token.logprob) / FULL), 3),
            "p": math.exp(token.logprob),
            "top": [
                {"text": label(each), "p": math.exp(each.logprob), "chosen": each.text == token.text,
                 "raw": label(each) != each.text}
                for each in token.top
            ],
        }
        for token in tokens
    ]  # fmt: skip


def mean_bits(tokens: Sequence[Token]) -> float | None:
    """Mean surprise of a token in bits; None without tokens."""
    return sum(bits(token.logprob) for token in tokens) / len(tokens) if tokens else None


def perplexity(tokens: Sequence[Token]) -> float | None:
    """exp of the mean negative log probability: among how many equally likely tokens the model chose, on average."""
    return math.exp(-sum(token.logprob for token in tokens) / len(tokens)) if tokens else None


def chosen(token: Token, rank: int) -> Token:
    """The alternative of this rank as the token that stands there."""
    other = token.top[rank]
    return Token(other.text, other.logprob, other.data, token.top)


def text_of(tokens: Sequence[Token]) -> str:
    """Their text; characters that are cut over tokens are put together."""
    return b"".join(token.data or token.text.encode() for token in tokens).decode(errors="replace")

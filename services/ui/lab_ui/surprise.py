"""Tokens with their surprise and alternatives, for drawing/components.py. Knows probabilities; does not draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .answer import Alternative, Token

FULL = 8.0  # bits of surprise with the full colour: a probability of 1/256


def bits(logprob: float) -> float:
    """Surprise in bits: 0 for a certain token, 1 more for each halving of the probability. logprob: natural."""
    return max(0.0, -logprob / math.log(2))


def label(token: Alternative) -> str:
    """The token's text, or its bytes in hexadecimal if they are only a part of a character."""
    if token.data and "\ufffd" in token.text:
        return " ".join(f"{byte:02x}" for byte in token.data)
    return token.text


def view(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """For each token: `text`, `raw` (whether `text` is bytes), `bits`, `share` (colour, 0 to 1), `p`, `top` (text, p,
    whether it was chosen, raw)."""
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
    """Mean surprise per token in bits; None without tokens."""
    return sum(bits(token.logprob) for token in tokens) / len(tokens) if tokens else None


def perplexity(tokens: Sequence[Token]) -> float | None:
    """exp of the mean negative log probability: the number of equally likely tokens that would be as uncertain. None
    without tokens."""
    return math.exp(-sum(token.logprob for token in tokens) / len(tokens)) if tokens else None


def chosen(token: Token, rank: int) -> Token:
    """The alternative of this rank, as the token at this place."""
    other = token.top[rank]
    return Token(other.text, other.logprob, other.data, token.top)


def text_of(tokens: Sequence[Token]) -> str:
    """Text of the tokens; characters that are split over several tokens are joined."""
    return b"".join(token.data or token.text.encode() for token in tokens).decode(errors="replace")

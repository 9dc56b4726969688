"""Inside a forward pass: the most likely next tokens of each layer (logit lens), and the attention of each token.

Knows the formats of /v1/inspect/logit-lens and /v1/inspect/attention; does not draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .wire import Piece, number, piece, pieces

MOST_TOKENS = 48
TOP = 5  # most likely tokens to request for each layer and place


def lens(body: Mapping[str, Any]) -> tuple[list[Piece], list[list[list[tuple[Piece, float]]]]]:
    """The tokens of the text, and for each layer and place the most likely next tokens with their probabilities."""
    layers = []
    for layer in body.get("layers") or []:
        places = []
        for place in layer if isinstance(layer, list) else []:
            entries = [each for each in place if isinstance(each, Mapping)] if isinstance(place, list) else []
            found = [(piece(each), number(each, "probability")) for each in entries]
            places.append([(token, share) for token, share in found if token is not None])
        layers.append(places)
    return pieces(body), layers


def cells(tokens: list[Piece], layers: list[list[list[tuple[Piece, float]]]]) -> list[tuple[str, str, float, str]]:
    """(place and token, layer, probability, most likely token) of each layer, for a grid."""
    return [
        (f"{place + 1} {tokens[place].label}", str(number_), found[0][1], found[0][0].label)
        for number_, layer in enumerate(layers)
        for place, found in enumerate(layer[: len(tokens)])
        if found
    ]


def pinned(layers: list[list[list[tuple[Piece, float]]]], place: int, token: Piece) -> list[tuple[str, float, str]]:
    """(layer, probability, as text) of one token at one place; 0 if it is not among the layer's most likely tokens."""
    rows = []
    for number_, layer in enumerate(layers):
        found = layer[place] if place < len(layer) else []
        share = next((share for each, share in found if each.id == token.id), 0.0)
        best = found[0][0].label if found else "–"
        rows.append((str(number_), share, f"{share:.1%} ({best})"))
    return rows


def attention(body: Mapping[str, Any]) -> tuple[list[Piece], list[list[list[float]]], int]:
    """The tokens of the text, for each head the rows of its attention, and the number of layers."""
    heads = [
        [[float(share) for share in row] for row in head if isinstance(row, list)]
        for head in body.get("heads") or []
        if isinstance(head, list)
    ]
    layers = body.get("layers")
    return pieces(body), heads, layers if isinstance(layers, int) else 1


def mean(heads: list[list[list[float]]]) -> list[list[float]]:
    """The mean over all heads."""
    count = len(heads)
    return [
        [sum(head[row][column] for head in heads) / count for column in range(len(heads[0][row]))]
        for row in range(len(heads[0]) if heads else 0)
    ]


def attended(tokens: list[Piece], rows: list[list[float]]) -> list[tuple[str, str, float, str]]:
    """(attended token, attending token, share, as text): each token attends to itself and those before it."""
    return [
        (f"{to + 1} {tokens[to].label}", f"{at + 1} {tokens[at].label}", share, f"{share:.1%}")
        for at, row in enumerate(rows[: len(tokens)])
        for to, share in enumerate(row[: at + 1])
    ]

"""A text cut into its tokens: text, bytes and place of each.

If a character is split over several tokens, their bytes are given instead of U+FFFD. Knows one tokenizer. Knows nothing
of models or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Vocabulary(Protocol):
    """The interface of a tokenizer whose tokens can be shown."""

    vocab_size: int

    def encode(self, prompt: str, *, special: bool = True) -> list[int]: ...

    def offsets(self, text: str, *, special: bool = True) -> list[tuple[int, int]]: ...

    def bytes_of(self, token: int) -> bytes: ...

    def special(self, token: int) -> str | None: ...


class TokenPiece(NamedTuple):
    """One token. text: None if its bytes are not whole characters. start, end: the characters of the whole text that it
    touches; tokens that share a character overlap. special: a control token, whose text is its name."""

    id: int
    text: str | None
    bytes: bytes
    start: int
    end: int
    special: bool


def name_of(vocabulary: Vocabulary, token: int) -> tuple[str | None, bytes, bool]:
    """(text, bytes, special) of one token, as in TokenPiece."""
    name = vocabulary.special(token)
    found = vocabulary.bytes_of(token) if name is None else name.encode()
    try:
        return found.decode(), found, name is not None
    except UnicodeDecodeError:
        return None, found, False


def cut(vocabulary: Vocabulary, text: str, ids: Sequence[int], *, special: bool) -> list[TokenPiece]:
    """The pieces of `text`, whose tokens are `ids`, encoded with or without special tokens."""
    names = [name_of(vocabulary, token) for token in ids]
    whole = text.encode()
    for parts in ([each[1] for each in names], [b"" if each[2] else each[1] for each in names]):
        if b"".join(parts) == whole:
            places = _places(parts)
            break
    else:  # a tokenizer that changes the text, for example to lower case
        places = vocabulary.offsets(text, special=special)
    return _pieces(ids, names, places)


def join(vocabulary: Vocabulary, ids: Sequence[int]) -> tuple[bytes, list[TokenPiece]]:
    """The bytes of these tokens together, including names of special tokens, and the pieces of that text."""
    names = [name_of(vocabulary, token) for token in ids]
    parts = [each[1] for each in names]
    return b"".join(parts), _pieces(ids, names, _places(parts))


def show(found: bytes) -> str:
    r"""The bytes as text; bytes that are not characters are written as \xNN."""
    return found.decode("utf-8", "backslashreplace")


def _pieces(
    ids: Sequence[int], names: Sequence[tuple[str | None, bytes, bool]], places: Sequence[tuple[int, int]]
) -> list[TokenPiece]:
    return [
        TokenPiece(token, text, found, start, end, special)
        for token, (text, found, special), (start, end) in zip(ids, names, places, strict=True)
    ]


def _places(parts: Sequence[bytes]) -> list[tuple[int, int]]:
    """The characters that each part touches in the text of all parts."""
    whole = np.frombuffer(b"".join(parts), np.uint8)
    begun = np.concatenate([[0], np.cumsum(whole & 0xC0 != 0x80)]).tolist()  # characters begun before each byte
    places, at = [], 0
    for part in parts:
        end = at + len(part)
        # A continuation byte belongs to the character that has begun before it.
        first = begun[at] - (1 if part and begun[at + 1] == begun[at] and begun[at] else 0)
        places.append((first, begun[end] if part else first))
        at = end
    return places

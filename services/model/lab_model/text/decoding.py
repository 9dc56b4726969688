"""Token ids to text while they arrive: incremental decoders, stop strings.

Knows tokens and text. Knows nothing of models, requests or HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

# An unfinished UTF-8 character decodes to this; text that ends in it may still change.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class ByteDecoding:
    """For byte-level tokenizers: each token is looked up once, and only unfinished characters are held back."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that later tokens cannot change."""
        return self._utf8.decode(b"".join([self._bytes_of(token) for token in ids]))

    def rest(self) -> str:
        """The held-back rest at the end; bytes that never became a character are U+FFFD."""
        return self._utf8.decode(b"", final=True)


class PieceDecoding:
    """For all other tokenizers: decodes the last tokens again together with the new ones and returns the difference."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Decoding begins at `_start`, so that a token which depends on the one before it (spaces, bytes) is decoded
        # correctly; the text up to `_read` has been returned.
        self._start = self._read = 0
        self._before = ""

    def push(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(self._before) or now.endswith(UNFINISHED):
            return ""
        fresh = now[len(self._before) :]
        self._start, self._read = self._read, len(self._ids)
        self._before = self._decode(self._ids[self._start : self._read])
        return fresh

    def rest(self) -> str:
        fresh = self._decode(self._ids[self._start :])[len(self._before) :]
        self._start = self._read = len(self._ids)
        self._before = ""
        return fresh


Decoding = ByteDecoding | PieceDecoding


class StopSearch:
    """Cuts a text that comes in parts at the first stop string.

    `push` returns only text that later parts cannot turn into a stop string; `rest` returns the remainder.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        longest = max(map(len, self._stop), default=0)
        # Proper prefixes of the stop strings by length, the longest first: text that ends in one is held back.
        self._prefixes = [
            (length, tuple({stop[:length] for stop in self._stop if len(stop) > length}))
            for length in range(longest - 1, 0, -1)
        ]
        self.held = ""  # perhaps the beginning of a stop string
        self.stopped = False

    def push(self, fresh: str) -> str:
        """Text that is final now; sets `stopped` at a stop string, which is not returned."""
        if self.stopped:
            return ""
        if not self._stop:
            return fresh
        fresh = self.held + fresh
        found = [at for at in (fresh.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return fresh[: min(found)]
        keep = next((n for n, heads in self._prefixes if n <= len(fresh) and fresh.endswith(heads)), 0)
        self.held = fresh[len(fresh) - keep :]
        return fresh[: len(fresh) - keep]

    def rest(self) -> str:
        """The held-back text, at the end; empty after a stop string."""
        held, self.held = self.held, ""
        return held


class IncrementalDetokenizer:
    """The text of an answer while its tokens arrive, cut at the first stop string.

    `push` returns only text that later tokens cannot change or turn into a stop string; `rest` returns the remainder.
    starts: with `aligned`, the offset in characters at which each token begins. length: characters returned so far.
    """

    def __init__(self, decoding: Decoding, stop: Sequence[str] = (), *, aligned: bool = False) -> None:
        self._decoding = decoding
        self._stops = StopSearch(stop)
        self.starts: list[int] | None = [] if aligned else None
        self.length = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stops.stopped

    def push(self, ids: Sequence[int]) -> str:
        """Text that is final after these tokens; sets `stopped` at a stop string, which is not returned."""
        if self.starts is None:
            return self._cut(self._decoding.push(ids))
        decoded = self.length + len(self._stops.held)
        text = ""
        for token in ids:
            self.starts.append(decoded + len(text))
            text += self._decoding.push([token])
        return self._cut(text)

    def rest(self) -> str:
        """The held-back text, at the end of the answer; bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        tail = self._cut(self._decoding.rest())
        held = self._stops.rest()
        self.length += len(held)
        return tail + held

    def _cut(self, fresh: str) -> str:
        final = self._stops.push(fresh)
        self.length += len(final)
        return final

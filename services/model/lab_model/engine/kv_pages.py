"""Which page of the KV pool belongs to whom, and which pages already hold the beginning of a prompt.

Pages are counted, not touched: token ids and page numbers only. A page that a request filled whole may be published
under its tokens and those before it; who asks for the same beginning shares it, and nobody writes to it again. Pages
that nobody holds keep their content until their place is needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# Tokens in a page: the grain in which prompts share, and the most that a request wastes.
PAGE_TOKENS = 32

ROOT = 0  # the node before the first page


class Pages:
    """`total` pages, numbered from 1: page 0 is nobody's."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total, 0, -1))
        self._holders = [0] * (total + 1)
        # A node is one published page's place in the tree of beginnings. Numbers are never used twice: a page whose
        # parent was dropped can no longer be found, and ages out.
        self._nodes = 0
        self._pages: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens) -> (page, node)
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # published page -> its key
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that still hold a beginning."""
        return len(self._idle)

    def match(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """The published pages that hold the beginning of `tokens`, at most `most`, and the last one's node."""
        found, node = [], ROOT
        for start in range(0, most * PAGE_TOKENS, PAGE_TOKENS):
            step = self._pages.get((node, tuple(tokens[start : start + PAGE_TOKENS])))
            if step is None:
                break
            page, node = step
            found.append(page)
        return found, node

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def take(self) -> int:
        """A page of one's own. There must be one `available`."""
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def publish(self, page: int, parent: int, tokens: Sequence[int]) -> int:
        """Let others find `page`, which holds `tokens` after those of `parent`; the node that it, or its twin, has."""
        key = (parent, tuple(tokens))
        if key not in self._pages:
            self._nodes += 1
            self._pages[key] = (page, self._nodes)
            self._keys[page] = key
        return self._pages[key][1]

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each. The last page of a beginning is the first to go."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Nobody shall find these any more: what they hold is not to be trusted."""
        for page in pages:
            if key := self._keys.pop(page, None):
                del self._pages[key]

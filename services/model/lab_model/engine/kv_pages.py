"""The pages of the KV pool: the holders of each page, and the prefix cache.

A page that a request has filled is published under its tokens and those before it (prefix cache). A request with the
same prefix shares the page, which is not written again. Pages without a holder keep their content until they are taken,
the least recently used first. Knows token ids and page numbers. Does not access the pages' memory, which the runner
owns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from .request import Request

# Tokens in a page: the granularity of shared prefixes, and an upper bound of the tokens that a request wastes.
PAGE_TOKENS = 32

ROOT = 0  # the node before the first page


class KVPages:
    """`total` pages, numbered from 1: page 0 is never assigned."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total, 0, -1))
        self._holders = [0] * (total + 1)
        # A node is a published page's place in the tree of prefixes. Numbers are never used twice: a page whose parent
        # was dropped can no longer be found, and ages out.
        self._nodes = 0
        self._pages: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # (parent, tokens) -> (page, node)
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # published page -> its key
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, without holder, least recently used first
        self.dirty: list[int] = []  # pages handed out with another request's content, to be zeroed before use

    @property
    def available(self) -> int:
        """Number of pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Number of pages without a holder that still contain a prefix."""
        return len(self._idle)

    # By request

    def admit(self, request: Request, grain: int) -> bool:
        """Give the request pages for its tokens and one more, shared ones first. If there are too few, give none and
        return False. grain: the number of shared tokens is a multiple of it."""
        # At least one token is computed, because the answer begins with its logits.
        most = (len(request.tokens) - 1) // grain * grain // PAGE_TOKENS
        found, node = self.match(request.tokens, most)
        if len(found) * PAGE_TOKENS % grain:
            found = found[: len(found) * PAGE_TOKENS // grain * grain // PAGE_TOKENS]
            _, node = self.match(request.tokens, len(found))
        self.share(found)
        needed = -(-(len(request.tokens) + 1) // PAGE_TOKENS) - len(found)
        if needed > self.available:
            self.release(found)
            return False
        request.pages = found + self.take(needed)
        request.target, request.computed_tokens = len(request.tokens), len(found) * PAGE_TOKENS
        request.published, request.node = len(found), node
        if not request.generated:
            request.prefix_hit_tokens = request.computed_tokens
        return True

    def publish_filled(self, request: Request) -> None:
        """Let other requests find the pages that this one has filled so far."""
        for index in range(request.published, request.computed_tokens // PAGE_TOKENS):
            content = request.tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            request.node = self.publish(request.pages[index], request.node, content)
            request.published = index + 1

    def evict(self, request: Request) -> None:
        """Take all its pages back."""
        self.release(request.pages)
        request.pages, request.computed_tokens, request.target = [], 0, 0

    def distrust(self, requests: Iterable[Request]) -> None:
        """Stop sharing the pages of these requests, because they may contain NaN."""
        for request in requests:
            self.forget(request.pages)

    # By page

    def match(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """The published pages that contain the beginning of `tokens`, at most `most`, and the node of the last one."""
        found, node = [], ROOT
        for start in range(0, most * PAGE_TOKENS, PAGE_TOKENS):
            step = self._pages.get((node, tuple(tokens[start : start + PAGE_TOKENS])))
            if step is None:
                break
            page, node = step
            found.append(page)
        return found, node

    def share(self, pages: Sequence[int]) -> None:
        """Add a holder to each page."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """Take `count` pages without a holder, at most as many as are `available`. They become `dirty`."""
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._pages[self._keys.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._holders[page] = 1
            pages.append(page)
        self.dirty += pages
        return pages

    def publish(self, page: int, parent: int, tokens: Sequence[int]) -> int:
        """Let other requests find `page`, which contains `tokens` after those of `parent`. Returns its node, or the
        node of an equal page."""
        key = (parent, tuple(tokens))
        if key not in self._pages:
            self._nodes += 1
            self._pages[key] = (page, self._nodes)
            self._keys[page] = key
        return self._pages[key][1]

    def release(self, pages: Sequence[int]) -> None:
        """Remove a holder from each page. The last page of a prefix is evicted first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Unpublish these pages."""
        for page in pages:
            if key := self._keys.pop(page, None):
                del self._pages[key]

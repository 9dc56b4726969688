"""The parts that app.py hands to each page. Holds no state."""

from __future__ import annotations

from dataclasses import dataclass

from .proxy import Proxy
from .settings import Settings
from .texts import Texts

MAX_KEY = 512  # characters


@dataclass(frozen=True)
class Session:
    """`key`: the key for the proxy, sent with every call; None: calls have no key."""

    settings: Settings
    proxy: Proxy
    texts: Texts
    key: str | None = None


def valid_key(text: str) -> bool:
    """Whether `text` can be sent as a Bearer token: printable ASCII without spaces, at most 512 characters."""
    return 0 < len(text) <= MAX_KEY and text.isascii() and text.isprintable() and " " not in text

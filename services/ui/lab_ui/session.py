"""What app.py hands to each page of a reader's session. Holds no state of its own."""

from __future__ import annotations

from dataclasses import dataclass

from .proxy import Proxy
from .settings import Settings
from .texts import Texts


@dataclass(frozen=True)
class Session:
    """`key`: the reader's key for the proxy, passed with every call; None: the proxy decides by its settings."""

    settings: Settings
    proxy: Proxy
    texts: Texts
    key: str | None = None
